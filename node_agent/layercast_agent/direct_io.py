"""Reads of packed files at the disk's speed: past the page cache into memory that is already there.

O_DIRECT saves the kernel's copy and keeps a checkpoint that is read once from pushing everything else out of memory.
It wants memory, offset and length at multiples of the disk's block; what does not fit (the last bytes of a file, odd
memory, a file system without it) is read through the page cache. So are ranges that are in the page cache anyway.
"""

from __future__ import annotations

import errno
import os
import threading
from bisect import bisect_right

import numpy as np

from layercast_agent.checkpoint_files import PackedCheckpoint
from layercast_agent.errors import CheckpointError
from layercast_agent.page_cache import cached_share

BLOCK_BYTES = 4096  # a multiple of every disk's logical block


class PackedReader:
    """Reads segments of one packed checkpoint. Thread-safe; files are opened when they are first read."""

    def __init__(self, packed: PackedCheckpoint, *, direct: bool = True) -> None:
        self._packed = packed
        self._direct = direct
        self._lock = threading.Lock()
        self._files: dict[tuple[int, bool], int] = {}
        self._closed = False

    def read(self, segment: int, offset: int, into: memoryview) -> None:
        """Fills `into` with the segment's bytes from `offset` on.

        CheckpointError, with file, tensor and offset, when the disk or the file has them no more.
        """
        done = 0
        try:
            if self._direct and self._aligned(into, offset) and not self._cached(segment, offset, len(into)):
                done = self._read_direct(segment, offset, into[: len(into) // BLOCK_BYTES * BLOCK_BYTES])
            self._fill(segment, offset + done, into[done:], direct=False)
        except OSError as error:
            raise self._problem(f"cannot be read: {error.strerror}", segment, offset) from error

    def cached_share(self, segment: int, mapped: memoryview, offset: int = 0) -> float:
        """How much of a mapped range of the segment is in memory."""
        start = self._packed.data_start(segment) + offset
        return cached_share(self._descriptor(segment, direct=False), start, mapped)

    def close(self) -> None:
        """Closes the files; nobody reads any more."""
        with self._lock:
            self._closed = True
            files, self._files = self._files, {}
        for descriptor in files.values():
            os.close(descriptor)

    def _aligned(self, into: memoryview, offset: int) -> bool:
        start = self._packed.data_start(0) + offset  # every segment's is a multiple of the block
        return start % BLOCK_BYTES == 0 and np.frombuffer(into, dtype=np.uint8).ctypes.data % BLOCK_BYTES == 0

    def _cached(self, segment: int, offset: int, nbytes: int) -> bool:
        with self._packed.view(segment, offset, nbytes) as mapped:
            return self.cached_share(segment, mapped, offset) == 1.0

    def _read_direct(self, segment: int, offset: int, into: memoryview) -> int:
        try:
            self._fill(segment, offset, into, direct=True)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self._direct = False  # this file system does not want it, or wants larger blocks
            return 0
        return len(into)

    def _fill(self, segment: int, offset: int, into: memoryview, *, direct: bool) -> None:
        if not len(into):
            return
        descriptor = self._descriptor(segment, direct=direct)
        start = self._packed.data_start(segment) + offset
        done = 0
        while done < len(into):
            count = os.preadv(descriptor, [into[done:]], start + done)
            if not count:
                raise self._problem("truncated: the file ends here", segment, offset + done)
            done += count

    def _descriptor(self, segment: int, *, direct: bool) -> int:
        with self._lock:
            known = self._files.get((segment, direct))
            if known is None:
                if self._closed:
                    raise OSError(errno.EBADF, "the reader was closed")
                flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
                known = self._files[segment, direct] = os.open(self._packed.path(segment), flags)
            return known

    def _problem(self, text: str, segment: int, offset: int) -> CheckpointError:
        tensors = self._packed.manifest.segments[segment].tensors
        with_offset = bisect_right([tensor.offset for tensor in tensors], offset)
        return CheckpointError(
            text,
            file=self._packed.path(segment),
            tensor=tensors[max(0, with_offset - 1)].name,
            offset_bytes=self._packed.data_start(segment) + offset,
        )
