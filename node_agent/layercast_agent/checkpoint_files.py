"""The read side of a packed checkpoint on disk: mapped files, checked once, handed out without copies."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from layercast_agent.checksum import SegmentChecksum
from layercast_agent.errors import CheckpointError
from layercast_agent.layout import Manifest, SegmentSpec
from layercast_agent.packing import FILES_FOLDER, MANIFEST_FILE, segment_file
from layercast_agent.safetensors_header import packed_header


class PackedCheckpoint:
    """A packed checkpoint, mapped read-only. Safe to read from any number of threads.

    Opening checks the manifest, its digest, each file's size and header; not the data (`verify` does, and every
    transfer verifies each chunk). CheckpointError names the file and the offset at which it ends too early.
    """

    manifest: Manifest

    def __init__(self, folder: Path, *, manifest: Manifest | None = None) -> None:
        """`manifest` is what the folder holds, where that is known; else it is read."""
        self.folder = folder
        self.manifest = manifest or read_manifest(folder)
        self._maps: list[mmap.mmap] = []
        self._data: list[memoryview] = []
        self._data_starts: list[int] = []
        try:
            for segment in self.manifest.segments:
                mapped, header_bytes = _map(folder / segment_file(segment.index), segment)
                self._maps.append(mapped)
                self._data.append(memoryview(mapped)[header_bytes:])
                self._data_starts.append(header_bytes)
        except CheckpointError:
            self.close()
            raise

    def view(self, segment: int, offset: int, nbytes: int) -> memoryview:
        """Bytes of a segment's data section, without a copy, read-only; they stay valid after `close`.

        CheckpointError for a range outside the segment.
        """
        size = self.manifest.segments[segment].nbytes
        if not 0 <= offset <= offset + nbytes <= size:
            raise CheckpointError(
                f"{nbytes} bytes do not lie inside the segment's {size}",
                file=self.folder / segment_file(segment),
                offset_bytes=offset,
            )
        return self._data[segment][offset : offset + nbytes]

    def path(self, segment: int) -> Path:
        """The segment's file."""
        return self.folder / segment_file(segment)

    def data_start(self, segment: int) -> int:
        """Where the segment's bytes begin in its file: a multiple of 4 KiB."""
        return self._data_starts[segment]

    def segment(self, index: int) -> PackedSegment:
        """One segment as readable memory, the form in which it is offered to peers."""
        return PackedSegment(checkpoint=self, index=index, nbytes=self.manifest.segments[index].nbytes)

    def close(self) -> None:
        """Ends the mapping, of each file as soon as nobody holds a view of it. May be repeated."""
        for data in self._data:
            data.release()
        for mapped in self._maps:
            # A view that somebody still holds keeps its mapping alive until it goes.
            with contextlib.suppress(BufferError):
                mapped.close()
        self._data.clear()
        self._maps.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedSegment:
    """Readable memory (`regions.ReadableMemory`) over one segment of a packed checkpoint."""

    checkpoint: PackedCheckpoint
    index: int
    nbytes: int
    pace: Callable[[int], None] = lambda nbytes: None
    """Called with the bytes of each read; returns when they may be read."""

    def view(self, offset: int, nbytes: int) -> memoryview:
        """As PackedCheckpoint.view."""
        self.pace(nbytes)
        return self.checkpoint.view(self.index, offset, nbytes)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a packed folder. CheckpointError when it is missing, malformed or not that of its digest."""
    path = folder / MANIFEST_FILE
    try:
        return Manifest.from_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=path) from error
    except CheckpointError as error:
        raise CheckpointError(str(error), file=path, tensor=error.tensor) from error


def holds(folder: Path, digest: str) -> bool:
    """Whether the packed folder says that it holds that checkpoint. CheckpointError when it says nothing.

    For who has the manifest already and verifies chunks against it: parsing it once more takes milliseconds.
    """
    path = folder / MANIFEST_FILE
    try:
        return f'"digest":"{digest}"'.encode() in path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=path) from error


def read_files(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """The small files of a packed folder by name, checked against the manifest's sha256."""
    files = {}
    for name, sha256 in zip(manifest.file_names, manifest.file_sha256, strict=True):
        path = folder / FILES_FOLDER / name
        try:
            files[name] = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", file=path) from error
        if hashlib.sha256(files[name]).hexdigest() != sha256:
            raise CheckpointError("corrupt: its sha256 is not that of the manifest", file=path)
    return files


def verify(folder: Path) -> None:
    """Reads a whole packed checkpoint and compares everything with its checksums.

    CheckpointError names the file and the offset (in the file) of the first chunk that differs.
    """
    packed = PackedCheckpoint(folder)
    try:
        read_files(folder, packed.manifest)
        for segment in packed.manifest.segments:
            _verify_segment(packed, segment)
    finally:
        packed.close()


def _verify_segment(packed: PackedCheckpoint, segment: SegmentSpec) -> None:
    path = packed.folder / segment_file(segment.index)
    checksum = SegmentChecksum()
    for chunk, expected in enumerate(segment.chunk_crc32):
        offset, nbytes = packed.manifest.chunk_range(segment.index, chunk)
        with packed.view(segment.index, offset, nbytes) as data:
            if zlib.crc32(data) != expected:
                header_bytes = len(packed_header(segment))
                raise CheckpointError(
                    f"corrupt: chunk {chunk} of segment {segment.name} does not match its crc32",
                    file=path,
                    offset_bytes=header_bytes + offset,
                )
            checksum.update(data)
    if checksum.value != segment.checksum:
        raise CheckpointError("the segment's checksum is not that of its chunks", file=path)


def _map(path: Path, segment: SegmentSpec) -> tuple[mmap.mmap, int]:
    """The mapped file and its header's length, after comparing both with what the manifest implies."""
    header = packed_header(segment)
    expected = len(header) + segment.nbytes
    try:
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            if file_bytes < expected:
                raise CheckpointError(
                    f"truncated: {file_bytes} of {expected} bytes", file=path, offset_bytes=file_bytes
                )
            if file_bytes > expected:
                raise CheckpointError(
                    f"{file_bytes - expected} bytes too long", file=path, offset_bytes=expected
                )
            # Only the header: by a touch of the mapping the kernel would read megabytes around it.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            found = os.pread(file.fileno(), len(header), 0)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            with contextlib.suppress(OSError):  # a kernel or file system without huge pages
                mapped.madvise(mmap.MADV_HUGEPAGE)  # what a use of the mapping reads is read in them
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=path) from error
    if found != header:
        mapped.close()
        raise CheckpointError(
            "its header is not the one that the manifest implies", file=path, offset_bytes=0
        )
    return mapped, len(header)
