"""The data plane's bytes: frames of fixed size, and a handshake in which both ends prove the shared token.

    server -> client   magic, nonce S
    client -> server   nonce C, HMAC(token, "client" S C)
    server -> client   status, HMAC(token, "server" C S)          both know each other now
    client -> server   request: read [offset, offset + nbytes) of region (id, epoch)   any number, pipelined
    server -> client   response header, then the bytes or a sentence why not           in order of the requests

Integers are big-endian. With TLS all of this is inside it (`secure`); without, bytes are not encrypted, and the token
keeps strangers out of a network that is trusted not to listen. Exceptions of the socket library end here as
PeerLostError, refusals as PeerRefusedError.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from layercast_agent.errors import PeerLostError, PeerRefusedError
from layercast_agent.transport.secure import Stream

MAGIC = b"LCD2"
NONCE_BYTES = 32
MAC_BYTES = 32
READ_BYTES_MAX = 64 * 1024 * 1024  # one response; larger reads are several requests
REASON_BYTES_MAX = 1024
SOCKET_BUFFER_BYTES = 4 * 1024 * 1024
USER_TIMEOUT_MS = 5_000  # unacknowledged bytes, or a closed window, for this long: the peer is gone
KEEPALIVE_S = 2

_REQUEST = struct.Struct("!BBHIQQQQ")
# As long as a cache line: bytes behind it keep their alignment on both ends, without which copying costs a half more.
_RESPONSE = struct.Struct("!BBHIQ48x")
REQUEST_BYTES = _REQUEST.size
RESPONSE_BYTES = _RESPONSE.size
_KIND_READ = 1
_FLAG_URGENT = 1


class Status(IntEnum):
    """First byte of an answer."""

    OK = 0
    REFUSED = 1
    FENCED = 2


_STATUSES = frozenset(status.value for status in Status)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRequest:
    """Bytes [offset, offset + nbytes) of a region."""

    request_id: int  # 32 bits, comes back in the response
    region_id: int
    epoch: int
    offset: int
    nbytes: int
    urgent: bool = False

    def pack(self) -> bytes:
        """The frame."""
        flags = _FLAG_URGENT if self.urgent else 0
        return _REQUEST.pack(
            _KIND_READ, flags, 0, self.request_id, self.region_id, self.epoch, self.offset, self.nbytes
        )

    @staticmethod
    def unpack(frame: bytes | bytearray) -> ReadRequest:
        """PeerRefusedError for a frame that is no request."""
        kind, flags, zero, request_id, region_id, epoch, offset, nbytes = _REQUEST.unpack(frame)
        if kind != _KIND_READ or zero or flags & ~_FLAG_URGENT:
            raise PeerRefusedError("the peer sent a frame that is not a request")
        return ReadRequest(
            request_id=request_id,
            region_id=region_id,
            epoch=epoch,
            offset=offset,
            nbytes=nbytes,
            urgent=bool(flags & _FLAG_URGENT),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseHeader:
    """What follows: `nbytes` of the region, or of a sentence in UTF-8 when the status is not OK."""

    status: Status
    request_id: int
    nbytes: int

    def pack(self) -> bytes:
        """The frame."""
        return _RESPONSE.pack(self.status, 0, 0, self.request_id, self.nbytes)

    @staticmethod
    def unpack(frame: bytes | bytearray) -> ResponseHeader:
        """PeerRefusedError for a frame that is no response."""
        status, zero, zeros, request_id, nbytes = _RESPONSE.unpack(frame)
        if status not in _STATUSES or zero or zeros:
            raise PeerRefusedError("the peer sent a frame that is not a response")
        if status != Status.OK and nbytes > REASON_BYTES_MAX:
            raise PeerRefusedError("the peer refused with an endless reason")
        return ResponseHeader(status=Status(status), request_id=request_id, nbytes=nbytes)


class Deadline:
    """A moment before which a whole exchange must be over, whatever the number of its parts."""

    def __init__(self, seconds: float) -> None:
        """From now."""
        self._end = time.monotonic() + seconds
        self._seconds = seconds

    @property
    def left_s(self) -> float:
        """What is left; PeerLostError when nothing is."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise PeerLostError(f"the peer did not answer within {self._seconds:g} s")
        return left

    def apply(self, sock: socket.socket | Stream) -> None:
        """Let the next operation wait no longer than what is left; PeerLostError when nothing is."""
        sock.settimeout(self.left_s)


@contextlib.contextmanager
def socket_errors(what: str) -> Iterator[None]:
    """Turn errors of the socket library into PeerLostError."""
    try:
        yield
    except TimeoutError as error:
        raise PeerLostError(f"{what}: no answer in time") from error
    except OSError as error:
        raise PeerLostError(f"{what}: {error.strerror or error}") from error


def receive_exactly(sock: Stream, view: memoryview, deadline: Deadline | None = None) -> None:
    """Fill `view`. PeerLostError when the peer ends the stream before that; OSError as the socket says."""
    done = 0
    while done < len(view):
        if deadline is not None:
            deadline.apply(sock)
        # The kernel collects; waking the interpreter for every few packets costs more than receiving them.
        count = sock.recv_into(view[done:], 0, socket.MSG_WAITALL)
        if count == 0:
            raise PeerLostError("the peer closed the connection")
        done += count


def receive_in_turns(sock: Stream, turn_s: float) -> None:
    """Let `receive_turn` return after `turn_s` at the latest; for a socket without a timeout of Python's."""
    sock.setsockopt(
        socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", *divmod(int(turn_s * 1e6), 10**6))
    )


def receive_turn(sock: Stream, view: memoryview) -> int:
    """Fill `view`, or as much of it as comes within a turn: how many bytes. Errors as `receive_exactly`."""
    try:
        # The kernel collects; waking the interpreter for every few packets costs more than receiving them.
        count = sock.recv_into(view, 0, socket.MSG_WAITALL)
    except BlockingIOError:
        return 0
    if count == 0:
        raise PeerLostError("the peer closed the connection")
    return count


def receive_bytes(sock: Stream, nbytes: int, deadline: Deadline | None = None) -> bytearray:
    """`nbytes` bytes; errors as `receive_exactly`."""
    data = bytearray(nbytes)
    receive_exactly(sock, memoryview(data), deadline)
    return data


def address_of(text: str) -> tuple[str, int]:
    """(host, port) of `host:port`, brackets around an IPv6 host removed. PeerRefusedError when it is not that."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal():
        raise PeerRefusedError(f"{text!r} is not a data address")
    return host.strip("[]"), int(port)


def tune(sock: socket.socket) -> None:
    """Options of both ends; those that a kernel refuses are an optimisation lost and nothing more."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    wanted: list[tuple[int, str, int | bytes]] = [
        (socket.SOL_SOCKET, "SO_SNDBUF", SOCKET_BUFFER_BYTES),
        (socket.SOL_SOCKET, "SO_RCVBUF", SOCKET_BUFFER_BYTES),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", USER_TIMEOUT_MS),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", KEEPALIVE_S),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", KEEPALIVE_S),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", 2),
        # bbr, where it is the default, costs a third of the rate inside a node or a rack.
        (socket.IPPROTO_TCP, "TCP_CONGESTION", b"cubic"),
    ]
    for level, name, value in wanted:
        option = getattr(socket, name, None)
        if option is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(level, option, value)


def _mac(token: bytes, role: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.new(token, role + first + second, hashlib.sha256).digest()


def greet_as_server(sock: Stream, *, token: bytes, deadline: Deadline) -> None:
    """Prove the token to a client that proves it first. PeerRefusedError when it cannot."""
    with socket_errors("a client's handshake failed"):
        mine = secrets.token_bytes(NONCE_BYTES)
        deadline.apply(sock)
        sock.sendall(MAGIC + mine)
        answer = bytes(receive_bytes(sock, NONCE_BYTES + MAC_BYTES, deadline))
        theirs, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
        known = hmac.compare_digest(proof, _mac(token, b"client", mine, theirs))
        reply = _mac(token, b"server", theirs, mine) if known else bytes(MAC_BYTES)
        deadline.apply(sock)
        sock.sendall(bytes([Status.OK if known else Status.REFUSED]) + reply)
    if not known:
        raise PeerRefusedError("a client does not know the token")


def greet_as_client(sock: Stream, *, token: bytes, deadline: Deadline) -> None:
    """Prove the token to a server and have it prove it back. PeerRefusedError when one of them cannot."""
    with socket_errors("the handshake failed"):
        hello = bytes(receive_bytes(sock, len(MAGIC) + NONCE_BYTES, deadline))
        if hello[: len(MAGIC)] != MAGIC:
            raise PeerRefusedError("the peer speaks another protocol on its data port")
        theirs = hello[len(MAGIC) :]
        mine = secrets.token_bytes(NONCE_BYTES)
        deadline.apply(sock)
        sock.sendall(mine + _mac(token, b"client", theirs, mine))
        answer = bytes(receive_bytes(sock, 1 + MAC_BYTES, deadline))
    if answer[0] != Status.OK:
        raise PeerRefusedError("the peer refused the token")
    if not hmac.compare_digest(answer[1:], _mac(token, b"server", mine, theirs)):
        raise PeerRefusedError("the peer does not know the token")
