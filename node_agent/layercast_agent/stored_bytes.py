"""The bytes of a stored tensor, or of the part of it that one rank holds, block by block.

Only one block is in memory at a time, whatever the tensor's size. A short or unreadable file is an error that names
file, tensor and offset.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from io import RawIOBase

import numpy as np

from layercast_agent.errors import CheckpointError
from layercast_agent.safetensors_header import StoredTensor
from layercast_agent.tensor_parallel import Part, byte_spans

READ_BYTES = 4 * 1024 * 1024


def blocks_of(stored: StoredTensor, part: Part | None = None) -> Iterator[tuple[int, memoryview]]:
    """(offset in the file, bytes) of the tensor or its part, in order; a block is valid until the next one."""
    if part is None or not stored.nbytes:
        yield from _range(stored, 0, stored.nbytes, READ_BYTES)
        return
    item_bytes = stored.nbytes // math.prod(stored.shape)
    rows, row_bytes, spans = byte_spans(part, stored.shape, item_bytes)
    if rows == 1:
        for first, last in spans:
            yield from _range(stored, first, last, READ_BYTES)
        return
    # Columns lie scattered: whole rows are read, and what the rank holds of them is gathered.
    for offset, block in _range(stored, 0, stored.nbytes, max(1, READ_BYTES // row_bytes) * row_bytes):
        whole = np.frombuffer(block, dtype=np.uint8).reshape(-1, row_bytes)
        held = np.concatenate([whole[:, first:last] for first, last in spans], axis=1)
        yield offset, held.reshape(-1).data


def _range(stored: StoredTensor, first: int, last: int, block_bytes: int) -> Iterator[tuple[int, memoryview]]:
    buffer = memoryview(bytearray(min(block_bytes, last - first)))
    done = first
    try:
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.offset + first)
            while done < last:
                block = buffer[: min(len(buffer), last - done)]
                _read_full(file, block, stored, done)
                yield stored.offset + done, block
                done += len(block)
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror}",
            file=stored.file,
            tensor=stored.name,
            offset_bytes=stored.offset + done,
        ) from error


def _read_full(file: RawIOBase, block: memoryview, stored: StoredTensor, done: int) -> None:
    filled = 0
    while filled < len(block):
        count = file.readinto(block[filled:])
        if not count:
            raise CheckpointError(
                "the file became shorter while it was read",
                file=stored.file,
                tensor=stored.name,
                offset_bytes=stored.offset + done + filled,
            )
        filled += count
