"""Checkpoints of random bytes: what transfers are tested with, since they care for bytes and not for tensors.

Equal arguments give equal bytes, so two processes agree on a checkpoint by its numbers.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from layercast_agent import layout
from layercast_agent.layout import Manifest, SegmentSpec
from layercast_agent.regions import HostMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A manifest and the bytes that it describes, one item a segment."""

    manifest: Manifest
    data: tuple[bytes, ...]

    def memories(self) -> list[HostMemory]:
        """Memory that holds it."""
        return [HostMemory(bytearray(segment)) for segment in self.data]

    def empty_memories(self) -> list[HostMemory]:
        """Memory that it fits into."""
        return [HostMemory(len(segment)) for segment in self.data]

    def held_by(self, memories: Sequence[HostMemory]) -> bool:
        """Whether these memories hold it, byte for byte."""
        return all(m.view(0, m.nbytes) == d for m, d in zip(memories, self.data, strict=True))


def make(sizes: Sequence[int], *, chunk_bytes: int, seed: int = 0) -> Checkpoint:
    """A checkpoint with one segment of each size: embed, layers, head."""
    rng = random.Random(seed)
    data = tuple(rng.randbytes(size) for size in sizes)
    segments = [
        SegmentSpec(
            index=index,
            name=layout.segment_name(index, len(sizes) - 2),
            nbytes=len(segment),
            tensors=(),
            chunk_crc32=tuple(
                zlib.crc32(segment[offset : offset + chunk_bytes])
                for offset in range(0, len(segment), chunk_bytes)
            ),
        )
        for index, segment in enumerate(data)
    ]
    manifest = layout.seal(segments=segments, dtype="float32", config={}, files={}, chunk_bytes=chunk_bytes)
    return Checkpoint(manifest=manifest, data=data)
