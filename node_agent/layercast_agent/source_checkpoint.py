"""An ordinary Hugging Face folder, opened for packing: config, weight files, small files.

Everything is read from headers and small JSON files; parameter bytes stay on disk until they are packed. Pickle
is refused: loading it executes code of whoever wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layercast_agent.errors import CheckpointError
from layercast_agent.families import family_of
from layercast_agent.safetensors_header import StoredTensor, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SMALL_FILE_BYTES_MAX = 128 * 1024 * 1024

# What a model needs beside its weights, as far as it is there.
SMALL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCheckpoint:
    """What a folder holds. `tensors` have the names that the files give them."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, bytes]


def open_source(folder: Path) -> SourceCheckpoint:
    """Reads headers and small files of a Hugging Face folder.

    UnsupportedArchitectureError names a family that is not served or a quantisation; CheckpointError when it is no
    checkpoint, is pickle, or when files are missing, truncated or contradict each other, with file, tensor and offset.
    """
    if not folder.is_dir():
        raise CheckpointError("there is no such folder", file=folder)
    files = {name: _read(folder / name) for name in SMALL_FILES if (folder / name).exists()}
    for name, content in files.items():
        if name.endswith(".json"):
            _object(content, folder / name)
    if "config.json" not in files:
        raise CheckpointError("the folder has no config.json, so it is no checkpoint", file=folder)
    config = _object(files["config.json"], folder / "config.json")
    family_of(config, file=folder / "config.json")
    return SourceCheckpoint(folder=folder, config=config, tensors=_tensors(folder), files=files)


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    # The order in which transformers looks.
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    if (folder / INDEX).exists():
        return _sharded(folder)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            "the weights are pickle files, which can execute code when loaded and are refused; "
            "convert them with save_pretrained, which writes safetensors",
            file=folder / pickles[0],
        )
    raise CheckpointError(f"the folder has neither {SINGLE} nor {INDEX}", file=folder)


def _sharded(folder: Path) -> dict[str, StoredTensor]:
    index = folder / INDEX
    where = _object(_read(index), index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError("it has no weight_map", file=index)
    shards: dict[str, dict[str, StoredTensor]] = {}
    for tensor, named in where.items():
        shard = _safe_name(named, index, tensor)  # before anything of that name is touched
        if shard not in shards:
            shards[shard] = _shard(folder, shard, index)
        if tensor not in shards[shard]:
            raise CheckpointError(
                f"{INDEX} places it here, and it is not", file=folder / shard, tensor=tensor
            )
    merged: dict[str, StoredTensor] = {}
    for tensors in shards.values():
        for name, stored in tensors.items():
            if name in merged:
                raise CheckpointError(
                    f"also stored in {merged[name].file.name}", file=stored.file, tensor=name
                )
            merged[name] = stored
    return merged


def _shard(folder: Path, shard: str, index: Path) -> dict[str, StoredTensor]:
    if not (folder / shard).exists():
        raise CheckpointError(f"the shard that {index.name} names is missing", file=folder / shard)
    return read_header(folder / shard)


def _safe_name(shard: Any, index: Path, tensor: str) -> str:
    """A shard must be a file of the same folder: an index must not make us read elsewhere."""
    if not isinstance(shard, str) or Path(shard).name != shard or "\0" in shard:
        raise CheckpointError(
            f"{shard!r} is not the name of a file in this folder", file=index, tensor=tensor
        )
    if not shard.endswith(".safetensors"):
        raise CheckpointError(f"{shard!r} is not a safetensors file", file=index, tensor=tensor)
    return shard


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > SMALL_FILE_BYTES_MAX:
            raise CheckpointError(f"larger than {SMALL_FILE_BYTES_MAX} bytes", file=path)
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=path) from error


def _object(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        offset = error.pos if isinstance(error, json.JSONDecodeError) else None
        raise CheckpointError(f"not valid JSON: {error}", file=path, offset_bytes=offset) from error
    if not isinstance(value, dict):
        raise CheckpointError("not a JSON object", file=path)
    return value
