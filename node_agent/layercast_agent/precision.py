"""Conversion of parameters between float32, bfloat16 and float16, in numpy.

The store packs without torch, and numpy has no bfloat16; but a bfloat16 is the upper half of a float32, so bit
operations do. Narrowing rounds to nearest even, bit for bit as torch does.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = bytes | bytearray | memoryview


def convert(data: Bytes, *, source: str, target: str) -> memoryview:
    """Elements of dtype `source` as elements of dtype `target` (safetensors' words), little-endian, same count.

    Equal dtypes give the same memory back. OverflowError when a finite number is too large for float16.
    """
    if source == target:
        return memoryview(data).cast("B")
    wide = _widen(data, source)
    if target == "F32":
        return wide.data.cast("B")
    narrow = _to_bfloat16(wide) if target == "BF16" else _to_float16(wide)
    return narrow.data.cast("B")


def _widen(data: Bytes, source: str) -> npt.NDArray[np.float32]:
    if source == "F32":
        return np.frombuffer(data, dtype="<f4")
    if source == "F16":
        return np.frombuffer(data, dtype="<f2").astype("<f4")
    bits = np.frombuffer(data, dtype="<u2").astype("<u4")
    bits <<= 16
    return bits.view("<f4")


def _to_bfloat16(wide: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    bits = wide.view("<u4")
    # Half of the last place kept, less one bit when that place is even: ties go to even.
    rounded = bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))
    narrow: npt.NDArray[np.uint16] = (rounded >> np.uint32(16)).astype("<u2")
    # The sum would carry a NaN over into another number.
    narrow[np.isnan(wide)] = 0x7FC0
    return narrow


def _to_float16(wide: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):
        narrow = wide.astype("<f2")
    lost = np.isinf(narrow) & np.isfinite(wide)
    if lost.any():
        raise OverflowError(f"{wide[lost][0]:g} is too large for float16")
    return narrow
