"""Headers of safetensors files: read without trust, written with the data section at a multiple of 4 KiB.

Files come from anywhere, so every claim of a header is checked against the file's size before a byte of data is
used; the rules are those of the format (contiguous, complete, no overlap), and each error names file, tensor and
offset. Format: 8 bytes little-endian length, JSON, data.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layercast_agent.errors import CheckpointError
from layercast_agent.layout import SegmentSpec

DATA_ALIGNMENT = 4096  # O_DIRECT and mmap want pages
HEADER_BYTES_MAX = 100_000_000  # the format's own limit

_ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}

# What is found in place of safetensors often enough to be named.
_IMPOSTORS = (
    (b"PK\x03\x04", "it is a pickle archive of torch.save"),
    (b"\x80", "it is a pickle"),
    (b"version https://git-lfs", "it is a Git LFS pointer: the file itself was not downloaded"),
    (b"GGUF", "it is GGUF"),
    (b"<", "it is a web page"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor inside a file; `offset` counts from the file's start.

    One with `parts` is these, end to end, wherever they lie; `file` and `offset` are then those of the first.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    parts: tuple[StoredTensor, ...] = ()


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a safetensors file, by name. CheckpointError when the file or its header is not sound."""
    try:
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            start = file.read(32)
            length = _header_length(path, start, file_bytes)
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=path) from error
    header = _parse(path, text)
    header.pop("__metadata__", None)
    data_start = 8 + length
    tensors = [_tensor(path, name, entry, data_start) for name, entry in header.items()]
    _check_cover(path, tensors, data_start, file_bytes)
    return {tensor.name: tensor for tensor in tensors}


def packed_header(segment: SegmentSpec) -> bytes:
    """The header of a packed segment's file: length and JSON, padded with spaces to a multiple of 4 KiB.

    The format allows no gaps between tensors; where alignment leaves one, a tensor of zero bytes named
    `layercast.gap.N` fills it.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "segment": segment.name}}
    end = 0
    for number, tensor in enumerate(segment.tensors):
        if tensor.offset > end:
            gap = {"dtype": "U8", "shape": [tensor.offset - end], "data_offsets": [end, tensor.offset]}
            header[f"layercast.gap.{number}"] = gap
        end = tensor.offset + tensor.nbytes
        entry = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [tensor.offset, end]}
        header[tensor.name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _header_length(path: Path, start: bytes, file_bytes: int) -> int:
    for magic, finding in _IMPOSTORS:
        # Eight bytes of a true file are a small number, so its second half is zero.
        if start.startswith(magic) and start[4:8] != b"\0\0\0\0":
            raise CheckpointError(f"not safetensors: {finding}", file=path, offset_bytes=0)
    if len(start) < 8:
        raise CheckpointError(
            f"truncated: {file_bytes} bytes have no room for a header", file=path, offset_bytes=len(start)
        )
    length = int.from_bytes(start[:8], "little")
    if length > HEADER_BYTES_MAX:
        raise CheckpointError(
            f"not safetensors: a header of {length} bytes is beyond the format's limit",
            file=path,
            offset_bytes=0,
        )
    if 8 + length > file_bytes:
        raise CheckpointError(
            f"truncated: the header ends at {8 + length}, the file has {file_bytes} bytes",
            file=path,
            offset_bytes=file_bytes,
        )
    return length


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header is not valid: {error}", file=path, offset_bytes=8) from error
    if not isinstance(header, dict):
        raise CheckpointError("the header is not a JSON object", file=path, offset_bytes=8)
    return header


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    def wrong(what: str) -> CheckpointError:
        return CheckpointError(what, file=path, tensor=name, offset_bytes=8)

    if not isinstance(entry, dict):
        raise wrong("the header's entry is not an object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    span: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise wrong(f"dtype {dtype!r} is unknown")
    if not _are_sizes(shape):
        raise wrong(f"shape {shape!r} is not a list of sizes")
    if not _are_sizes(span) or len(span) != 2 or span[0] > span[1]:
        raise wrong(f"data_offsets {span!r} are not a range")
    nbytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if span[1] - span[0] != nbytes:
        raise wrong(f"data_offsets cover {span[1] - span[0]} bytes, shape and dtype need {nbytes}")
    return StoredTensor(
        file=path, name=name, dtype=dtype, shape=tuple(shape), offset=data_start + span[0], nbytes=nbytes
    )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(path: Path, tensors: list[StoredTensor], data_start: int, file_bytes: int) -> None:
    end = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            what = "overlaps the one before it" if tensor.offset < end else "leaves a gap before it"
            raise CheckpointError(what, file=path, tensor=tensor.name, offset_bytes=tensor.offset)
        end += tensor.nbytes
        if end > file_bytes:
            raise CheckpointError(
                f"truncated: the tensor ends at {end}, the file has {file_bytes} bytes",
                file=path,
                tensor=tensor.name,
                offset_bytes=tensor.offset,
            )
    if end != file_bytes:
        raise CheckpointError(
            f"{file_bytes - end} bytes after the last tensor belong to nothing", file=path, offset_bytes=end
        )
