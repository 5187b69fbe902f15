"""The fast crc32 is zlib's, over every kind of memory, and parts combine to the whole."""

from __future__ import annotations

import zlib

from hypothesis import given
from hypothesis import strategies as st

from layercast_agent.crc32 import combine, crc32

SEED = bytes(range(256)) * 64  # 16 KiB: above the size from which the fast one is used


@given(st.binary(max_size=200), st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_it_is_zlibs(tail: bytes, skip: int, crc: int) -> None:
    data = (SEED + tail)[skip:]
    expected = zlib.crc32(data, crc)
    assert crc32(data, crc) == crc32(bytearray(data), crc) == crc32(memoryview(data), crc) == expected
    assert crc32(tail, crc) == zlib.crc32(tail, crc)


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_parts_combine_to_the_whole(first: bytes, second: bytes) -> None:
    assert combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_large_parts_combine_to_the_whole() -> None:
    half = SEED * 128
    assert combine(crc32(half), crc32(half), len(half)) == zlib.crc32(half * 2)
