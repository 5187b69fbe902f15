"""Sends parameters by reference: the kernel takes the pages of memory that lasts, and the sender copies nothing.

`vmsplice` puts references to pages into a pipe and `splice` moves them from there into the socket; both work on any
host memory (a worker's slab, the agent's arena, a mapped file). The pages are read when the network card sends them,
or, inside one machine, when the receiver takes them. So

* only memory that `regions.LastingMemory` vouches for goes this way: parameters, which nobody writes while a region
  names them. The state of requests is copied, as anything small is;
* `lent` says whether bytes of a region have not been acknowledged yet, and `RegionTable.remove` waits for that;
* a connection that ends drops what it has not sent, instead of sending it from memory that means something else;
* what is left, a receiver on this machine that was acknowledged and has not read yet, finds a wrong checksum.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import socket
import struct
import termios
import threading

import numpy as np

from layercast_agent.errors import PeerLostError

NBYTES_MIN = 64 * 1024
"""Below this a copy costs less than the calls."""

PIPE_BYTES = 1024 * 1024  # what an unprivileged process may ask for
PIPE_BYTES_MIN = 256 * 1024  # with less a copy costs as little
SPLICE_F_MORE = 4

_libc = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("address", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


def _vmsplice(pipe: int, address: int, nbytes: int) -> int:
    """How many bytes the pipe took by reference. OSError; the interpreter's lock is free meanwhile."""
    taken: int = _libc.vmsplice(pipe, _Range(address, nbytes), 1, 0)
    if taken <= 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return taken


@functools.cache
def _supported() -> bool:
    """Whether this kernel, and whatever filters its calls, lets us."""
    if not hasattr(_libc, "vmsplice") or not hasattr(os, "splice"):
        return False
    _libc.vmsplice.argtypes = (ctypes.c_int, ctypes.POINTER(_Range), ctypes.c_size_t, ctypes.c_uint)
    _libc.vmsplice.restype = ctypes.c_ssize_t
    page = np.zeros(4096, np.uint8)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        return _vmsplice(writer, page.ctypes.data, page.nbytes) == page.nbytes
    except OSError:
        return False
    finally:
        os.close(reader)
        os.close(writer)


class ReferenceSender:
    """One connection's way to send by reference. One thread sends; any may ask what is `lent`."""

    def __init__(self, sock: socket.socket) -> None:
        """Takes a pipe. OSError: none is to be had, or too small a one; then copies are the better way."""
        if not _supported():
            raise OSError("this kernel does not take pages by reference")
        self._socket = sock
        self._lock = threading.Lock()
        self._closed = False
        self._sent_bytes = 0  # by reference; what else went this way only makes `lent` more careful
        self._ends: dict[int, int] = {}  # region id -> `_sent_bytes` behind its last byte
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC)
        try:
            # Users have a quota of such pages. Beyond it this is refused, or the pipe is small from the start.
            self._pipe_bytes: int = fcntl.fcntl(self._writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            self._pipe_bytes = fcntl.fcntl(self._writer, fcntl.F_GETPIPE_SZ)
        if self._pipe_bytes < PIPE_BYTES_MIN:
            self._close_pipe()
            raise OSError(f"a pipe of {self._pipe_bytes} bytes is too small")

    def send(self, view: memoryview, *, region_id: int) -> None:
        """Send bytes of a region, which must last. Errors and time-outs are the socket's; then the stream is broken."""
        address = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
        with self._lock:  # before the first byte leaves
            self._ends[region_id] = self._sent_bytes + len(view)
        done = 0
        while done < len(view):
            piped = _vmsplice(self._writer, address + done, min(self._pipe_bytes, len(view) - done))
            done += piped
            while piped:
                more = SPLICE_F_MORE if done < len(view) else 0
                moved = os.splice(self._reader, self._socket.fileno(), piped, flags=more)
                if not moved:
                    raise PeerLostError("the connection takes no more")
                piped -= moved
                self._sent_bytes += moved

    def lent(self, region_id: int) -> bool:
        """Whether bytes of that region, which nobody sends any more, are not all acknowledged by the other end."""
        with self._lock:
            end = self._ends.get(region_id)
            if end is None or self._closed:
                return False
            # Counted first: what is sent after that only makes the difference smaller than it is.
            sent = self._sent_bytes
            waiting: int = struct.unpack("i", fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, bytes(4)))[
                0
            ]
            if sent - waiting < end:
                return True
            del self._ends[region_id]
            return False

    def close(self) -> None:
        """Ends the connection at once, without the bytes that were not sent yet."""
        with self._lock:
            self._closed = True
            with contextlib.suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._socket.close()
            self._close_pipe()

    def _close_pipe(self) -> None:
        os.close(self._reader)
        os.close(self._writer)
