"""The fast crc32 is zlib's, over every kind of memory."""

from __future__ import annotations

import zlib

from hypothesis import given
from hypothesis import strategies as st

from layercast_agent.crc32 import crc32

SEED = bytes(range(256)) * 64  # 16 KiB: above the size from which the fast one is used


@given(st.binary(max_size=200), st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_it_is_zlibs(tail: bytes, skip: int, crc: int) -> None:
    data = (SEED + tail)[skip:]
    expected = zlib.crc32(data, crc)
    assert crc32(data, crc) == crc32(bytearray(data), crc) == crc32(memoryview(data), crc) == expected
    assert crc32(tail, crc) == zlib.crc32(tail, crc)
