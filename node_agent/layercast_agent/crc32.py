"""zlib's crc32 by the fastest implementation at hand: every chunk is checked where it arrives, on the data path.

zlib's own does 2-4 GB/s a core, less than a warm file or a fast network brings; libdeflate computes the same number
with wide carry-less multiplication at 20 and more (ISA-L: 10 where there is no AVX-512). Its Python binding keeps
the interpreter lock while it sums, so its C function is called directly. `combine` lets several threads share one
chunk.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import zlib
from collections.abc import Callable

import numpy as np

SMALL_BYTES = 16 * 1024
"""Below this, zlib's is done before a foreign call has begun."""


def _libdeflate() -> Callable[[int, int, int], int] | None:
    """`libdeflate_crc32(crc, address, bytes)` of the wheel `deflate`; None where there is none."""
    try:
        library = ctypes.CDLL(importlib.import_module("deflate._deflate").__file__)
        function = library.libdeflate_crc32
    except (ImportError, OSError, AttributeError):
        return None
    function.restype = ctypes.c_uint32
    function.argtypes = (ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t)
    return function


_fast = _libdeflate()
CRC32_BY = "zlib" if _fast is None else "libdeflate"
"""Whose implementation it is."""


def crc32(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """As zlib's; releases the interpreter lock while it sums."""
    if _fast is None or len(data) < SMALL_BYTES:
        return zlib.crc32(data, crc)
    array = np.frombuffer(data, np.uint8)
    return _fast(crc, array.__array_interface__["data"][0], array.nbytes)


_POLYNOMIAL = 0xEDB88320  # reflected: the highest bit is x^0


def combine(first: int, second: int, second_bytes: int) -> int:
    """crc32 of A followed by B, from crc32(A), crc32(B) and the size of B.

    Appending B multiplies A's polynomial by x^(8 * size) modulo the generator (zlib's crc32_combine).
    """
    return _multiply(first, _power_of_x(8 * second_bytes)) ^ second


@functools.lru_cache(maxsize=256)
def _power_of_x(exponent: int) -> int:
    result, square = 1 << 31, 1 << 30  # x^0 and x^1
    while exponent:
        if exponent & 1:
            result = _multiply(result, square)
        square = _multiply(square, square)
        exponent >>= 1
    return result


def _multiply(a: int, b: int) -> int:
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product
