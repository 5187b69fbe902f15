"""Where every byte of a checkpoint lies: one pure function, and the manifest that records its answer.

A checkpoint is an ordered list of segments: embed, layer 0..L-1, head. Everything that moves or reads parameters
(disk, transfer, device memory, engine) works on these offsets and on nothing else, so source, target and file
agree without talking. No torch and no input or output here.

Invariants of a segment: tensors start at multiples of 64 bytes, in order, do not overlap, and the segment ends
with its last tensor. A chunk is a fixed-size byte range of a segment (the last one shorter), each with a crc32.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from layercast_agent.errors import CheckpointError
from layercast_agent.tensor_parallel import Split, part_of

CHUNK_BYTES = 4 * 1024 * 1024
TENSOR_ALIGNMENT = 64  # a cache line, and what vectorised kernels and GPU copies want
FORMAT = "layercast-packed/1"

ITEM_BYTES: Mapping[str, int] = {"F32": 4, "BF16": 2, "F16": 2}
DTYPE_NAMES: Mapping[str, str] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

EMBED_PREFIXES = ("model.embed_tokens.", "gpt_neox.embed_in.")
LAYERS_PREFIXES = ("model.layers.", "gpt_neox.layers.")
HEAD_PREFIXES = ("model.norm.", "model.final_layernorm.", "gpt_neox.final_layer_norm.", "lm_head.")

# Neighbours that a fused block reads as one matrix lie side by side: q, k, v and gate, up.
_LAYER_ORDER = (
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.q_proj.bias",
    "self_attn.k_proj.bias",
    "self_attn.v_proj.bias",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.gate_proj.bias",
    "mlp.up_proj.bias",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One parameter: `name` is the full Hugging Face name, `offset` counts bytes from the segment's start.

    `dtype` is safetensors' word: "F32", "BF16" or "F16".
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentSpec:
    """One unit of residency. `plan_segments` leaves checksums empty; packing fills them in.

    `chunk_crc32[c]` is zlib's crc32 of chunk c. `checksum` covers the whole segment and can be computed on a
    device (`layercast_agent.checksum`).
    """

    index: int
    name: str
    nbytes: int
    tensors: tuple[TensorSpec, ...]
    chunk_crc32: tuple[int, ...] = ()
    checksum: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything about a packed checkpoint but its bytes. Made by `seal` or `from_json`.

    `digest` is the sha256 of all the rest, so it names the content of every chunk and every small file. `dtype`
    is "float32", "bfloat16" or "float16". `config` is config.json. `file_sha256[i]` belongs to `file_names[i]`.
    With `ranks` > 1 it is the share of one rank (`tensor_parallel`): tensors have the shapes of the parts that the rank
    holds, everything else is that of the whole model.
    """

    digest: str
    chunk_bytes: int
    dtype: str
    segments: tuple[SegmentSpec, ...]
    config: Mapping[str, Any]
    file_names: tuple[str, ...]
    file_sha256: tuple[str, ...] = field(default=())
    rank: int = 0
    ranks: int = 1

    @property
    def layers(self) -> int:
        """Transformer layers: all segments but embed and head."""
        return len(self.segments) - 2

    @property
    def nbytes(self) -> int:
        """Parameter bytes in all."""
        return sum(segment.nbytes for segment in self.segments)

    def chunk_count(self, segment: int) -> int:
        """Chunks of a segment; at least one, because no segment is empty."""
        return chunk_count(self.segments[segment].nbytes, self.chunk_bytes)

    def chunk_range(self, segment: int, chunk: int) -> tuple[int, int]:
        """(offset, bytes) of a chunk inside its segment. IndexError when there is no such chunk."""
        if not 0 <= chunk < self.chunk_count(segment):
            raise IndexError(f"segment {segment} has no chunk {chunk}")
        offset = chunk * self.chunk_bytes
        return offset, min(self.chunk_bytes, self.segments[segment].nbytes - offset)

    def to_json(self) -> bytes:
        """The manifest file: canonical JSON, equal bytes for equal manifests."""
        return _canonical({**_content(self), "digest": self.digest})

    @staticmethod
    def from_json(data: bytes) -> Manifest:
        """Reads a manifest and checks all its claims, digest included. CheckpointError says what is wrong.

        Placement is not believed but planned again from names, dtypes and shapes: a manifest that says anything
        else is refused, so whoever holds a Manifest may use its offsets without looking.
        """
        try:
            content = json.loads(data)
            manifest = _parse(content)
            honest = _canonical(content) == manifest.to_json()
        except CheckpointError as error:
            raise CheckpointError(f"the manifest is wrong: {error}", tensor=error.tensor) from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise CheckpointError(f"the manifest is malformed: {type(error).__name__} {error}") from error
        if not honest:
            raise CheckpointError("the manifest's sizes and offsets do not follow from its tensors")
        if digest_of(manifest) != manifest.digest:
            raise CheckpointError(f"the manifest does not match its digest {manifest.digest}")
        return manifest


def chunk_count(nbytes: int, chunk_bytes: int) -> int:
    """How many chunks cover `nbytes`."""
    return -(-nbytes // chunk_bytes)


def segment_name(index: int, layers: int) -> str:
    """Name of a segment: "embed", "layer.7", "head"."""
    if index == 0:
        return "embed"
    return "head" if index == layers + 1 else f"layer.{index - 1}"


def segment_index(tensor: str, layers: int) -> int:
    """The segment that a parameter belongs to. CheckpointError when it has no place in the model."""
    if tensor.startswith(EMBED_PREFIXES):
        return 0
    if tensor.startswith(HEAD_PREFIXES):
        return layers + 1
    if tensor.startswith(LAYERS_PREFIXES):
        number = tensor.split(".", 3)[2]
        if number.isdecimal() and str(int(number)) == number and int(number) < layers:
            return int(number) + 1
    raise CheckpointError(
        f"the checkpoint has a tensor that a model of {layers} layers has not", tensor=tensor
    )


def plan_segments(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], layers: int, split: Split | None = None
) -> tuple[SegmentSpec, ...]:
    """Places every tensor: `tensors` maps parameter name to (safetensors dtype, whole shape).

    Returns embed, layer 0..layers-1, head, without checksums; with a `split` those of one rank, in which each tensor
    is the part that `tensor_parallel.part_of` gives it. The answer depends on the mapping's content only, not on its
    order. CheckpointError for a tensor that belongs nowhere, has no elements or an unusable dtype or cannot be
    split, and for a segment that would be empty.
    """
    if layers < 1:
        raise CheckpointError(f"a model of {layers} layers is none")
    members: list[list[str]] = [[] for _ in range(layers + 2)]
    for name in tensors:
        members[segment_index(name, layers)].append(name)
    segments = []
    for index, names in enumerate(members):
        if not names:
            raise CheckpointError(f"the checkpoint has no tensor for segment {segment_name(index, layers)}")
        placed = _place({name: _held(name, *tensors[name], split) for name in sorted(names, key=_order)})
        nbytes = placed[-1].offset + placed[-1].nbytes
        segments.append(
            SegmentSpec(index=index, name=segment_name(index, layers), nbytes=nbytes, tensors=placed)
        )
    return tuple(segments)


def seal(
    *,
    segments: Sequence[SegmentSpec],
    dtype: str,
    config: Mapping[str, Any],
    files: Mapping[str, str],
    chunk_bytes: int = CHUNK_BYTES,
    rank: int = 0,
    ranks: int = 1,
) -> Manifest:
    """The manifest of packed segments. `files` maps each small file's name to its sha256 (hex)."""
    names = tuple(sorted(files))
    draft = Manifest(
        digest="",
        chunk_bytes=chunk_bytes,
        dtype=dtype,
        segments=tuple(segments),
        config=config,
        file_names=names,
        file_sha256=tuple(files[name] for name in names),
        rank=rank,
        ranks=ranks,
    )
    return replace(draft, digest=digest_of(draft))


def digest_of(manifest: Manifest) -> str:
    """sha256 (hex) over everything but the digest itself."""
    return hashlib.sha256(_canonical(_content(manifest))).hexdigest()


def _order(name: str) -> tuple[int, str]:
    for rank, suffix in enumerate(_LAYER_ORDER):
        if name.endswith(suffix):
            return rank, name
    return len(_LAYER_ORDER), name


def _held(name: str, dtype: str, shape: tuple[int, ...], split: Split | None) -> tuple[str, tuple[int, ...]]:
    part = None if split is None else part_of(name, shape, split)
    return dtype, shape if part is None else part.shape(shape)


def _place(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[TensorSpec, ...]:
    placed = []
    end = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in ITEM_BYTES:
            known = ", ".join(ITEM_BYTES)
            raise CheckpointError(f"dtype {dtype} cannot be served; {known} can", tensor=name)
        nbytes = math.prod(shape) * ITEM_BYTES[dtype]
        if nbytes <= 0:
            raise CheckpointError(f"shape {list(shape)} has no elements", tensor=name)
        offset = -(-end // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
        placed.append(TensorSpec(name=name, dtype=dtype, shape=shape, offset=offset, nbytes=nbytes))
        end = offset + nbytes
    return tuple(placed)


def _content(manifest: Manifest) -> dict[str, Any]:
    shared = {"tensor_parallel": {"rank": manifest.rank, "ranks": manifest.ranks}}
    return {
        **(shared if manifest.ranks > 1 else {}),
        "format": FORMAT,
        "chunk_bytes": manifest.chunk_bytes,
        "dtype": manifest.dtype,
        "config": manifest.config,
        "files": [
            {"name": name, "sha256": sha256}
            for name, sha256 in zip(manifest.file_names, _hashes(manifest), strict=True)
        ],
        "segments": [_segment(segment) for segment in manifest.segments],
    }


def _parse(content: Any) -> Manifest:
    if content["format"] != FORMAT:
        raise CheckpointError(f"format {content['format']!r} is not {FORMAT!r}")
    recorded = content["segments"]
    tensors = {
        tensor["name"]: (tensor["dtype"], _integers(tensor["shape"]))
        for segment in recorded
        for tensor in segment["tensors"]
    }
    (chunk_bytes,) = _integers([content["chunk_bytes"]])
    if chunk_bytes < 1:
        raise CheckpointError(f"chunk_bytes {chunk_bytes} is not positive")
    segments = []
    for plan, said in zip(plan_segments(tensors, len(recorded) - 2), recorded, strict=True):
        crcs = _integers(said["chunk_crc32"])
        if len(crcs) != chunk_count(plan.nbytes, chunk_bytes):
            raise CheckpointError(
                f"segment {plan.name} has {len(crcs)} chunk checksums for {plan.nbytes} bytes"
            )
        (checksum,) = _integers([said["checksum"]])
        segments.append(replace(plan, chunk_crc32=crcs, checksum=checksum))
    share = content.get("tensor_parallel", {"rank": 0, "ranks": 1})
    rank, ranks = _integers([share["rank"], share["ranks"]])
    if not 0 <= rank < ranks:
        raise CheckpointError(f"there is no rank {rank} of {ranks}")
    return Manifest(
        digest=content["digest"],
        chunk_bytes=chunk_bytes,
        dtype=content["dtype"],
        segments=tuple(segments),
        config=content["config"],
        file_names=tuple(_file_name(file["name"]) for file in content["files"]),
        file_sha256=tuple(file["sha256"] for file in content["files"]),
        rank=rank,
        ranks=ranks,
    )


def _integers(values: Any) -> tuple[int, ...]:
    # JSON also has true and 1.0, which compare equal to 1.
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise CheckpointError(f"{values!r} are not whole numbers")
    return tuple(values)


def _file_name(name: str) -> str:
    """Small files lie in one folder: a manifest from elsewhere must not name others."""
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        raise CheckpointError(f"{name!r} is not the name of a small file")
    return name


def _hashes(manifest: Manifest) -> Iterable[str]:
    return manifest.file_sha256 or ("",) * len(manifest.file_names)


def _segment(segment: SegmentSpec) -> dict[str, Any]:
    return {
        "name": segment.name,
        "nbytes": segment.nbytes,
        "checksum": segment.checksum,
        "chunk_crc32": segment.chunk_crc32,
        "tensors": [
            {"name": t.name, "dtype": t.dtype, "shape": t.shape, "offset": t.offset, "nbytes": t.nbytes}
            for t in segment.tensors
        ],
    }


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
