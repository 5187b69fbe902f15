"""The segment checksum equals its definition, however the bytes are cut, and notices what it is for."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layercast_agent import device
from layercast_agent.checksum import SegmentChecksum, segment_checksum

# Machines are shared: how long one example takes says nothing.
relaxed = settings(deadline=None, max_examples=60)


def definition(data: bytes) -> int:
    padded = data + b"\0" * (-len(data) % 8)
    words = [int.from_bytes(padded[i : i + 4], "little") for i in range(0, len(padded), 4)]
    s1 = sum(words) % 2**32
    s2 = sum((i + 1) * word for i, word in enumerate(words)) % 2**32
    return s2 << 32 | s1


@relaxed
@given(st.binary(max_size=200))
def test_it_is_its_definition(data: bytes) -> None:
    assert segment_checksum(data) == definition(data)


def test_large_data_wraps_as_the_definition_does() -> None:
    data = np.full(3 * 65536 + 17, 0xFFFF_FFFF, dtype="<u4").tobytes() + b"\xff\xfe\xfd"
    assert segment_checksum(data) == definition(data)


@relaxed
@given(st.binary(min_size=1, max_size=400), st.lists(st.integers(0, 100), max_size=4))
def test_updates_may_be_cut_anywhere_at_words(data: bytes, cuts: list[int]) -> None:
    checksum = SegmentChecksum()
    position = 0
    for cut in sorted(cuts):
        end = min(4 * cut, len(data) // 4 * 4)
        checksum.update(data[position:end])
        position = max(position, end)
    checksum.update(data[position:])
    assert checksum.value == segment_checksum(data)


def test_swapped_and_lost_ranges_are_noticed() -> None:
    first, second = bytes(range(64)), bytes(range(64, 128))
    assert segment_checksum(first + second) != segment_checksum(second + first)
    assert segment_checksum(first + bytes(64) + second) != segment_checksum(first + second + bytes(64))


@relaxed
@given(st.binary(min_size=1, max_size=300))
def test_a_device_computes_the_same(data: bytes) -> None:
    assert device.segment_checksum(torch.frombuffer(bytearray(data), dtype=torch.uint8)) == segment_checksum(
        data
    )


def test_a_device_computes_the_same_over_many_blocks() -> None:
    data = np.random.default_rng(5).bytes(3 * (1 << 20) + 13)
    assert device.segment_checksum(torch.frombuffer(bytearray(data), dtype=torch.uint8)) == segment_checksum(
        data
    )
