"""zlib's crc32 as fast as the processor can: every chunk is checked wherever it arrives, so this is the data path.

zlib needs 0.2-0.3 s of a core for a GB, more than receiving it does. libdeflate computes the same number with
carry-less multiplication about six times faster; where it is not installed zlib does the work. `combine` lets
several threads share one chunk.
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from collections.abc import Callable

import numpy as np

_SMALL_BYTES = 4096  # calling through ctypes costs more than it saves
_POLYNOMIAL = 0xEDB88320  # reflected: the highest bit is x^0

_Compute = Callable[[int, int, int], int]


def _libdeflate() -> _Compute | None:
    """(crc so far, address, bytes) -> crc, or None when the library is not here. It releases the interpreter lock."""
    try:
        compute = ctypes.CDLL("libdeflate.so.0").libdeflate_crc32
    except (OSError, AttributeError):
        return None
    compute.argtypes = [ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t]
    compute.restype = ctypes.c_uint32
    typed: _Compute = compute
    return typed


_compute = _libdeflate()


def crc32(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """crc32 of `data`, which continues bytes whose crc32 is `crc`. Contiguous bytes only."""
    if _compute is None or len(data) < _SMALL_BYTES:
        return zlib.crc32(data, crc)
    whole = np.frombuffer(data, dtype=np.uint8)  # knows the address of read-only memory too
    return _compute(crc, whole.ctypes.data, len(whole))


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
