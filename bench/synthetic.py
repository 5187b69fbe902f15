"""A checkpoint of random bytes with an honest manifest: transfers care for bytes, not for what they mean."""

from __future__ import annotations

import random
import zlib
from dataclasses import replace

from layercast_agent import layout
from layercast_agent.layout import CHUNK_BYTES, Manifest, SegmentSpec

SEGMENTS = 8
COLUMNS = 4096


def make(nbytes: int) -> tuple[Manifest, list[bytearray]]:
    """Manifest and content, in `SEGMENTS` equal segments of one F32 matrix each."""
    rows = nbytes // SEGMENTS // COLUMNS // 4
    layers = SEGMENTS - 2
    names = [
        "model.embed_tokens.weight",
        *(f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(layers)),
        "lm_head.weight",
    ]
    planned = layout.plan_segments(dict.fromkeys(names, ("F32", (rows, COLUMNS))), layers)
    rng = random.Random(0)
    data = [bytearray(rng.randbytes(segment.nbytes)) for segment in planned]
    segments = [_with_checksums(segment, content) for segment, content in zip(planned, data, strict=True)]
    return layout.seal(segments=segments, dtype="float32", config={}, files={}), data


def _with_checksums(segment: SegmentSpec, content: bytearray) -> SegmentSpec:
    whole = memoryview(content)
    crcs = [zlib.crc32(whole[at : at + CHUNK_BYTES]) for at in range(0, len(whole), CHUNK_BYTES)]
    return replace(segment, chunk_crc32=tuple(crcs))


def verified(manifest: Manifest, segment: int, content: memoryview) -> bool:
    """Whether a segment's bytes are the manifest's."""
    expected = manifest.segments[segment].chunk_crc32
    starts = range(0, len(content), manifest.chunk_bytes)
    return expected == tuple(zlib.crc32(content[at : at + manifest.chunk_bytes]) for at in starts)
