"""Whatever an honest writer can put into a checkpoint comes back byte for byte; whatever a disk can do to one is
an error that says where. The files are written here by hand, so that no library keeps the odd ones from being made.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from layercast_agent.checkpoint_files import PackedCheckpoint, verify
from layercast_agent.errors import CheckpointError
from layercast_agent.layout import DTYPE_NAMES, ITEM_BYTES, Manifest
from layercast_agent.packing import pack, segment_file
from layercast_agent.safetensors_header import read_header
from layercast_agent.source_checkpoint import open_source
from layercast_agent.store import Store

# Machines are shared: how long one example takes says nothing.
relaxed = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])

SAFETENSORS_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# A family that is served and of which the store knows no shapes: any tensor of a layer has its place.
CONFIG = {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "tie_word_embeddings": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """What a file says of a tensor, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


Tensors = dict[str, Tensor]


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t.data for t in tensors.values()))


def write_folder(folder: Path, tensors: Tensors, *, layers: int, shards: int, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers, **config}))
    if shards == 1:
        write_file(folder / "model.safetensors", tensors)
        return folder
    where: dict[str, str] = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(itertools.islice(tensors.items(), number, None, shards))
        write_file(folder / name, part)
        where |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for one example: fixtures live as long as the whole test."""
    folder = Path(tempfile.mkdtemp(prefix="layercast-pack-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def packed(source: Path, target: Path, *, dtype: str = "", chunk_bytes: int = 4096) -> Manifest:
    target.mkdir()
    return pack(
        open_source(source), target, dtype=dtype, chunk_bytes=chunk_bytes, report=lambda done, total: None
    )


SHAPES = st.lists(st.integers(1, 9), max_size=3).map(tuple)  # () is a scalar


@st.composite
def checkpoints(draw: st.DrawFn, *, words: tuple[str, ...] = tuple(ITEM_BYTES)) -> tuple[Tensors, int]:
    """Every segment with some tensors of any shape, in any order, with any bits."""
    layers = draw(st.integers(1, 3))
    names = [EMBED, "model.norm.weight", HEAD]
    for layer in range(layers):
        names += [f"model.layers.{layer}.w{i}" for i in range(draw(st.integers(1, 4)))]
    tensors = {}
    for name in draw(st.permutations(names)):
        dtype, shape = draw(st.sampled_from(words)), draw(SHAPES)
        nbytes = math.prod(shape) * SAFETENSORS_BYTES[dtype]
        tensors[name] = Tensor(
            dtype=dtype, shape=shape, data=draw(st.binary(min_size=nbytes, max_size=nbytes))
        )
    return tensors, layers


def held(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return {name: tensor for name, tensor in found.items() if not name.startswith("layercast.gap.")}


@relaxed
@given(st.sampled_from(sorted(ITEM_BYTES)), st.data(), st.integers(1, 3), st.integers(1, 40))
def test_equal_bits_come_back_whatever_the_shapes_shards_and_chunks(
    word: str, data: st.DataObject, shards: int, eighths: int
) -> None:
    """NaNs and all: bytes of the checkpoint's own dtype are copied, never converted."""
    tensors, layers = data.draw(checkpoints(words=(word,)))
    with scratch() as folder:
        source = write_folder(folder / "source", tensors, layers=layers, shards=shards)
        manifest = packed(source, folder / "packed", chunk_bytes=8 * eighths)
        assert manifest.dtype == DTYPE_NAMES[word]
        found = held(folder / "packed")
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert tuple(found[name].shape) == tensor.shape
            assert found[name].reshape(-1).view(torch.uint8).numpy().tobytes() == tensor.data
        verify(folder / "packed")


@relaxed
@given(checkpoints(), st.sampled_from(["", *DTYPE_NAMES.values()]))
def test_mixed_dtypes_become_one_as_torch_converts_or_the_number_is_named(
    checkpoint: tuple[Tensors, int], wanted: str
) -> None:
    tensors, layers = checkpoint
    with scratch() as folder:
        source = write_folder(folder / "source", tensors, layers=layers, shards=1)
        try:
            manifest = packed(source, folder / "packed", dtype=wanted)
        except CheckpointError as error:
            assert "too large for float16" in str(error)
            assert error.file == source / "model.safetensors"
            assert error.tensor in tensors and error.offset_bytes is not None
            return
        sums = {word: sum(len(t.data) for t in tensors.values() if t.dtype == word) for word in DTYPE_NAMES}
        assert wanted in ("", manifest.dtype)
        assert wanted or sums[next(w for w, n in DTYPE_NAMES.items() if n == manifest.dtype)] == max(
            sums.values()
        )
        found = held(folder / "packed")
        for name, tensor in tensors.items():
            told = torch.frombuffer(bytearray(tensor.data), dtype=TORCH[tensor.dtype])
            expected = told.to(getattr(torch, manifest.dtype))
            assert torch.equal(torch.nan_to_num(found[name].reshape(-1)), torch.nan_to_num(expected))
            assert torch.equal(found[name].reshape(-1).isnan(), expected.isnan())


@relaxed
@given(checkpoints(), st.sampled_from(sorted(SAFETENSORS_BYTES)), SHAPES, st.booleans())
def test_what_cannot_be_served_is_named_with_its_place(
    checkpoint: tuple[Tensors, int], word: str, shape: tuple[int, ...], empty: bool
) -> None:
    """A tensor of any other dtype, and one without elements, in any place of a layer."""
    tensors, layers = checkpoint
    shape = (*shape, 0) if empty else shape
    odd = "model.layers.0.odd"
    tensors[odd] = Tensor(dtype=word, shape=shape, data=bytes(math.prod(shape) * SAFETENSORS_BYTES[word]))
    with scratch() as folder:
        source = write_folder(folder / "source", tensors, layers=layers, shards=1)
        place = read_header(source / "model.safetensors")[odd].offset
        if word in ITEM_BYTES and not empty:
            assert odd in held_after(source, folder / "packed")
            return
        with pytest.raises(CheckpointError, match=r"has no elements|cannot be served") as caught:
            packed(source, folder / "packed", dtype="float32")
        assert caught.value.file == source / "model.safetensors"
        assert (caught.value.tensor, caught.value.offset_bytes) == (odd, place)


def held_after(source: Path, target: Path) -> dict[str, torch.Tensor]:
    packed(source, target, dtype="float32")
    return held(target)


@relaxed
@given(checkpoints(words=("BF16",)), st.data())
def test_a_tied_matrix_is_stored_once_or_its_first_difference_is_named(
    checkpoint: tuple[Tensors, int], data: st.DataObject
) -> None:
    """Under either name, or under both with equal bits; both with others is a lie of the config."""
    tensors, layers = checkpoint
    matrix = tensors[EMBED]
    stored = data.draw(st.sampled_from([(EMBED,), (HEAD,), (EMBED, HEAD)]))
    for name in {EMBED, HEAD} - set(stored):
        del tensors[name]
    tensors |= dict.fromkeys(stored, matrix)
    differs = data.draw(st.none() | st.integers(0, len(matrix.data) - 1)) if len(stored) == 2 else None
    if differs is not None:
        other = bytearray(matrix.data)
        other[differs] ^= 1
        tensors[HEAD] = Tensor(dtype=matrix.dtype, shape=matrix.shape, data=bytes(other))
    with scratch() as folder:
        source = write_folder(folder / "source", tensors, layers=layers, shards=1, tie_word_embeddings=True)
        if differs is not None:
            with pytest.raises(CheckpointError, match="values differ") as caught:
                packed(source, folder / "packed")
            assert caught.value.tensor == HEAD and caught.value.file is not None
            return
        packed(source, folder / "packed")
        found = held(folder / "packed")
        assert HEAD not in found
        assert found[EMBED].reshape(-1).view(torch.uint8).numpy().tobytes() == matrix.data


@relaxed
@given(checkpoints(), st.data(), st.integers(1, 3))
def test_a_truncated_source_is_named_with_its_end(
    checkpoint: tuple[Tensors, int], data: st.DataObject, shards: int
) -> None:
    tensors, layers = checkpoint
    with scratch() as folder:
        source = write_folder(folder / "source", tensors, layers=layers, shards=shards)
        path = data.draw(st.sampled_from(sorted(source.glob("*.safetensors"))))
        size = path.stat().st_size
        cut(path, data.draw(st.integers(0, size - 1)))
        with pytest.raises(CheckpointError) as caught:
            packed(source, folder / "packed")
        assert caught.value.file == path
        assert caught.value.offset_bytes is not None and caught.value.offset_bytes <= size


@relaxed
@given(checkpoints(words=("F16",)), st.data())
def test_a_truncated_packed_file_is_named_with_its_end(
    checkpoint: tuple[Tensors, int], data: st.DataObject
) -> None:
    tensors, layers = checkpoint
    with scratch() as folder:
        packed(write_folder(folder / "source", tensors, layers=layers, shards=1), folder / "packed")
        path = data.draw(st.sampled_from(sorted((folder / "packed").glob("*.safetensors"))))
        end = data.draw(st.integers(0, path.stat().st_size - 1))
        cut(path, end)
        with pytest.raises(CheckpointError, match="truncated") as caught:
            PackedCheckpoint(folder / "packed")
        assert (caught.value.file, caught.value.offset_bytes) == (path, end)


@relaxed
@given(checkpoints(words=("F32",)), st.data())
def test_one_changed_byte_anywhere_in_a_packed_folder_is_found_and_its_file_named(
    checkpoint: tuple[Tensors, int], data: st.DataObject
) -> None:
    tensors, layers = checkpoint
    with scratch() as folder:
        packed(write_folder(folder / "source", tensors, layers=layers, shards=1), folder / "packed")
        path = data.draw(st.sampled_from(sorted(p for p in (folder / "packed").rglob("*") if p.is_file())))
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            verify(folder / "packed")
        assert caught.value.file == path


@relaxed
@given(checkpoints(words=("BF16",)), st.data())
def test_one_changed_byte_of_a_source_is_either_said_or_harmless(
    checkpoint: tuple[Tensors, int], data: st.DataObject
) -> None:
    """A header can lie in ways that are consistent; nothing but a CheckpointError may come of it."""
    tensors, layers = checkpoint
    with scratch() as folder:
        source = write_folder(folder / "source", tensors, layers=layers, shards=1)
        path = source / "model.safetensors"
        content = bytearray(path.read_bytes())
        (header_bytes,) = struct.unpack("<Q", content[:8])
        content[data.draw(st.integers(0, 7 + header_bytes))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        try:
            packed(source, folder / "packed")
        except CheckpointError as error:
            assert error.file is not None or error.tensor is not None
        else:
            verify(folder / "packed")


@relaxed
@given(checkpoints(words=("F32",)), st.data(), st.integers(1, 40))
def test_views_are_the_bytes_that_they_name(
    checkpoint: tuple[Tensors, int], data: st.DataObject, eighths: int
) -> None:
    """Of a packed checkpoint, at any offset and length, and of each chunk as a transfer takes it."""
    tensors, layers = checkpoint
    with scratch() as folder:
        manifest = packed(
            write_folder(folder / "source", tensors, layers=layers, shards=1),
            folder / "packed",
            chunk_bytes=8 * eighths,
        )
        opened = PackedCheckpoint(folder / "packed")
        segment = manifest.segments[data.draw(st.integers(0, len(manifest.segments) - 1))]
        path = folder / "packed" / segment_file(segment.index)
        content = path.read_bytes()[opened.data_start(segment.index) :]
        offset = data.draw(st.integers(-3, segment.nbytes + 3))
        nbytes = data.draw(st.integers(0, segment.nbytes + 3))
        if offset >= 0 and offset + nbytes <= segment.nbytes:
            with opened.view(segment.index, offset, nbytes) as view:
                assert view.readonly and bytes(view) == content[offset : offset + nbytes]
        else:
            with pytest.raises(CheckpointError, match="do not lie inside") as caught:
                opened.view(segment.index, offset, nbytes)
            assert (caught.value.file, caught.value.offset_bytes) == (path, offset)
        chunks = [manifest.chunk_range(segment.index, c) for c in range(manifest.chunk_count(segment.index))]
        assert b"".join(content[start : start + size] for start, size in chunks) == content
        opened.close()


@relaxed
@given(checkpoints(), st.sampled_from(["", "bfloat16"]))
def test_a_store_that_failed_offers_nothing_and_succeeds_with_the_mended_source(
    checkpoint: tuple[Tensors, int], dtype: str
) -> None:
    tensors, layers = checkpoint
    with scratch() as folder:
        source = write_folder(folder / "source", tensors, layers=layers, shards=1)
        whole = (source / "model.safetensors").read_bytes()
        cut(source / "model.safetensors", len(whole) - 1)
        store = Store(folder / "store", pvc_root=folder / "pvc", chunk_bytes=64)

        def prepare() -> Manifest:
            return store.prepare(
                key="k", source=f"file://{source}", revision="", dtype=dtype, progress=lambda progress: None
            )

        with pytest.raises(CheckpointError):
            prepare()
        assert not store.manifests() and store.lookup("k") is None
        (source / "model.safetensors").write_bytes(whole)
        try:
            manifest = prepare()
        except CheckpointError as error:
            assert "too large for float16" in str(error)
            return
        assert store.lookup("k") == manifest
        verify(store.folder(manifest.digest))


def cut(path: Path, nbytes: int) -> None:
    with path.open("r+b") as file:
        file.truncate(nbytes)
