"""What the kernel keeps of a file in memory, and whether it was verified since the machine started.

A packed file whose pages are all in memory can be used as it lies there, which costs no copy and no new memory
(docs/adr/0008). Reading each byte again to verify it would cost more than everything else of such a load, so the
result of the last verification is kept with the file, as an extended attribute. It counts only for the same inode,
size and time of change and the same start of the machine: whatever replaces or changes the file takes it away, and
after a restart, when all pages come from the disk again, they are verified again.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np

CACHESTAT = 451  # the same number on every architecture
MADV_POPULATE_READ = 22  # Linux 5.14
FAULT_AROUND_BYTES = 64 * 1024  # how many the kernel enters at once, unless somebody changed it
VERIFIED_ATTRIBUTE = "user.layercast.verified"

_libc = ctypes.CDLL(None, use_errno=True)


class _CacheStatus(ctypes.Structure):
    """struct cachestat of Linux 6.5."""

    _fields_: ClassVar = [
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "writing", "evicted", "recent")
    ]


def cached_share(descriptor: int, offset: int, mapped: memoryview) -> float:
    """How much of a range of a file is in memory, by pages: 1.0 is all of it. `mapped` is the range in our memory.

    cachestat looks at whole folios, where mincore looks up every page (16 ms a GB), so mincore is for older kernels. It
    tells of files that we own or may write; of others it says all, and touching them reads them.
    """
    first, nbytes = _pages(mapped)
    page_count = -(-nbytes // mmap.PAGESIZE)
    wanted = (ctypes.c_uint64 * 2)(offset, len(mapped))
    status = _CacheStatus()
    answer = _libc.syscall(
        ctypes.c_long(CACHESTAT), ctypes.c_uint(descriptor), ctypes.byref(wanted), ctypes.byref(status), 0
    )
    if answer == 0:
        return float(min(1.0, status.cached / page_count))
    pages = np.zeros(page_count, dtype=np.uint8)
    answer = _libc.mincore(
        ctypes.c_void_p(first), ctypes.c_size_t(nbytes), ctypes.c_void_p(pages.ctypes.data)
    )
    return float(np.count_nonzero(pages & 1) / page_count) if answer == 0 else 0.0


def bring_in(mapped: memoryview, *, share: float) -> bool:
    """Read what is not in memory, and enter all pages into our page table, so that the first use finds them there.

    `share` of them are there already. False when the disk cannot give the others. One call without the interpreter
    lock; older kernels enter pages when they are touched, which takes several times as long, and an error of the disk
    then kills the process.
    """
    first, nbytes = _pages(mapped)
    if share < 1.0:  # it looks every page up, which for a whole file takes longer than entering them
        _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(nbytes), mmap.MADV_WILLNEED)
    if _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(nbytes), MADV_POPULATE_READ) == 0:
        return True
    if ctypes.get_errno() != errno.EINVAL:
        return False
    data = np.frombuffer(mapped, dtype=np.uint8)
    int(data[::FAULT_AROUND_BYTES].sum()) + int(data[-1])  # the kernel enters the neighbours of each page too
    return True


def _pages(mapped: memoryview) -> tuple[int, int]:
    """Address and size of a range, from a page's start on."""
    address = np.frombuffer(mapped, dtype=np.uint8).ctypes.data
    first = address // mmap.PAGESIZE * mmap.PAGESIZE
    return first, address + len(mapped) - first


def remember_verified(file: Path, checksum: int) -> None:
    """Say that every byte of the file is right; `checksum` is that of its segment.

    Where the file system keeps no attributes nothing is remembered, and the file is verified each time.
    """
    try:
        os.setxattr(file, VERIFIED_ATTRIBUTE, _stamp(file, checksum))
    except OSError:
        return


def was_verified(file: Path, checksum: int) -> bool:
    """Whether `remember_verified` was called for this very content since the machine started."""
    try:
        return os.getxattr(file, VERIFIED_ATTRIBUTE) == _stamp(file, checksum)
    except OSError:
        return False


def _stamp(file: Path, checksum: int) -> bytes:
    found = file.stat()
    return f"{_boot_id()} {found.st_ino} {found.st_size} {found.st_mtime_ns} {checksum:x}".encode()


@cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
