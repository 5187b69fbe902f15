"""Where incoming chunks land: staged, compared with the manifest, and only then committed.

Every transport ends here, so no byte becomes visible to the engine or to a downstream peer without having
been checked, wherever it came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from layercast_agent.copying import copy_bytes
from layercast_agent.crc32 import crc32
from layercast_agent.layout import Manifest
from layercast_agent.regions import AdoptingMemory, WritableMemory
from layercast_agent.transfer_events import Chunk


class Landing:
    """The memory of one target, seen as chunks. Safe for several threads on different chunks."""

    def __init__(self, *, manifest: Manifest, memories: Sequence[WritableMemory]) -> None:
        """One memory a segment, in the manifest's order, each of the segment's size; else ValueError."""
        sizes = [segment.nbytes for segment in manifest.segments]
        if [memory.nbytes for memory in memories] != sizes:
            raise ValueError("memories do not have the sizes of the manifest's segments")
        self._manifest = manifest
        self._memories = memories

    def range_of(self, chunk: Chunk) -> tuple[int, int]:
        """(offset, bytes) inside the chunk's segment."""
        return self._manifest.chunk_range(chunk.segment, chunk.chunk)

    def in_place(self, segment: int) -> bool:
        """Whether what is staged for the segment lies where it will stay."""
        return self._memories[segment].in_place

    def staging(self, chunk: Chunk) -> memoryview:
        """Where to receive a chunk. What is there stays invisible until `settle`."""
        return self._memories[chunk.segment].staging(*self.range_of(chunk))

    def settle(self, chunk: Chunk, staged: memoryview) -> bool:
        """Commit received bytes if they are right; False when they do not match the manifest."""
        if not self._matches(chunk, staged):
            return False
        self._memories[chunk.segment].commit(*self.range_of(chunk), staged)
        return True

    def copy_in(self, chunk: Chunk, source: memoryview, *, pinned: bool = False) -> bool:
        """Commit a copy of `source` if it is right; False when it does not match the manifest.

        `pinned` says that a device can read the source directly. The chunk is summed and then copied as a whole, with
        the interpreter lock free both times: slices that fit a smaller cache wait for that lock more than they save.
        """
        memory = self._memories[chunk.segment]
        if pinned and not memory.in_place:
            return self.settle(chunk, source)
        if not self._matches(chunk, source):
            return False
        staged = self.staging(chunk)
        copy_bytes(staged, source)
        memory.commit(*self.range_of(chunk), staged)
        return True

    def may_adopt(self, segment: int) -> bool:
        """Whether the segment's memory can become a mapped file instead of being filled."""
        # By its name: asking isinstance of a protocol takes a hundred microseconds, of each segment.
        return bool(getattr(self._memories[segment], "adopts", False))

    def adopt(self, segment: int, source: memoryview) -> None:
        """Make `source`, all of a segment's verified bytes, its memory; only where `may_adopt`."""
        cast(AdoptingMemory, self._memories[segment]).adopt(source)

    def _matches(self, chunk: Chunk, data: memoryview) -> bool:
        expected = self._manifest.segments[chunk.segment].chunk_crc32[chunk.chunk]
        return len(data) == self.range_of(chunk)[1] and crc32(data) == expected
