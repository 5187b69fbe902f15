"""The data plane over TCP: serves regions of this process, and reads one region of a peer.

One thread a connection: requests are answered in the order in which they came, so a client that has several
outstanding keeps the connection busy without any state here. A region cannot be freed while it is being sent
(`RegionTable.reading`), and a client that stops reading is dropped, so neither can it be kept for long. Parameters in
host memory are sent by reference where nothing encrypts them (`by_reference`), anything else is copied.
Transfers use `tcp_link`; `read_region` is for single reads, such as the state of a request that moves.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import threading

from layercast_agent.errors import AgentError, PeerError, PeerLostError, PeerRefusedError, RegionFencedError
from layercast_agent.regions import ReadableMemory, RegionRef, RegionTable
from layercast_agent.tls import Tls
from layercast_agent.transport import by_reference, secure, wire
from layercast_agent.transport.by_reference import ReferenceSender
from layercast_agent.transport.egress import EgressLimiter
from layercast_agent.transport.secure import Stream
from layercast_agent.transport.wire import Deadline, ReadRequest, ResponseHeader, Status

__all__ = ["EgressLimiter", "TcpServer", "connect", "read_region"]

SLICE_BYTES = 256 * 1024  # urgent bytes wait for at most one slice of each parameter flow
CONNECTIONS_MAX = 2048  # every target keeps two to each of its substitutes, idle
HANDSHAKE_DEADLINE_S = 2.0
SEND_DEADLINE_S = 5  # one slice must leave within this; a reader that stopped holds a region no longer
ONE_READ_BYTES = 16 * 1024 * 1024

log = logging.getLogger(__name__)


class TcpServer:
    """Serves the regions of one table to peers that know the token."""

    def __init__(
        self,
        table: RegionTable,
        *,
        token: bytes,
        host: str,
        port: int,
        limiter: EgressLimiter,
        tls: Tls | None = None,
    ) -> None:
        """Listens on nothing before `start`. `port` 0 takes a free one. ValueError: empty token or host."""
        self._tls = tls
        if not token or not host:
            raise ValueError("the data plane needs a token and a host to listen on")
        self._table = table
        self._token = token
        self._host, self._port = host, port
        self._limiter = limiter
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._connections: dict[threading.Thread, Stream] = {}
        self._senders: dict[Stream, ReferenceSender | None] = {}  # None: it was tried, and copies are better
        self._lock = threading.Lock()
        self._closed = threading.Event()
        table.lent = self._lent

    def start(self) -> None:
        """Listen on the given host only. AgentError: the address cannot be listened on."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            self._listener = socket.create_server((self._host, self._port), family=family, backlog=128)
        except OSError as error:
            raise AgentError(
                f"cannot listen on data address {self._host}:{self._port}: {error.strerror}"
            ) from error
        # Connections inherit it. Set on them it would come too late: one that began with bbr is paced for ever.
        wire.tune(self._listener)
        self._port = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name="data-accept", daemon=True)
        self._acceptor.start()

    @property
    def address(self) -> str:
        """`host:port` as peers reach it; the port is the real one after `start`."""
        return f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"

    def close(self, *, deadline_s: float = 2.0) -> None:
        """Stop listening and end all connections."""
        self._closed.set()
        with self._lock:
            connections = dict(self._connections)
        for sock in [s for s in (self._listener, *connections.values()) if s is not None]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in it
        for thread in [t for t in (self._acceptor, *connections) if t is not None]:
            thread.join(deadline_s)
        if self._listener is not None:
            self._listener.close()

    def _accept(self) -> None:
        assert self._listener is not None
        while not self._closed.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if not self._closed.is_set():
                    log.warning("cannot accept a data connection", extra={"error": str(error)})
                    self._closed.wait(0.1)  # out of descriptors: somebody must close one first
                continue
            with self._lock:
                full = len(self._connections) >= CONNECTIONS_MAX or self._closed.is_set()
                if not full:
                    thread = threading.Thread(target=self._serve, args=(sock,), name="data", daemon=True)
                    self._connections[thread] = sock
            if full:
                sock.close()
            else:
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        stream: Stream = sock
        try:
            wire.tune(sock)
            stream = self._greet(sock)
            stream.settimeout(None)
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_DEADLINE_S, 0))
            while True:
                self._answer(stream, ReadRequest.unpack(wire.receive_bytes(stream, wire.REQUEST_BYTES)))
        except PeerRefusedError as error:
            log.warning("data connection refused", extra={"reason": str(error)})
        except (PeerError, OSError) as error:
            log.debug("data connection ended", extra={"reason": str(error)})
        except Exception:  # the memory's fault; the peer sees a lost connection and goes elsewhere
            log.exception("reading a region failed")
        finally:
            self._end(stream)

    def _end(self, stream: Stream) -> None:
        with self._lock:
            sender = self._senders.get(stream)
        if sender is not None:
            sender.close()
        stream.close()
        with self._lock:
            self._senders.pop(stream, None)
            self._connections.pop(threading.current_thread(), None)

    def _lent(self, region_id: int) -> bool:
        with self._lock:
            senders = list(self._senders.values())
        return any(sender is not None and sender.lent(region_id) for sender in senders)

    def _greet(self, sock: socket.socket) -> Stream:
        deadline = Deadline(HANDSHAKE_DEADLINE_S)
        stream = secure.accept(sock, self._tls, timeout_s=deadline.left_s)
        try:
            with self._lock:
                self._connections[threading.current_thread()] = stream
            if self._closed.is_set():
                raise PeerLostError("the data plane is being closed")
            wire.greet_as_server(stream, token=self._token, deadline=deadline)
        except PeerError:
            stream.close()
            raise
        return stream

    def _answer(self, sock: Stream, request: ReadRequest) -> None:
        if request.nbytes > wire.READ_BYTES_MAX:
            _refuse(sock, request, Status.REFUSED, f"more than {wire.READ_BYTES_MAX} bytes in one read")
            return
        region_id, offset, nbytes = request.region_id, request.offset, request.nbytes
        try:
            memory = self._table.enter(region_id, request.epoch, offset, nbytes)
        except RegionFencedError as error:
            _refuse(sock, request, Status.FENCED, str(error))
            return
        try:
            with memory.view(offset, nbytes) as view:
                self._send(sock, request, view, self._sender(sock, request, memory))
        finally:
            self._table.leave(region_id)

    def _sender(self, sock: Stream, request: ReadRequest, memory: ReadableMemory) -> ReferenceSender | None:
        """How to send that range by reference; None where it has to be copied."""
        if request.nbytes < by_reference.NBYTES_MIN or not isinstance(sock, socket.socket):
            return None
        # By its name: asking isinstance of a protocol takes tens of microseconds.
        lasts = getattr(memory, "lasts", None)
        if lasts is None or not lasts(request.offset, request.nbytes):
            return None
        if sock not in self._senders:  # only this thread sets it
            sender = None
            with contextlib.suppress(OSError):
                sender = ReferenceSender(sock)
            with self._lock:
                self._senders[sock] = sender
        return self._senders[sock]

    def _send(
        self, sock: Stream, request: ReadRequest, view: memoryview, sender: ReferenceSender | None
    ) -> None:
        frame = ResponseHeader(status=Status.OK, request_id=request.request_id, nbytes=len(view)).pack()
        slice_bytes = SLICE_BYTES if self._limiter.limits else max(len(view), 1)
        if sender is not None:
            sock.sendall(frame, socket.MSG_MORE)
            frame = b""
        for start in range(0, max(len(view), 1), slice_bytes):
            part = view[start : start + slice_bytes]
            self._limiter.take(len(part), urgent=request.urgent)
            if sender is not None:
                sender.send(part, region_id=request.region_id)
                continue
            sent = sock.sendmsg([frame, part])  # one call: the second would cost as much as some 50 KiB
            if sent < len(frame) + len(part):
                sock.sendall(frame[sent:])
                sock.sendall(part[max(0, sent - len(frame)) :])
            frame = b""


def _refuse(sock: Stream, request: ReadRequest, status: Status, reason: str) -> None:
    text = reason.encode()[: wire.REASON_BYTES_MAX]
    header = ResponseHeader(status=status, request_id=request.request_id, nbytes=len(text))
    sock.sendall(header.pack() + text)


def connect(
    sock: socket.socket, address: str, *, token: bytes, deadline: Deadline, tls: Tls | None = None
) -> Stream:
    """Connect an unconnected socket of the right family and introduce both ends; the result replaces `sock`.

    Raises:
        PeerLostError: nobody answers there in time.
        PeerRefusedError: one end does not know the token or shows a wrong certificate, or `address` is none.
    """
    with wire.socket_errors(f"cannot reach {address}"):
        wire.tune(sock)
        deadline.apply(sock)
        sock.connect(wire.address_of(address))
        stream = secure.connect(sock, tls, timeout_s=deadline.left_s)
    try:
        wire.greet_as_client(stream, token=token, deadline=deadline)
    except PeerError:
        stream.close()
        raise
    return stream


def new_socket(address: str) -> socket.socket:
    """An unconnected TCP socket for `host:port`."""
    host, _ = wire.address_of(address)
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)


def read_region(
    address: str,
    *,
    token: bytes,
    region: RegionRef,
    deadline_s: float,
    urgent: bool = True,
    tls: Tls | None = None,
) -> bytearray:
    """Read a whole region of a peer.

    Raises:
        PeerLostError: the peer does not answer, dies, or is not done within `deadline_s`.
        PeerRefusedError: the peer says no, or does not know the token.
        RegionFencedError: the region is not readable there any more.
    """
    deadline = Deadline(deadline_s)
    data = bytearray(region.nbytes)
    with (
        new_socket(address) as unconnected,
        contextlib.closing(connect(unconnected, address, token=token, deadline=deadline, tls=tls)) as sock,
        wire.socket_errors(f"reading from {address} failed"),
    ):
        requests = [
            ReadRequest(
                request_id=number,
                region_id=region.region_id,
                epoch=region.epoch,
                offset=offset,
                nbytes=min(ONE_READ_BYTES, region.nbytes - offset),
                urgent=urgent,
            )
            for number, offset in enumerate(range(0, region.nbytes, ONE_READ_BYTES))
        ]
        deadline.apply(sock)
        sock.sendall(b"".join(request.pack() for request in requests))
        with memoryview(data) as view:
            for request in requests:
                part = view[request.offset : request.offset + request.nbytes]
                _receive_part(sock, request, part, deadline)
    return data


def _receive_part(sock: Stream, request: ReadRequest, part: memoryview, deadline: Deadline) -> None:
    header = ResponseHeader.unpack(wire.receive_bytes(sock, wire.RESPONSE_BYTES, deadline))
    if header.status is not Status.OK:
        raise refusal(header, wire.receive_bytes(sock, header.nbytes, deadline))
    if header.request_id != request.request_id or header.nbytes != len(part):
        raise PeerLostError("the peer answered something that was not asked")
    wire.receive_exactly(sock, part, deadline)


def refusal(header: ResponseHeader, reason: bytearray) -> AgentError:
    """The error that a response other than OK stands for."""
    text = reason.decode(errors="replace")
    return RegionFencedError(text) if header.status is Status.FENCED else PeerRefusedError(text)
