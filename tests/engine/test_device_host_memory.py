"""Host memory of another process that a device reads directly; needs a CUDA device."""

from __future__ import annotations

import os
import random
import zlib
from typing import Any

import pytest
import torch

from layercast_agent import layout
from layercast_agent.arena import Arena
from layercast_agent.device import DeviceMemory, register_host_memory
from layercast_agent.layout import SegmentSpec
from layercast_agent.transfer_events import Chunk
from layercast_agent.transport.landing import Landing
from layercast_agent.transport.shm_link import ArenaMaps

NBYTES = 3 * 4096 + 5


def manifest_of(data: bytes) -> Any:
    """One segment of one chunk, and two of a byte."""
    sizes = [data, b"x", b"y"]
    segments = [
        SegmentSpec(
            index=index,
            name=layout.segment_name(index, 1),
            nbytes=len(content),
            tensors=(),
            chunk_crc32=(zlib.crc32(content),),
        )
        for index, content in enumerate(sizes)
    ]
    return layout.seal(segments=segments, dtype="float32", config={}, files={}, chunk_bytes=1 << 20)


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
        ),
    ],
)
def test_a_chunk_goes_from_the_mapped_arena_to_the_device(name: str) -> None:
    device = torch.device(name)
    data = random.Random(1).randbytes(NBYTES)
    arena = Arena(1 << 20)
    memory = arena.allocate(NBYTES, unit=1 << 20)
    memory.staging(0, NBYTES)[:] = data
    maps = ArenaMaps()
    maps.register = lambda address, nbytes: register_host_memory(address, nbytes, device)
    mapped = maps.open(arena.arena_id, arena.nbytes, os.dup(arena.reader_fd))
    assert mapped.problem == "", "the device cannot read memory that is mapped read-only"
    manifest = manifest_of(data)
    target = [DeviceMemory(segment.nbytes, device) for segment in manifest.segments]
    landing = Landing(manifest=manifest, memories=target)
    at = memory.locate(0, NBYTES)
    assert at is not None
    chunk = Chunk(segment=0, chunk=0)
    assert landing.copy_in(chunk, mapped.data[at : at + NBYTES], pinned=mapped.pinned)
    assert target[0].tensor.cpu().numpy().tobytes() == data
    memory.staging(0, 1)[0] ^= 1
    assert not landing.copy_in(chunk, mapped.data[at : at + NBYTES], pinned=mapped.pinned)
    arena.close()
