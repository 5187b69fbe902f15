"""zlib's crc32 by the fastest implementation at hand: every chunk is checked where it arrives, on the data path.

zlib's own does 2-4 GB/s a core, less than a warm file or a fast network brings; ISA-L computes the same number with
carry-less multiplication at 20. `combine` lets several threads share one chunk.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import zlib
from collections.abc import Callable

CRC32_BY = "isal" if importlib.util.find_spec("isal") is not None else "zlib"
"""Whose implementation it is; there is no wheel of ISA-L for some processors."""

crc32: Callable[..., int] = (
    importlib.import_module("isal.isal_zlib").crc32 if CRC32_BY == "isal" else zlib.crc32
)
"""`crc32(data, crc=0)`: as zlib's; releases the interpreter lock while it sums."""

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
