"""Folders that are no sound checkpoint: each is refused with a sentence that names the file."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layercast_agent.errors import CheckpointError
from layercast_agent.source_checkpoint import INDEX, SINGLE, open_source


def test_a_sound_folder_is_read(llama: Path, sharded: Path) -> None:
    one, three = open_source(llama), open_source(sharded)
    assert one.config["model_type"] == "llama"
    assert one.tensors.keys() == three.tensors.keys()
    assert len({tensor.file for tensor in three.tensors.values()}) == 3
    names = {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert one.files.keys() == names | {"chat_template.jinja"}


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such folder.*nowhere"):
        open_source(tmp_path / "nowhere")


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content)
    (folder / INDEX).write_text(json.dumps(content))


def quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))


def only_pickle(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": [1.0]}))


def truncate(path: Path, by: int) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - by)


@pytest.mark.parametrize(
    ("breaks", "says", "file"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json", ""),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON", "config.json"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "not valid JSON", "config.json"),
        (lambda f: (f / "config.json").write_text("[]"), "not a JSON object", "config.json"),
        (lambda f: (f / "config.json").write_text("[" * 50_000), "not valid JSON", "config.json"),
        (quantised, "quantized", "config.json"),
        (lambda f: truncate(f / "tokenizer.json", 9), "not valid JSON", "tokenizer.json"),
        (lambda f: (f / SINGLE).unlink(), "neither model.safetensors nor", ""),
        (only_pickle, "pickle.*execute code.*save_pretrained", "pytorch_model.bin"),
        (lambda f: (f / SINGLE).write_bytes(pickle.dumps({"w": [1.0] * 99})), "it is a pickle", SINGLE),
        (lambda f: truncate(f / SINGLE, 1), "truncated", SINGLE),
        (lambda f: truncate(f / SINGLE, 400_000), "truncated", SINGLE),
    ],
)
def test_a_broken_folder_is_refused(
    llama: Path, breaks: Callable[[Path], object], says: str, file: str
) -> None:
    breaks(llama)
    with pytest.raises(CheckpointError, match=says) as caught:
        open_source(llama)
    assert caught.value.file == (llama / file if file else llama)


SHARD = "model-00002-of-00003.safetensors"
TENSOR = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (lambda f: (f / SHARD).unlink(), f"missing.*{SHARD}"),
        (lambda f: truncate(f / SHARD, 10), f"truncated.*{SHARD}, tensor model"),
        (lambda f: edit_index(f, lambda c: c.clear()), f"no weight_map.*{INDEX}"),
        (lambda f: edit_index(f, lambda c: c.update(weight_map=[1])), f"no weight_map.*{INDEX}"),
        (
            lambda f: edit_index(f, lambda c: c["weight_map"].update({"ghost": SHARD})),
            f"it is not.*{SHARD}.*ghost",
        ),
        (lambda f: (f / INDEX).write_text("nonsense"), f"not valid JSON.*{INDEX}"),
        (
            lambda f: (f / SHARD).write_bytes((f / SHARD.replace("2", "1", 1)).read_bytes()),
            "it is not|also stored",
        ),
    ],
)
def test_broken_shards_are_refused(sharded: Path, breaks: Callable[[Path], object], says: str) -> None:
    breaks(sharded)
    with pytest.raises(CheckpointError, match=says):
        open_source(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..",
        "x\0.safetensors",
        "",
        7,
        None,
        ["a"],
    ],
)
def test_an_index_cannot_point_elsewhere(sharded: Path, name: Any) -> None:
    secret = sharded.parent / "secret.safetensors"
    secret.write_bytes((sharded / SHARD).read_bytes())
    edit_index(sharded, lambda content: content["weight_map"].update({TENSOR: name}))
    with pytest.raises(CheckpointError, match=r"is not (the name of a file in this|a safetensors)") as caught:
        open_source(sharded)
    assert caught.value.tensor == TENSOR and caught.value.file == sharded / INDEX


def test_an_index_cannot_point_to_pickle(sharded: Path) -> None:
    edit_index(sharded, lambda content: content["weight_map"].update({TENSOR: "pytorch_model.bin"}))
    with pytest.raises(CheckpointError, match=r"'pytorch_model\.bin' is not a safetensors file"):
        open_source(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    (sharded / "model-00004-of-00003.safetensors").write_bytes((sharded / SHARD).read_bytes())
    moved: list[str] = []

    def change(content: dict[str, Any]) -> None:
        where = content["weight_map"]
        moved.append(next(name for name, shard in where.items() if shard == SHARD))
        where[moved[0]] = "model-00004-of-00003.safetensors"

    edit_index(sharded, change)
    with pytest.raises(CheckpointError, match="also stored in") as caught:
        open_source(sharded)
    assert caught.value.tensor is not None
