"""What is packed is what was stored: same names, same values, in files that any safetensors tool can read."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from layercast_agent.checksum import segment_checksum
from layercast_agent.errors import CheckpointError
from layercast_agent.layout import Manifest
from layercast_agent.packing import MANIFEST_FILE, pack, segment_file
from layercast_agent.safetensors_header import DATA_ALIGNMENT, read_header
from layercast_agent.source_checkpoint import open_source

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
CHUNK_BYTES = 4096


def packed(source: Path, target: Path, dtype: str = "") -> Manifest:
    target.mkdir()
    return pack(
        open_source(source), target, dtype=dtype, chunk_bytes=CHUNK_BYTES, report=lambda done, total: None
    )


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("layercast.gap.")}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and bool(torch.equal(one.view(torch.uint8), other.view(torch.uint8)))
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("own", "wanted"), [("float32", ""), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_each_family_survives(
    tinymodels: ModuleType, tmp_path: Path, family: str, own: str, wanted: str
) -> None:
    source = tinymodels.make(tmp_path / "source", family, layers=2, dtype=own)
    manifest = packed(source, tmp_path / "packed", wanted)
    assert manifest.dtype == (wanted or own)
    expected = {name: t.to(getattr(torch, manifest.dtype)) for name, t in stored(source).items()}
    found = stored(tmp_path / "packed")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name


def test_files_are_aligned_and_summed(llama: Path, tmp_path: Path) -> None:
    manifest = packed(llama, tmp_path / "packed")
    assert Manifest.from_json((tmp_path / "packed" / MANIFEST_FILE).read_bytes()) == manifest
    for segment in manifest.segments:
        path = tmp_path / "packed" / segment_file(segment.index)
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        data = content[start:]
        assert start % DATA_ALIGNMENT == 0
        assert len(data) == segment.nbytes
        assert segment.checksum == segment_checksum(data)
        assert len(segment.chunk_crc32) == manifest.chunk_count(segment.index)
        for chunk, crc in enumerate(segment.chunk_crc32):
            offset, nbytes = manifest.chunk_range(segment.index, chunk)
            assert crc == zlib.crc32(data[offset : offset + nbytes])
        header = read_header(path)
        for tensor in segment.tensors:
            assert header[tensor.name].offset == start + tensor.offset
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt", "segment": segment.name}


def test_shards_pack_to_the_same_digest(
    tinymodels: ModuleType, llama: Path, sharded: Path, tmp_path: Path
) -> None:
    assert packed(llama, tmp_path / "one").digest == packed(sharded, tmp_path / "three").digest


def test_any_difference_is_another_digest(tinymodels: ModuleType, llama: Path, tmp_path: Path) -> None:
    digests = {packed(llama, tmp_path / "0").digest, packed(llama, tmp_path / "1", "bfloat16").digest}
    other = tinymodels.make(tmp_path / "other", "llama", layers=2, seed=1)
    digests.add(packed(other, tmp_path / "2").digest)
    template = llama / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    digests.add(packed(llama, tmp_path / "3").digest)
    assert len(digests) == 4


def test_gaps_for_odd_shapes_are_filled(tinymodels: ModuleType, tmp_path: Path) -> None:
    """Hidden size 20 in bfloat16: norms have 40 bytes, so the next tensor cannot follow directly."""
    source = tinymodels.make(tmp_path / "source", "llama", layers=1, hidden=20, dtype="bfloat16")
    manifest = packed(source, tmp_path / "packed")
    layer = manifest.segments[1]
    assert layer.nbytes > sum(tensor.nbytes for tensor in layer.tensors)
    for name, tensor in stored(source).items():
        assert same_bits(stored(tmp_path / "packed")[name], tensor)


def test_a_tied_head_that_differs_is_refused(llama: Path, tmp_path: Path) -> None:
    tie(llama)
    with pytest.raises(CheckpointError, match="values differ") as caught:
        packed(llama, tmp_path / "packed")
    assert caught.value.tensor == "lm_head.weight"
    assert caught.value.file == llama / "model.safetensors"
    assert caught.value.offset_bytes is not None


def test_a_tied_head_that_is_equal_is_stored_once(llama: Path, tmp_path: Path) -> None:
    tie(llama)
    tensors = stored(llama)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    manifest = packed(llama, tmp_path / "packed")
    assert [tensor.name for tensor in manifest.segments[0].tensors] == ["model.embed_tokens.weight"]
    assert [tensor.name for tensor in manifest.segments[-1].tensors] == ["model.norm.weight"]


def tie(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


def test_own_dtype_is_that_of_most_bytes(llama: Path, tmp_path: Path) -> None:
    """Checkpoints exist whose norms alone are float32; the model has one dtype."""
    tensors = {
        name: tensor if "norm" in name else tensor.to(torch.bfloat16)
        for name, tensor in stored(llama).items()
    }
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    manifest = packed(llama, tmp_path / "packed")
    assert manifest.dtype == "bfloat16"
    assert {t.dtype for segment in manifest.segments for t in segment.tensors} == {"BF16"}


def test_a_number_that_does_not_fit_is_named(llama: Path, tmp_path: Path) -> None:
    tensors = stored(llama)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = 1e6
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1e\\+06 is too large for float16") as caught:
        packed(llama, tmp_path / "packed", "float16")
    assert caught.value.tensor == name and caught.value.file == llama / "model.safetensors"


def test_an_integer_tensor_is_refused(llama: Path, tmp_path: Path) -> None:
    tensors = stored(llama)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"dtype I8 cannot be served.*model\.norm\.weight"):
        packed(llama, tmp_path / "packed")


def test_an_unknown_dtype_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'int4' is none of float32, bfloat16, float16"):
        packed(llama, tmp_path / "packed", "int4")


def test_memory_does_not_grow_with_the_model(tinymodels: ModuleType, tmp_path: Path) -> None:
    source = tinymodels.make(tmp_path / "source", "llama", layers=24, hidden=512, dtype="bfloat16")
    opened = open_source(source)
    (tmp_path / "packed").mkdir()
    tracemalloc.start()
    try:
        manifest = pack(
            opened,
            tmp_path / "packed",
            dtype="float32",
            chunk_bytes=1 << 20,
            report=lambda done, total: None,
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert manifest.nbytes > 120_000_000
    assert peak < 24_000_000


def test_a_file_that_shrinks_meanwhile_is_named(llama: Path, tmp_path: Path) -> None:
    opened = open_source(llama)
    weights = llama / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 5000)
    (tmp_path / "packed").mkdir()
    with pytest.raises(CheckpointError, match="became shorter") as caught:
        pack(opened, tmp_path / "packed", dtype="", chunk_bytes=4096, report=lambda done, total: None)
    assert caught.value.file == weights
    assert caught.value.offset_bytes == weights.stat().st_size


def test_progress_ends_with_all_bytes(llama: Path, tmp_path: Path) -> None:
    said: list[tuple[int, int]] = []
    (tmp_path / "packed").mkdir()
    manifest = pack(
        open_source(llama),
        tmp_path / "packed",
        dtype="",
        chunk_bytes=CHUNK_BYTES,
        report=lambda done, total: said.append((done, total)),
    )
    done = np.array([d for d, _ in said])
    assert said[0] == (0, manifest.nbytes) and said[-1] == (manifest.nbytes, manifest.nbytes)
    assert (np.diff(done) > 0).all()
    assert len(said) == 1 + sum(manifest.chunk_count(s.index) for s in manifest.segments)
