"""The data plane inside a node: processes of one machine read host copies where they lie.

The agent serves its arena on a Unix socket. A client proves the token as on TCP, is handed a descriptor that can
only be mapped read-only, and from then on asks for *leases*: the region is counted as being read
(`RegionTable.enter`), so it cannot be freed, from the answer until the client gives the lease back.

    server -> client   hello: arena id, bytes; the descriptor beside it
    client -> server   lease bytes [offset, offset + nbytes) of region (id, epoch)
    server -> client   status, then where in the arena they are, or a sentence why not        in order
    client -> server   return lease

A client that dies closes its socket, and the kernel says so. One that stops keeps a lease for `LEASE_S`; then the
server closes the connection *first* and frees the memory second. A Unix socket fails at once when its other end is
closed, so a lease that could be given back was good for as long as the client read: what a late reader copied out of
memory that means something else by now is never taken for a chunk.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from layercast_agent.arena import Arena, ArenaMemory
from layercast_agent.errors import AgentError, PeerError, PeerRefusedError, RegionFencedError
from layercast_agent.regions import RegionTable
from layercast_agent.transport import wire
from layercast_agent.transport.wire import Deadline, Status

CONNECTIONS_MAX = 256
HANDSHAKE_DEADLINE_S = 2.0
LEASE_S = 5.0
LEASES_MAX = 64  # of one connection; far above any window
PEER_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid

_HELLO = struct.Struct("!QQ")
_REQUEST = struct.Struct("!BxxxIQQQQ")
_ANSWER = struct.Struct("!BxxxIQ")
REQUEST_BYTES = _REQUEST.size
ANSWER_BYTES = _ANSWER.size

log = logging.getLogger(__name__)


class Kind(IntEnum):
    """First byte of a request."""

    LEASE = 1
    RETURN = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRequest:
    """Bytes [offset, offset + nbytes) of a region, or their return, which needs the id only."""

    kind: Kind
    lease_id: int
    region_id: int = 0
    epoch: int = 0
    offset: int = 0
    nbytes: int = 0

    def pack(self) -> bytes:
        """The frame."""
        return _REQUEST.pack(self.kind, self.lease_id, self.region_id, self.epoch, self.offset, self.nbytes)

    @staticmethod
    def unpack(frame: bytes | bytearray) -> LeaseRequest:
        """PeerRefusedError for a frame that is no request."""
        kind, lease_id, region_id, epoch, offset, nbytes = _REQUEST.unpack(frame)
        if kind not in {Kind.LEASE, Kind.RETURN}:
            raise PeerRefusedError("a client sent a frame that is not a request")
        return LeaseRequest(
            kind=Kind(kind),
            lease_id=lease_id,
            region_id=region_id,
            epoch=epoch,
            offset=offset,
            nbytes=nbytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseAnswer:
    """Where the bytes are in the arena; with another status than OK, the length of the sentence that follows."""

    status: Status
    lease_id: int
    at: int

    def pack(self) -> bytes:
        """The frame."""
        return _ANSWER.pack(self.status, self.lease_id, self.at)

    @staticmethod
    def unpack(frame: bytes | bytearray) -> LeaseAnswer:
        """PeerRefusedError for a frame that is no answer."""
        status, lease_id, at = _ANSWER.unpack(frame)
        if status not in {Status.OK, Status.REFUSED, Status.FENCED}:
            raise PeerRefusedError("the peer sent a frame that is not an answer")
        if status != Status.OK and at > wire.REASON_BYTES_MAX:
            raise PeerRefusedError("the peer refused with an endless reason")
        return LeaseAnswer(status=Status(status), lease_id=lease_id, at=at)


@dataclass(slots=True, kw_only=True, eq=False)
class _Client:
    """One connection and its leases: id to (region id, since when)."""

    socket: socket.socket
    leases: dict[int, tuple[int, float]] = field(default_factory=dict)


class ShmServer:
    """Leases the regions of one table that lie in one arena."""

    def __init__(
        self, table: RegionTable, *, arena: Arena, token: bytes, path: Path, lease_s: float = LEASE_S
    ) -> None:
        """Listens on nothing before `start`. ValueError: empty token."""
        if not token:
            raise ValueError("the data plane needs a token")
        self.path = path
        self._table = table
        self._arena = arena
        self._token = token
        self._lease_s = lease_s
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._clients: dict[_Client, threading.Thread] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def start(self) -> None:
        """Listen where only this user can connect. AgentError: the path cannot be used."""
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(os.fspath(self.path))
            self.path.chmod(0o600)
            listener.listen(CONNECTIONS_MAX)
        except OSError as error:
            listener.close()
            raise AgentError(f"cannot listen on {self.path}: {error.strerror or error}") from error
        self._listener = listener
        self._acceptor = threading.Thread(target=self._accept, name="shm-accept", daemon=True)
        self._acceptor.start()

    def close(self, *, deadline_s: float = 2.0) -> None:
        """Stop listening and end all connections and leases."""
        self._closed.set()
        with self._lock:
            clients = dict(self._clients)
        for sock in [s for s in (self._listener, *(c.socket for c in clients)) if s is not None]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in it
        for thread in [t for t in (self._acceptor, *clients.values()) if t is not None]:
            thread.join(deadline_s)
        if self._listener is not None:
            self._listener.close()
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        assert self._listener is not None
        while not self._closed.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if not self._closed.is_set():
                    log.warning("cannot accept a shared-memory client", extra={"error": str(error)})
                    self._closed.wait(0.1)  # out of descriptors: somebody must close one first
                continue
            client = _Client(socket=sock)
            thread = threading.Thread(target=self._serve, args=(client,), name="shm", daemon=True)
            with self._lock:
                full = len(self._clients) >= CONNECTIONS_MAX or self._closed.is_set()
                if not full:
                    self._clients[client] = thread
            if full:
                sock.close()
            else:
                thread.start()

    def _serve(self, client: _Client) -> None:
        try:
            _check_user(client.socket)
            deadline = Deadline(HANDSHAKE_DEADLINE_S)
            wire.greet_as_server(client.socket, token=self._token, deadline=deadline)
            hello = _HELLO.pack(self._arena.arena_id, self._arena.nbytes)
            socket.send_fds(client.socket, [hello], [self._arena.reader_fd])
            while True:
                self._wait_no_longer_than_leases(client)
                self._obey(client, LeaseRequest.unpack(wire.receive_bytes(client.socket, REQUEST_BYTES)))
        except TimeoutError:
            log.warning("a client kept a lease for too long", extra={"lease_s": self._lease_s})
        except PeerRefusedError as error:
            log.warning("shared-memory client refused", extra={"reason": str(error)})
        except (PeerError, OSError) as error:
            log.debug("shared-memory client gone", extra={"reason": str(error)})
        finally:
            with self._lock:
                self._clients.pop(client, None)
            client.socket.close()  # first: whoever still reads finds out before the memory is used again
            for region_id, _ in client.leases.values():
                self._table.leave(region_id)

    def _wait_no_longer_than_leases(self, client: _Client) -> None:
        """TimeoutError when the oldest lease is over; else the next receive ends when it will be."""
        if not client.leases:
            client.socket.settimeout(None)
            return
        oldest = min(since for _, since in client.leases.values())
        left = oldest + self._lease_s - time.monotonic()
        if left <= 0:
            raise TimeoutError
        client.socket.settimeout(left)

    def _obey(self, client: _Client, request: LeaseRequest) -> None:
        if request.kind is Kind.RETURN:
            lease = client.leases.pop(request.lease_id, None)
            if lease is not None:
                self._table.leave(lease[0])
            return
        if request.lease_id in client.leases or len(client.leases) >= LEASES_MAX:
            raise PeerRefusedError("a client wants more leases than it may have")
        try:
            at = self._enter(client, request)
        except RegionFencedError as error:
            _refuse(client.socket, request, Status.FENCED, str(error))
        except PeerRefusedError as error:
            _refuse(client.socket, request, Status.REFUSED, str(error))
        else:
            answer = LeaseAnswer(status=Status.OK, lease_id=request.lease_id, at=at)
            client.socket.sendall(answer.pack())

    def _enter(self, client: _Client, request: LeaseRequest) -> int:
        """Take the lease; returns where the bytes are."""
        memory = self._table.enter(request.region_id, request.epoch, request.offset, request.nbytes)
        at = None
        if isinstance(memory, ArenaMemory) and memory.arena is self._arena:
            at = memory.locate(request.offset, request.nbytes)
        if at is None:
            self._table.leave(request.region_id)
            raise PeerRefusedError(
                "these bytes do not lie together in shared memory; read them over the network"
            )
        client.leases[request.lease_id] = (request.region_id, time.monotonic())
        return at


def _check_user(sock: socket.socket) -> None:
    """The descriptor is for processes of this user; the token alone would let others map the memory."""
    _, uid, _ = PEER_CREDENTIALS.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
    )
    if uid not in {os.getuid(), 0}:
        raise PeerRefusedError(f"user {uid} may not map memory of user {os.getuid()}")


def _refuse(sock: socket.socket, request: LeaseRequest, status: Status, reason: str) -> None:
    text = reason.encode()[: wire.REASON_BYTES_MAX]
    sock.sendall(LeaseAnswer(status=status, lease_id=request.lease_id, at=len(text)).pack() + text)


def connect(sock: socket.socket, path: Path, *, token: bytes, deadline: Deadline) -> tuple[int, int, int]:
    """Connect an unconnected Unix socket; returns (arena id, its bytes, its descriptor, which is the caller's).

    Raises:
        PeerLostError: nobody answers there in time.
        PeerRefusedError: one end does not know the token, or the other end is no arena's.
    """
    with wire.socket_errors(f"cannot reach {path}"):
        deadline.apply(sock)
        sock.connect(os.fspath(path))
    wire.greet_as_client(sock, token=token, deadline=deadline)
    with wire.socket_errors("the handshake failed"):
        deadline.apply(sock)
        hello, descriptors, _, _ = socket.recv_fds(sock, _HELLO.size, 1)
    if len(hello) != _HELLO.size or len(descriptors) != 1:
        for descriptor in descriptors:
            os.close(descriptor)
        raise PeerRefusedError("the peer gave no memory to map")
    arena_id, nbytes = _HELLO.unpack(hello)
    return arena_id, nbytes, descriptors[0]
