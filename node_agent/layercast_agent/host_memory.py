"""Host memory that disks and devices can write to at full speed: page-aligned, in huge pages, touched before use.

The first touch of fresh memory can cost the kernel as much as a disk needs to fill it (1 GB/s was seen on a virtual
machine), so a worker touches a reserve while nobody waits, and loads land in it. Whoever has such memory for other
reasons (a pinned arena) hands it to `device.DeviceMemory` in the same way.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading

import numpy as np

HUGE_BYTES = 2 * 1024 * 1024
TOUCH_BYTES = 64 * 1024 * 1024  # touched at once
MADV_POPULATE_WRITE = 23  # Linux 5.14; an older kernel refuses, and pages are touched by their first use

_libc = ctypes.CDLL(None, use_errno=True)


def allocate(nbytes: int) -> memoryview:
    """Fresh private memory, zeroed, page-aligned, in huge pages where the kernel has them; freed with its last view."""
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= HUGE_BYTES:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:nbytes]


class Reserve:
    """`nbytes` of host memory that are touched in the background and then lent out, again and again. Thread-safe.

    Used by one replica at a time: `take` hands out piece after piece, `reset` takes all of them back.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._memory = allocate(nbytes)
        self._lock = threading.Lock()
        self._taken_bytes = 0
        self._thread = threading.Thread(target=self._touch, name="reserve", daemon=True)
        self._thread.start()

    def wait_touched(self, deadline_s: float) -> bool:
        """Whether all of it was touched within the time."""
        self._thread.join(deadline_s)
        return not self._thread.is_alive()

    def take(self, nbytes: int) -> memoryview | None:
        """The next `nbytes`, page-aligned, with whatever was there before; None when so much is not left."""
        with self._lock:
            start = self._taken_bytes
            end = start + -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
            if start + nbytes > self.nbytes:
                return None
            self._taken_bytes = end
            return self._memory[start : start + nbytes]

    def reset(self) -> None:
        """All that was taken may be taken again: nobody reads or writes it any more."""
        with self._lock:
            self._taken_bytes = 0

    def _touch(self) -> None:
        # Populating keeps what is there, so it may go on while pieces are taken and filled.
        address = np.frombuffer(self._memory, dtype=np.uint8).ctypes.data
        for start in range(0, self.nbytes, TOUCH_BYTES):
            nbytes = min(TOUCH_BYTES, self.nbytes - start)
            _libc.madvise(ctypes.c_void_p(address + start), ctypes.c_size_t(nbytes), MADV_POPULATE_WRITE)
