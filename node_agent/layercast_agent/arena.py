"""The node's host memory for checkpoint copies: one shared-memory file, allocated once and never more.

Nothing of the data path allocates: `--host-pool-bytes` is all that host copies ever take, it is refused at the start
when the machine does not have it, and a copy that does not fit later is a clear error. The file (memfd) has no name
and ends with its last user; workers of the node map it read-only, by a descriptor that they are handed
(`transport.shm`).

Memory is given out in extents. A segment lies in one where there is a gap for it, else in several that are cut at
chunk boundaries: whatever was freed in whatever order, what fits by its sum fits.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from layercast_agent.errors import NoCapacityError

log = logging.getLogger(__name__)

ALIGN_BYTES = 4096
HUGE_BYTES = 2 * 1024 * 1024
TOUCH_STEP_BYTES = 32 * 1024 * 1024
MADV_POPULATE_WRITE = 23  # Linux 5.14; mmap has no name for it
MADV_HUGEPAGE = 14
FREE_HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [offset, offset + nbytes) of the arena."""

    offset: int
    nbytes: int


class ArenaMemory:
    """Memory of one segment inside the arena; see `regions.WritableMemory`."""

    in_place = True

    def __init__(self, arena: Arena, extents: tuple[Extent, ...], nbytes: int) -> None:
        self.arena = arena
        self.extents = extents
        self.nbytes = nbytes

    def view(self, offset: int, nbytes: int) -> memoryview:
        """The memory itself; joined in a copy when the range crosses extents, which chunks never do."""
        at = self.locate(offset, nbytes)
        if at is not None:
            return self.arena.data[at : at + nbytes]
        return memoryview(b"".join(bytes(part) for part in self._parts(offset, nbytes)))

    def lasts(self, offset: int, nbytes: int) -> bool:
        """Whether `view` is no copy."""
        return self.locate(offset, nbytes) is not None

    def staging(self, offset: int, nbytes: int) -> memoryview:
        """The memory itself: what is received is already in place."""
        if self.locate(offset, nbytes) is None:
            raise ValueError(f"bytes [{offset}, {offset + nbytes}) are not one chunk of this memory")
        return self.view(offset, nbytes)

    def commit(self, offset: int, nbytes: int, staged: memoryview) -> None:
        """Nothing is left to do; the staging is the memory."""

    def locate(self, offset: int, nbytes: int) -> int | None:
        """Where in the arena a range lies; None when it crosses extents."""
        if nbytes == 0:
            return 0
        for extent in self.extents:
            if offset < extent.nbytes:
                return extent.offset + offset if offset + nbytes <= extent.nbytes else None
            offset -= extent.nbytes
        return None

    def _parts(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        for extent in self.extents:
            start, stop = max(offset, 0), min(offset + nbytes, extent.nbytes)
            if start < stop:
                yield self.arena.data[extent.offset + start : extent.offset + stop]
            offset -= extent.nbytes


class Arena:
    """One shared-memory file of fixed size. Thread-safe."""

    def __init__(self, nbytes: int) -> None:
        """Reserves addresses only; `touch` takes the pages. NoCapacityError when the machine has not so much."""
        self.nbytes = nbytes // ALIGN_BYTES * ALIGN_BYTES
        self.arena_id = secrets.randbits(63)
        self._lock = threading.Lock()
        self._free = [Extent(0, self.nbytes)] if self.nbytes else []
        self._touched = 0
        self._closed = threading.Event()
        self._toucher: threading.Thread | None = None
        self.huge, self._fd = _open_memory(self.nbytes)
        # A second description of the same file: whoever is handed this one cannot map it writable.
        self.reader_fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        self._mapped = mmap.mmap(self._fd, self.nbytes) if self.nbytes else mmap.mmap(-1, 1)
        self.data = memoryview(self._mapped)

    @property
    def used_bytes(self) -> int:
        """Bytes given out."""
        with self._lock:
            return self.nbytes - sum(extent.nbytes for extent in self._free)

    @property
    def touched_bytes(self) -> int:
        """Bytes whose pages are there already."""
        return self._touched

    def allocate(self, nbytes: int, *, unit: int) -> ArenaMemory:
        """Memory that may be cut at multiples of `unit`. NoCapacityError when the free extents do not suffice."""
        with self._lock:
            extents = _choose(self._free, nbytes, unit)
            if extents is None:
                free = sum(extent.nbytes for extent in self._free)
                raise NoCapacityError(
                    f"the host pool has {free} of {self.nbytes} bytes free, {nbytes} are wanted"
                )
            for extent in extents:
                self._free = _without(self._free, _padded(extent))
        return ArenaMemory(self, tuple(extents), nbytes)

    def free(self, memory: ArenaMemory) -> None:
        """Takes memory back; its user must be done with it."""
        with self._lock:
            self._free = _joined([*self._free, *(_padded(extent) for extent in memory.extents)])
        memory.extents = ()

    def touch(self) -> None:
        """Takes all pages in the background, so that no transfer ever waits for the kernel to clear one."""
        self._toucher = threading.Thread(target=self._touch_all, name="touch", daemon=True)
        self._toucher.start()

    def close(self) -> None:
        """Gives the memory back once nobody maps it any more."""
        self._closed.set()
        if self._toucher is not None:
            self._toucher.join()
        for descriptor in (self._fd, self.reader_fd):
            os.close(descriptor)
        with contextlib.suppress(BufferError):  # a view that somebody still holds keeps the mapping
            self.data.release()
            self._mapped.close()

    def _touch_all(self) -> None:
        if not self.nbytes:
            return
        libc = ctypes.CDLL(None, use_errno=True)  # unlike mmap.madvise it lets other threads run meanwhile
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._mapped))
        madvise = libc.madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(base, self.nbytes, MADV_HUGEPAGE)  # where the kernel offers them for shared memory
        for start in range(0, self.nbytes, TOUCH_STEP_BYTES):
            step = min(TOUCH_STEP_BYTES, self.nbytes - start)
            if self._closed.is_set():
                return
            if madvise(base + start, step, MADV_POPULATE_WRITE):
                # EINVAL: an older kernel. Anything else: pages come at their first use, or not at all, and say so then.
                reason = os.strerror(ctypes.get_errno())
                log.warning("the host pool is not touched beforehand", extra={"reason": reason})
                return
            self._touched = start + step
        log.info("the host pool is ready", extra={"bytes": self.nbytes, "huge": self.huge})


def available_bytes() -> int:
    """Memory that a new user could get: the machine's, or less where a control group limits it."""
    available = 0
    for line in MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):  # no limit reads `max`
        limit = int((CGROUP / "memory.max").read_text())
        available = min(available, limit - int((CGROUP / "memory.current").read_text()))
    return max(available, 0)


def _open_memory(nbytes: int) -> tuple[bool, int]:
    """(in huge pages, descriptor) of a new memory file."""
    if nbytes and nbytes % HUGE_BYTES == 0 and _free_huge_bytes() >= nbytes:
        with contextlib.suppress(OSError):
            descriptor = os.memfd_create("layercast-host-pool", os.MFD_CLOEXEC | os.MFD_HUGETLB)
            os.ftruncate(descriptor, nbytes)
            return True, descriptor
    if nbytes > available_bytes():
        raise NoCapacityError(f"{nbytes} bytes are wanted, {available_bytes()} are available on this machine")
    try:
        descriptor = os.memfd_create("layercast-host-pool", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, nbytes)
    except OSError as error:
        raise NoCapacityError(f"shared memory is refused: {error.strerror or errno.errorcode}") from error
    return False, descriptor


def _free_huge_bytes() -> int:
    try:
        return int(FREE_HUGE_PAGES.read_text()) * HUGE_BYTES
    except (OSError, ValueError):
        return 0


def _round(nbytes: int) -> int:
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES


def _padded(extent: Extent) -> Extent:
    return Extent(extent.offset, _round(extent.nbytes))


def _choose(free: list[Extent], nbytes: int, unit: int) -> list[Extent] | None:
    """Extents for `nbytes`: the smallest gap that takes all, else gaps from the front, cut at `unit`; pure."""
    whole = [gap for gap in free if gap.nbytes >= _round(nbytes)]
    if whole or not nbytes:
        return [Extent(min(whole, key=lambda gap: gap.nbytes).offset, nbytes)] if nbytes else []
    chosen: list[Extent] = []
    for gap in free:
        at, left = gap.offset, gap.nbytes
        while nbytes and left:
            take = nbytes if _round(nbytes) <= left else left // unit * unit
            if unit % ALIGN_BYTES:  # such units are placed one by one, so that each extent starts at a page
                take = min(unit, nbytes) if _round(min(unit, nbytes)) <= left else 0
            if not take:
                break
            chosen.append(Extent(at, take))
            at, left, nbytes = at + _round(take), left - _round(take), nbytes - take
    return None if nbytes else chosen


def _without(free: list[Extent], taken: Extent) -> list[Extent]:
    left: list[Extent] = []
    for gap in free:
        if not gap.offset <= taken.offset < gap.offset + gap.nbytes:
            left.append(gap)
            continue
        before = Extent(gap.offset, taken.offset - gap.offset)
        end = taken.offset + taken.nbytes
        after = Extent(end, gap.offset + gap.nbytes - end)
        left += [part for part in (before, after) if part.nbytes]
    return left


def _joined(free: list[Extent]) -> list[Extent]:
    joined: list[Extent] = []
    for gap in sorted(free, key=lambda extent: extent.offset):
        if joined and joined[-1].offset + joined[-1].nbytes == gap.offset:
            joined[-1] = Extent(joined[-1].offset, joined[-1].nbytes + gap.nbytes)
        elif gap.nbytes:
            joined.append(gap)
    return joined
