"""Packing: an opened Hugging Face folder becomes one file a segment, checksums and a manifest.

Bytes stream: one block of one tensor is in memory at a time, whatever the model's size. Each chunk is summed
while it is written, so the data is touched once. The folder is flushed to disk before `pack` returns; making it
visible by renaming is the store's business.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from layercast_agent.checksum import SegmentChecksum
from layercast_agent.errors import CheckpointError
from layercast_agent.layout import DTYPE_NAMES, ITEM_BYTES, Manifest, SegmentSpec, plan_segments, seal
from layercast_agent.page_cache import remember_verified
from layercast_agent.parameters import layer_count, select, tensor_split
from layercast_agent.precision import convert
from layercast_agent.safetensors_header import StoredTensor, packed_header
from layercast_agent.source_checkpoint import SourceCheckpoint
from layercast_agent.stored_bytes import blocks_of
from layercast_agent.tensor_parallel import Part, Split, part_of

MANIFEST_FILE = "manifest.json"
FILES_FOLDER = "files"

WRITE_BYTES = 2 * 1024 * 1024
"""Files are written in aligned pieces of this size: the page cache then has them in huge pages, which are mapped at
once when the file is used as it lies there (150 GB/s against 18 of small pages, docs/adr/0008)."""

EXACT_SUFFIX = ".e_score_correction_bias"
"""Routers' corrections keep the precision of their file: rounded, they would send tokens to other experts."""

Report = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


def segment_file(index: int) -> str:
    """Name of a packed segment's file."""
    return f"segment-{index:03d}.safetensors"


def pack(
    source: SourceCheckpoint,
    folder: Path,
    *,
    dtype: str,
    chunk_bytes: int,
    report: Report,
    reserve: Callable[[int], None] = lambda nbytes: None,
    rank: int = 0,
    ranks: int = 1,
) -> Manifest:
    """Writes the packed form into `folder`, which exists and is empty.

    `dtype` is "float32", "bfloat16", "float16", or empty for the checkpoint's own: the one that most of its bytes
    have. `reserve` is told the size before the first byte is written and may raise. With `ranks` > 1 only the share of
    one rank is packed. CheckpointError names file, tensor and offset; OSError is the target disk's.
    """
    selection = select(source.config, source.tensors)
    if selection.equal is not None:
        _check_equal(*selection.equal)
    word = _dtype_word(dtype, selection.tensors)
    shapes = {
        name: (tensor.dtype if name.endswith(EXACT_SUFFIX) else word, tensor.shape)
        for name, tensor in selection.tensors.items()
    }
    split = tensor_split(source.config, rank=rank, ranks=ranks) if ranks > 1 else None
    plans = plan_segments(shapes, layer_count(source.config), split)
    parts = {name: (tensor, _part(name, tensor, split)) for name, tensor in selection.tensors.items()}
    total = sum(plan.nbytes for plan in plans)
    reserve(total)
    report(0, total)
    done = 0
    segments = []
    for plan in plans:

        def wrote(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            report(done, total)

        segments.append(_pack_segment(folder, plan, parts, chunk_bytes, wrote))
    manifest = seal(
        segments=segments,
        dtype=DTYPE_NAMES[word],
        config=source.config,
        files={name: hashlib.sha256(content).hexdigest() for name, content in source.files.items()},
        chunk_bytes=chunk_bytes,
        rank=rank,
        ranks=ranks,
    )
    (folder / FILES_FOLDER).mkdir()
    for name, content in source.files.items():
        _write(folder / FILES_FOLDER / name, content)
    _write(folder / MANIFEST_FILE, manifest.to_json())
    flush_folder(folder / FILES_FOLDER)
    flush_folder(folder)
    return manifest


def flush_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _ChunkWriter:
    """Gathers a segment's bytes into chunks; sums and writes each when it is full."""

    def __init__(self, file: BinaryIO, *, chunk_bytes: int, wrote: Callable[[int], None]) -> None:
        self._file = file
        self._chunk = memoryview(bytearray(chunk_bytes))
        self._filled = 0
        self._wrote = wrote
        self._checksum = SegmentChecksum()
        self._crcs: list[int] = []
        self.position = 0

    def write(self, data: memoryview) -> None:
        self.position += len(data)
        while len(data):
            part = data[: len(self._chunk) - self._filled]
            self._chunk[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == len(self._chunk):
                self._flush()

    def finish(self, plan: SegmentSpec) -> SegmentSpec:
        if self._filled:
            self._flush()
        return replace(plan, chunk_crc32=tuple(self._crcs), checksum=self._checksum.value)

    def _flush(self) -> None:
        full = self._chunk[: self._filled]
        self._crcs.append(zlib.crc32(full))
        self._checksum.update(full)
        done = 0
        # Up to a multiple of WRITE_BYTES each: the file's buffer is so big, and leaves whole.
        while done < len(full):
            end = done + WRITE_BYTES - self._file.tell() % WRITE_BYTES
            self._file.write(full[done:end])
            done = end
        self._filled = 0
        self._wrote(len(full))


def _pack_segment(
    folder: Path,
    plan: SegmentSpec,
    parts: Mapping[str, tuple[StoredTensor, Part | None]],
    chunk_bytes: int,
    wrote: Callable[[int], None],
) -> SegmentSpec:
    path = folder / segment_file(plan.index)
    with path.open("wb", buffering=WRITE_BYTES) as file:
        file.write(packed_header(plan))
        writer = _ChunkWriter(file, chunk_bytes=chunk_bytes, wrote=wrote)
        for tensor in plan.tensors:
            writer.write(memoryview(bytes(tensor.offset - writer.position)))
            for block in _converted(*parts[tensor.name], tensor.dtype):
                writer.write(block)
        sealed = writer.finish(plan)
        file.flush()
        os.fsync(file.fileno())
    remember_verified(path, sealed.checksum)  # of these very bytes, on their way into the page cache
    return sealed


def _part(name: str, stored: StoredTensor, split: Split | None) -> Part | None:
    return None if split is None else part_of(name, stored.shape, split)


def _converted(stored: StoredTensor, part: Part | None, dtype: str) -> Iterator[memoryview]:
    assert part is None or not stored.parts, "tensor_parallel refuses merged tensors by name"
    for piece in stored.parts or (stored,):
        for offset, block in blocks_of(piece, part):
            try:
                yield convert(block, source=piece.dtype, target=dtype)
            except OverflowError as error:
                raise CheckpointError(
                    str(error), file=piece.file, tensor=piece.name, offset_bytes=offset
                ) from error


def _check_equal(one: StoredTensor, other: StoredTensor) -> None:
    for (_, left), (offset, right) in zip(blocks_of(one), blocks_of(other), strict=True):
        if left != right:
            raise CheckpointError(
                f"config.json ties it to {one.name}, but their values differ",
                file=other.file,
                tensor=other.name,
                offset_bytes=offset,
            )


def _dtype_word(dtype: str, tensors: Mapping[str, StoredTensor]) -> str:
    words = {name: word for word, name in DTYPE_NAMES.items()}
    sums: dict[str, int] = {}
    for tensor in tensors.values():
        problem = "" if tensor.nbytes else f"shape {list(tensor.shape)} has no elements"
        if tensor.dtype not in ITEM_BYTES:
            problem = f"dtype {tensor.dtype} cannot be served; {', '.join(ITEM_BYTES)} can"
        if problem:
            raise CheckpointError(problem, file=tensor.file, tensor=tensor.name, offset_bytes=tensor.offset)
        sums[tensor.dtype] = sums.get(tensor.dtype, 0) + tensor.nbytes
    if dtype:
        if dtype not in words:
            raise CheckpointError(f"dtype {dtype!r} is none of {', '.join(words)}")
        return words[dtype]
    return max(sums, key=lambda word: (sums[word], word))


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
