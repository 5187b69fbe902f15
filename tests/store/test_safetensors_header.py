"""Headers are read without trust: each lie is found and said with file, tensor and offset."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from layercast_agent.errors import CheckpointError
from layercast_agent.layout import plan_segments
from layercast_agent.safetensors_header import DATA_ALIGNMENT, packed_header, read_header

# Machines are shared: how long one example takes says nothing.
relaxed = settings(deadline=None, max_examples=60)

Entries = dict[str, Any]


def write(path: Path, header: bytes, data: bytes, *, length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def entry(begin: int, end: int, *, dtype: str = "F32", shape: list[int] | None = None) -> Entries:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_file_of_the_library_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    arrays: dict[str, Any] = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.ones((), dtype=np.float16),
    }
    save_file(arrays, path, metadata={"format": "np"})
    found = read_header(path)
    content = path.read_bytes()
    assert set(found) == {"a", "b"}
    for name, array in arrays.items():
        stored = found[name]
        assert stored.shape == array.shape and stored.nbytes == array.nbytes
        assert content[stored.offset : stored.offset + stored.nbytes] == array.tobytes()


LIES: list[tuple[str, Entries, str | None]] = [
    ("overlap", {"a": entry(0, 8), "b": entry(4, 12), "c": entry(12, 16)}, "b"),
    ("gap", {"a": entry(0, 8), "b": entry(12, 16)}, "b"),
    ("truncated", {"a": entry(0, 8), "b": entry(8, 24)}, "b"),
    ("truncated", {"a": entry(0, 2**62, shape=[2**60])}, "a"),
    ("belong to nothing", {"a": entry(0, 8)}, None),
    ("belong to nothing", {}, None),
    ("shape and dtype need", {"a": entry(0, 16, shape=[3])}, "a"),
    ("shape and dtype need", {"a": entry(0, 16, shape=[2**64, 2**64])}, "a"),
    ("not a list of sizes", {"a": entry(0, 16, shape=[-4])}, "a"),
    ("not a list of sizes", {"a": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}}, "a"),
    ("not a list of sizes", {"a": {"dtype": "F32", "data_offsets": [0, 16]}}, "a"),
    ("not a range", {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, "a"),
    ("not a range", {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}, "a"),
    ("not a range", {"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}, "a"),
    ("not a range", {"a": {"dtype": "F32", "shape": [4], "data_offsets": "0"}}, "a"),
    ("unknown", {"a": entry(0, 16, dtype="X9")}, "a"),
    ("unknown", {"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}, "a"),
    ("not an object", {"a": [0, 16]}, "a"),
]


@pytest.mark.parametrize(("says", "entries", "tensor"), LIES)
def test_a_lying_header_is_named(tmp_path: Path, says: str, entries: Entries, tensor: str | None) -> None:
    path = write(tmp_path / "x.safetensors", json.dumps(entries).encode(), bytes(16))
    with pytest.raises(CheckpointError, match=says) as caught:
        read_header(path)
    assert caught.value.file == path
    assert caught.value.tensor == tensor
    assert caught.value.offset_bytes is not None


SOUND = json.dumps({"a": entry(0, 16)}).encode()


@pytest.mark.parametrize(
    ("says", "make"),
    [
        ("truncated", lambda path: path.write_bytes(b"")),
        ("truncated", lambda path: path.write_bytes(b"\x08\0\0")),
        ("truncated", lambda path: write(path, SOUND, b"", length=len(SOUND) + 1)),
        ("beyond the format's limit", lambda path: write(path, SOUND, bytes(16), length=2**63)),
        ("not valid", lambda path: write(path, SOUND[:-1], bytes(16))),
        ("not valid", lambda path: write(path, b'{"a": "\xff"}', bytes(16))),
        ("not valid", lambda path: write(path, b"[" * 50_000, bytes(16))),
        ("twice", lambda path: write(path, SOUND[:-1] + b", " + SOUND[1:], bytes(16))),
        ("not a JSON object", lambda path: write(path, b"[1]", bytes(16))),
        ("pickle archive", lambda path: path.write_bytes(b"PK\x03\x04" + b"x" * 60)),
        ("pickle", lambda path: path.write_bytes(b"\x80\x02}q\x00X\x05" + b"x" * 60)),
        ("Git LFS pointer", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid")),
        ("GGUF", lambda path: path.write_bytes(b"GGUF\x03\0\0\0\x10\x01" + b"x" * 60)),
        ("web page", lambda path: path.write_text("<!DOCTYPE html><html>not found</html>")),
    ],
)
def test_what_is_no_safetensors_file_is_named(
    tmp_path: Path, says: str, make: Callable[[Path], object]
) -> None:
    path = tmp_path / "x.safetensors"
    make(path)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors"):
        read_header(tmp_path / "gone.safetensors")


@relaxed
@given(st.binary(max_size=300), st.integers(0, 320))
def test_no_bytes_make_it_fail_otherwise(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, length: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(struct.pack("<Q", length) + data)
    try:
        read_header(path)
    except CheckpointError as error:
        assert error.file == path


@relaxed
@given(st.lists(st.integers(1, 70), min_size=1, max_size=6), st.sampled_from(["F32", "BF16", "F16"]))
def test_a_packed_header_is_aligned_and_readable_by_the_library(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], dtype: str
) -> None:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        f"model.layers.0.w{i}": (dtype, (size,)) for i, size in enumerate(sizes)
    }
    tensors |= {"model.embed_tokens.weight": (dtype, (1,)), "model.norm.weight": (dtype, (1,))}
    segment = plan_segments(tensors, 1)[1]
    header = packed_header(segment)
    assert len(header) % DATA_ALIGNMENT == 0
    path = tmp_path_factory.getbasetemp() / "packed.safetensors"
    path.write_bytes(header + bytes(segment.nbytes))
    with safe_open(path, framework="np") as file:
        assert {t.name for t in segment.tensors} <= set(file.keys())
    found = read_header(path)
    for tensor in segment.tensors:
        assert found[tensor.name].offset == len(header) + tensor.offset
