"""Device memory as transfers and readers use it, and the checksum that a device computes over its own memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from layercast_agent import checksum
from layercast_agent.device import DeviceMemory, segment_checksum, slab_bytes, slab_of

DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES, ids=str)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every kind of device that this machine has."""
    found: torch.device = request.param
    return found


def test_a_slab_is_one_allocation(device: torch.device) -> None:
    sizes = [5000, 1, 4096]
    memories = slab_of(sizes, device)
    assert [memory.nbytes for memory in memories] == sizes
    starts = [memory.tensor.data_ptr() - memories[0].tensor.data_ptr() for memory in memories]
    assert starts == [0, 8192, 12288]
    assert slab_bytes(sizes) == 16384
    assert len({memory.tensor.untyped_storage().data_ptr() for memory in memories}) == 1
    for index, memory in enumerate(memories):
        memory.staging(0, 1)[0] = index + 1
        memory.commit(0, 1, memory.staging(0, 1) if device.type == "cpu" else memoryview(bytes([index + 1])))
    assert [memory.view(0, 1)[0] for memory in memories] == [1, 2, 3]


def test_staged_bytes_arrive(device: torch.device) -> None:
    memory = DeviceMemory(1000, device)
    payload = bytes(range(200))
    staged = memory.staging(300, 200)
    staged[:] = payload
    memory.commit(300, 200, staged)
    assert bytes(memory.view(300, 200)) == payload
    assert bytes(memory.view(310, 5)) == payload[10:15]
    assert bytes(memory.tensor[300:500].cpu().numpy()) == payload


def test_memory_becomes_parameters(device: torch.device) -> None:
    """A view into it, made before the bytes landed and inside inference mode, shows them."""
    with torch.inference_mode():
        memory = DeviceMemory(64, device)
        floats = memory.tensor[16:32].view(torch.float32)
    values = np.arange(4, dtype=np.float32)
    staged = memory.staging(16, 16)
    staged[:] = values.tobytes()
    memory.commit(16, 16, staged)
    assert floats.tolist() == values.tolist()


def test_cpu_memory_is_not_copied() -> None:
    memory = DeviceMemory(100, torch.device("cpu"))
    staged = memory.staging(10, 20)
    staged[0] = 7
    assert memory.view(10, 1)[0] == 7
    assert memory.tensor[10] == 7


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 5), (0, 101), (100, 1), (50, -1)])
def test_ranges_are_checked(device: torch.device, offset: int, nbytes: int) -> None:
    memory = DeviceMemory(100, device)
    with pytest.raises(ValueError, match="of 100"):
        memory.view(offset, nbytes)
    with pytest.raises(ValueError, match="of 100"):
        memory.staging(offset, nbytes)


@given(st.binary(min_size=0, max_size=3000))
@example(b"")
@example(b"\xff" * 1001)
def test_checksum_equals_the_host_one(data: bytes) -> None:
    tensor = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    )
    assert segment_checksum(tensor) == checksum.segment_checksum(data)


def test_checksum_of_many_blocks(device: torch.device) -> None:
    data = np.random.default_rng(0).integers(0, 256, 5_000_003, dtype=np.uint8)
    expected = checksum.segment_checksum(data.tobytes())
    tensor = torch.from_numpy(data).to(device)
    assert segment_checksum(tensor) == expected
    tensor[4_000_000] ^= 1
    assert segment_checksum(tensor) != expected


def test_checksum_sees_swapped_words() -> None:
    words = torch.tensor([1, 2, 3, 4], dtype=torch.int32)
    swapped = torch.tensor([1, 3, 2, 4], dtype=torch.int32)
    assert segment_checksum(words.view(torch.uint8)) != segment_checksum(swapped.view(torch.uint8))
