"""The yardstick: two plain sockets, each copying half of the bytes, with nothing checked and nobody asked.

What a data plane costs is measured against this in the same run, because absolute rates say more about the
machine than about the code.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence

STREAMS = 2
BUFFER_BYTES = 4 * 1024 * 1024


def _tuned(sock: socket.socket) -> socket.socket:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
    return sock


def _share(parts: Sequence[memoryview], stream: int) -> Sequence[memoryview]:
    half = len(parts) // STREAMS
    return parts[stream * half : (stream + 1) * half]


def _together(work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(stream,)) for stream in range(STREAMS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class PlainServer:
    """Sends its parts to whoever connects: the first byte of a connection names the stream."""

    def __init__(self, host: str, parts: Sequence[memoryview]) -> None:
        self._parts = parts
        self._listener = _tuned(socket.create_server((host, 0)))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, name="plain-accept", daemon=True).start()

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            threading.Thread(target=self._send, args=(sock,), name="plain", daemon=True).start()

    def _send(self, sock: socket.socket) -> None:
        with _tuned(sock):
            for part in _share(self._parts, sock.recv(1)[0]):
                sock.sendall(part)


def fetch(host: str, port: int, parts: Sequence[memoryview]) -> None:
    """Fill `parts` from a `PlainServer` that has as many of the same sizes."""

    def receive(stream: int) -> None:
        with _tuned(socket.socket()) as sock:
            sock.connect((host, port))
            sock.sendall(bytes([stream]))
            for part in _share(parts, stream):
                done = 0
                while done < len(part):
                    done += sock.recv_into(part[done:])

    _together(receive)
