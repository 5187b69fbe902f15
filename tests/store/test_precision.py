"""Conversion agrees with torch bit for bit, on every bfloat16 and on the float32 numbers that round hardest."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from layercast_agent.precision import convert

TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def by_torch(data: bytes, source: str, target: str) -> bytes:
    tensor = torch.frombuffer(bytearray(data), dtype=TORCH[source]).to(TORCH[target])
    return bytes(tensor.view(torch.uint8).numpy())


def hard_floats() -> npt.NDArray[np.float32]:
    """Every upper half with lower halves around each tie, and a million random numbers of all sizes."""
    upper = np.arange(0, 1 << 16, 7, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    ties = (upper[:, None] | lower[None, :]).ravel().view(np.float32)
    rng = np.random.default_rng(7)
    random = rng.integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
    return np.concatenate([ties, random])


@pytest.mark.parametrize("target", ["F32", "F16"])
def test_every_bfloat16_widens_as_in_torch(target: str) -> None:
    bits = np.arange(1 << 16, dtype="<u2")
    values = (bits.astype("<u4") << 16).view("<f4")
    usable = bits[~np.isnan(values)]  # NaN payloads are nobody's promise
    if target == "F16":
        usable = usable[np.abs((usable.astype("<u4") << 16).view("<f4")) < 65504]
    data = usable.tobytes()
    assert bytes(convert(data, source="BF16", target=target)) == by_torch(data, "BF16", target)


def test_float32_rounds_to_bfloat16_as_in_torch() -> None:
    values = hard_floats()
    data = values[~np.isnan(values)].tobytes()
    assert bytes(convert(data, source="F32", target="BF16")) == by_torch(data, "F32", "BF16")


def test_float32_rounds_to_float16_as_in_torch() -> None:
    values = hard_floats()
    values = values[np.abs(values) < 65504]  # drops NaN, infinity and what is too large
    assert bytes(convert(values.tobytes(), source="F32", target="F16")) == by_torch(
        values.tobytes(), "F32", "F16"
    )


@pytest.mark.parametrize("target", ["F32", "BF16"])
def test_float16_converts_as_in_torch(target: str) -> None:
    bits = np.arange(1 << 16, dtype="<u2")
    data = bits[~np.isnan(bits.view("<f2"))].tobytes()
    assert bytes(convert(data, source="F16", target=target)) == by_torch(data, "F16", target)


def test_infinity_and_nan_stay_what_they_are() -> None:
    # The second NaN would be infinity if its lower half were just cut off, the third would round to zero.
    bits = np.array([0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF], dtype="<u4")
    for target in ("BF16", "F16"):
        narrow = convert(bits.tobytes(), source="F32", target=target)
        wide = np.frombuffer(convert(narrow, source=target, target="F32"), dtype="<f4")
        assert np.isposinf(wide[0]) and np.isneginf(wide[1]) and np.isnan(wide[2:]).all()


def test_a_number_too_large_for_float16_is_named() -> None:
    data = np.array([1.0, -70000.0], dtype="<f4").tobytes()
    with pytest.raises(OverflowError, match="-70000"):
        convert(data, source="F32", target="F16")


def test_equal_dtypes_copy_nothing() -> None:
    data = bytearray(16)
    view = convert(data, source="BF16", target="BF16")
    data[3] = 9
    assert view[3] == 9
