"""The yardstick: two plain sockets, each copying half of the bytes, with nothing checked and nobody asked.

What a data plane costs is measured against this in the same run, because absolute rates say more about the
machine than about the code. A second yardstick sums what came as the data plane does, and compares it with nothing:
where memory is slow, reading every byte once more costs more than all else that a data plane adds.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence

from layercast_agent.crc32 import crc32
from layercast_agent.layout import CHUNK_BYTES

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


def fetch(host: str, port: int, parts: Sequence[memoryview], *, summed: bool = False) -> None:
    """Fill `parts` from a `PlainServer` that has as many of the same sizes; `summed` takes the crc32 of each chunk."""

    def receive(stream: int) -> None:
        with _tuned(socket.socket()) as sock:
            sock.connect((host, port))
            sock.sendall(bytes([stream]))
            for part in _share(parts, stream):
                for start in range(0, len(part), CHUNK_BYTES):
                    _fill(sock, part[start : start + CHUNK_BYTES], summed=summed)

    _together(receive)


def _fill(sock: socket.socket, chunk: memoryview, *, summed: bool) -> None:
    done = 0
    while done < len(chunk):
        done += sock.recv_into(chunk[done:])
    if summed:
        crc32(chunk)
