"""The checksum of a whole segment, in the form that a device can compute over its own memory.

Over the bytes, padded with zeros to a multiple of 8, as little-endian 32-bit words w_0, w_1, ...:
s1 = sum of w_i, s2 = sum of (i + 1) * w_i, both modulo 2^32; the value is s2 << 32 | s1. It is Fletcher's idea
with sums that have no order of evaluation, so any number of threads may share the work. It finds lost, swapped
and overwritten ranges; single chunks are guarded by their crc32 before. `device.segment_checksum` is the same for
a tensor.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_BLOCK_WORDS = 1 << 16  # keeps the 64-bit intermediates inside the cache
_MASK = 0xFFFF_FFFF
_POSITIONS: npt.NDArray[np.uint64] = np.arange(1, _BLOCK_WORDS + 1, dtype=np.uint64)


class SegmentChecksum:
    """Running checksum. Every update but the last must be a multiple of 4 bytes."""

    def __init__(self) -> None:
        self._s1 = 0
        self._s2 = 0
        self._words = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Adds the next bytes of the segment."""
        whole = len(data) // 4 * 4
        words = np.frombuffer(data, dtype="<u4", count=whole // 4)
        for start in range(0, len(words), _BLOCK_WORDS):
            self._add(words[start : start + _BLOCK_WORDS])
        if whole < len(data):
            tail = bytes(data[whole:]).ljust(4, b"\0")
            self._add(np.frombuffer(tail, dtype="<u4"))

    @property
    def value(self) -> int:
        """The checksum of what was added so far."""
        return self._s2 << 32 | self._s1

    def _add(self, words: npt.NDArray[np.uint32]) -> None:
        # Sums wrap modulo 2^64, of which 2^32 is a divisor: nothing is lost.
        wide = words.astype(np.uint64)
        s1 = int(wide.sum()) & _MASK
        s2 = int(np.dot(wide, _POSITIONS[: len(wide)])) + self._words * s1
        self._s1 = (self._s1 + s1) & _MASK
        self._s2 = (self._s2 + s2) & _MASK
        self._words += len(wide)


def segment_checksum(data: bytes | bytearray | memoryview) -> int:
    """The checksum of a segment that lies in memory as a whole."""
    checksum = SegmentChecksum()
    checksum.update(data)
    return checksum.value
