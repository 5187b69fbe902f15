"""TLS under the data plane: a socket's few calls, over a connection that one thread reads while another writes.

OpenSSL does not allow that on one connection, so each call to it is short, does not block and holds a lock; waiting
happens outside. The calls mean what they mean for a socket, `MSG_WAITALL` and the two time-outs included.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from layercast_agent.errors import PeerRefusedError
from layercast_agent.tls import AGENT, Tls, names_of

WRITE_BYTES = 64 * 1024  # encrypted under the lock: how long a reader may have to wait


class Stream(Protocol):
    """What the data plane uses of a connection; a `socket.socket` is one."""

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int:
        """As the socket's."""

    def sendall(self, data: bytes | memoryview, flags: int = 0, /) -> None:
        """As the socket's."""

    def sendmsg(self, buffers: Sequence[bytes | memoryview], /) -> int:
        """As the socket's."""

    def settimeout(self, value: float | None, /) -> None:
        """As the socket's."""

    def setsockopt(self, level: int, optname: int, value: bytes, /) -> None:
        """As the socket's."""

    def shutdown(self, how: int, /) -> None:
        """As the socket's; may come from another thread."""

    def close(self) -> None:
        """As the socket's."""


class SecureStream:
    """A `Stream` over TLS, after its handshake."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        sock.setblocking(False)
        self._ssl = sock
        self._lock = threading.Lock()
        self._timeout_s: float | None = None
        self._turns_s: dict[int, float | None] = {socket.SO_RCVTIMEO: None, socket.SO_SNDTIMEO: None}

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int:
        """With MSG_WAITALL fills the buffer, or as much as comes in time; BlockingIOError for nothing at all."""
        end = self._end(socket.SO_RCVTIMEO)
        done = 0
        while done < len(buffer):
            try:
                with self._lock:
                    count = self._ssl.recv_into(buffer[done:])
            except ssl.SSLWantReadError:
                if self._wait(select.POLLIN, end):
                    continue
                if not done:
                    self._out_of_time()
                break
            done += count
            if not count or not flags & socket.MSG_WAITALL:
                break
        return done

    def sendall(self, data: bytes | memoryview, flags: int = 0, /) -> None:
        """Sends everything; TimeoutError or BlockingIOError when it does not move."""
        left = memoryview(data).cast("B")
        end = self._end(socket.SO_SNDTIMEO)
        while left:
            try:
                with self._lock:
                    left = left[self._ssl.send(left[:WRITE_BYTES]) :]
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError) as wanted:
                event = select.POLLOUT if isinstance(wanted, ssl.SSLWantWriteError) else select.POLLIN
                if not self._wait(event, end):
                    self._out_of_time()

    def sendmsg(self, buffers: Sequence[bytes | memoryview], /) -> int:
        """Sends all buffers."""
        for buffer in buffers:
            self.sendall(buffer)
        return sum(len(buffer) for buffer in buffers)

    def settimeout(self, value: float | None, /) -> None:
        """For each call that follows."""
        self._timeout_s = value

    def setsockopt(self, level: int, optname: int, value: bytes, /) -> None:
        """The two time-outs are kept here, where the waiting is."""
        if level == socket.SOL_SOCKET and optname in self._turns_s:
            seconds, microseconds = struct.unpack("ll", value)
            self._turns_s[optname] = seconds + microseconds / 1e6
        else:
            self._ssl.setsockopt(level, optname, value)

    def shutdown(self, how: int, /) -> None:
        """Of the connection below, which wakes whoever waits in it."""
        socket.socket.shutdown(self._ssl, how)

    def close(self) -> None:
        """Without a word: what matters is checked above TLS."""
        self._ssl.close()

    def _end(self, option: int) -> float | None:
        seconds = self._timeout_s if self._timeout_s is not None else self._turns_s[option]
        return None if seconds is None else time.monotonic() + seconds

    def _wait(self, event: int, end: float | None) -> bool:
        poll = select.poll()
        poll.register(self._ssl, event)
        left_ms = None if end is None else max(0.0, end - time.monotonic()) * 1000
        return bool(poll.poll(left_ms))

    def _out_of_time(self) -> None:
        raise TimeoutError("timed out") if self._timeout_s is not None else BlockingIOError("timed out")


def accept(sock: socket.socket, tls: Tls | None, *, timeout_s: float) -> Stream:
    """The server's end, once the client has shown that it is an agent. PeerRefusedError, OSError."""
    return sock if tls is None else _shaken(sock, tls.server_context(), None, timeout_s)


def connect(sock: socket.socket, tls: Tls | None, *, timeout_s: float) -> Stream:
    """The client's end, once the server has shown that it is an agent. PeerRefusedError, OSError."""
    return sock if tls is None else _shaken(sock, tls.client_context(), AGENT, timeout_s)


def _shaken(sock: socket.socket, context: ssl.SSLContext, server: str | None, timeout_s: float) -> Stream:
    sock.settimeout(timeout_s)
    try:
        secured = context.wrap_socket(sock, server_side=server is None, server_hostname=server)
    except ssl.SSLError as error:
        raise PeerRefusedError(f"the TLS handshake failed: {error.reason or error}") from error
    if AGENT not in names_of(secured.getpeercert()):
        with contextlib.suppress(OSError):
            secured.close()
        raise PeerRefusedError(f"the peer's certificate does not name {AGENT}")
    return SecureStream(secured)
