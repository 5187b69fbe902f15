"""Packed files are mapped, checked and handed out; damage is named with file and offset."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from layercast_agent.checkpoint_files import PackedCheckpoint, read_files, read_manifest, verify
from layercast_agent.errors import CheckpointError
from layercast_agent.packing import FILES_FOLDER, MANIFEST_FILE, segment_file


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


def data_start(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_tensors_are_where_the_manifest_says(packed: Path) -> None:
    checkpoint = PackedCheckpoint(packed)
    for segment in checkpoint.manifest.segments:
        expected = load_file(packed / segment_file(segment.index))
        for tensor in segment.tensors:
            view = checkpoint.view(segment.index, tensor.offset, tensor.nbytes)
            assert view.readonly
            array = np.frombuffer(view, dtype="<f4").reshape(tensor.shape)
            assert np.array_equal(array, expected[tensor.name])
    checkpoint.close()


def test_a_segment_is_readable_memory(packed: Path) -> None:
    checkpoint = PackedCheckpoint(packed)
    memory = checkpoint.segment(1)
    assert memory.nbytes == checkpoint.manifest.segments[1].nbytes
    assert memory.view(64, 100) == checkpoint.view(1, 64, 100)
    assert len(memory.view(memory.nbytes, 0)) == 0
    checkpoint.close()


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, -1), (0, 10**9), (10**9, 0), (1, 10**9)])
def test_a_range_outside_is_refused(packed: Path, offset: int, nbytes: int) -> None:
    checkpoint = PackedCheckpoint(packed)
    with pytest.raises(CheckpointError, match="do not lie inside") as caught:
        checkpoint.view(1, offset, nbytes)
    assert caught.value.file == packed / segment_file(1) and caught.value.offset_bytes == offset
    checkpoint.close()


def test_views_outlive_close(packed: Path) -> None:
    checkpoint = PackedCheckpoint(packed)
    view = checkpoint.view(0, 0, 64)
    before = bytes(view)
    checkpoint.close()
    checkpoint.close()
    assert bytes(view) == before


def test_a_sound_checkpoint_verifies(packed: Path) -> None:
    verify(packed)


def test_a_flipped_bit_anywhere_in_the_data_is_found(packed: Path) -> None:
    manifest = read_manifest(packed)
    for segment in manifest.segments:
        path = packed / segment_file(segment.index)
        start = data_start(path)
        for position in (0, segment.nbytes // 2, segment.nbytes - 1):
            flip(path, start + position)
            with pytest.raises(CheckpointError, match="corrupt: chunk") as caught:
                verify(packed)
            chunk_start = position // manifest.chunk_bytes * manifest.chunk_bytes
            assert caught.value.file == path
            assert caught.value.offset_bytes == start + chunk_start
            flip(path, start + position)
    verify(packed)


def test_a_truncated_file_is_named_with_its_end(packed: Path) -> None:
    path = packed / segment_file(2)
    size = path.stat().st_size
    for shorter in (size - 1, size // 2, 10, 0):
        with path.open("r+b") as file:
            file.truncate(shorter)
        with pytest.raises(CheckpointError, match="truncated") as caught:
            PackedCheckpoint(packed)
        assert (caught.value.file, caught.value.offset_bytes) == (path, shorter)


def test_a_longer_file_is_refused(packed: Path) -> None:
    path = packed / segment_file(0)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="1 bytes too long") as caught:
        PackedCheckpoint(packed)
    assert caught.value.offset_bytes == size


def test_a_missing_segment_is_named(packed: Path) -> None:
    (packed / segment_file(1)).unlink()
    with pytest.raises(CheckpointError, match=r"segment-001\.safetensors"):
        PackedCheckpoint(packed)


def test_a_changed_header_is_refused(packed: Path) -> None:
    flip(packed / segment_file(1), 60)
    with pytest.raises(CheckpointError, match="not the one that the manifest implies") as caught:
        PackedCheckpoint(packed)
    assert caught.value.file == packed / segment_file(1)


def test_a_changed_manifest_is_refused(packed: Path) -> None:
    path = packed / MANIFEST_FILE
    content = json.loads(path.read_bytes())
    content["segments"][1]["chunk_crc32"][0] ^= 1
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="does not match its digest") as caught:
        PackedCheckpoint(packed)
    assert caught.value.file == path


def test_small_files_are_checked(packed: Path) -> None:
    manifest = read_manifest(packed)
    files = read_files(packed, manifest)
    assert set(files) == set(manifest.file_names)
    assert json.loads(files["config.json"]) == manifest.config
    flip(packed / FILES_FOLDER / "tokenizer.json", 30)
    with pytest.raises(CheckpointError, match=r"corrupt.*tokenizer\.json"):
        verify(packed)
    (packed / FILES_FOLDER / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read.*tokenizer\.json"):
        read_files(packed, manifest)
