"""One node's disk of packed checkpoints: prepared once, named by digest, never half there.

    <root>/<digest>/            a packed checkpoint (manifest.json, segment-000.safetensors, ..., files/)
    <root>/keys/<key>.json      which digest a caller's key led to
    <root>/locks/<key>.lock     held while the key is prepared, by whichever process
    <root>/.packing-<key>/      a packing in progress, or what a crash left of it
    <root>/.removing-<digest>/  one that made room for another, or what a crash left of it
    <root>/downloads/<source>/  objects of a bucket until they are packed; a download that was stopped goes on there

A packing is written aside, flushed and renamed, so a folder named by a digest is complete whenever it is there.
Locks belong to open files: the kernel frees those of a process that dies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import quote

from layercast_agent.checkpoint_files import PackedCheckpoint, read_files
from layercast_agent.errors import CheckpointError, NoCapacityError
from layercast_agent.free_space import require_free
from layercast_agent.layout import CHUNK_BYTES, Manifest
from layercast_agent.object_store import ObjectSource
from layercast_agent.packing import flush_folder, pack
from layercast_agent.room import Packed
from layercast_agent.source_checkpoint import open_source
from layercast_agent.sources import PVC_ROOT, Source, download_folder, fetch, parse_source

log = logging.getLogger(__name__)

PACKING_PREFIX = ".packing-"
REMOVING_PREFIX = ".removing-"
DOWNLOADS = "downloads"
KEY_NAME_BYTES_MAX = 160


class Phase(StrEnum):
    """What a preparation is busy with."""

    FETCHING = "fetching"
    PACKING = "packing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a preparation is; bytes of the current phase."""

    phase: Phase
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Key:
    """What a caller's key stands for; the content of its file, with the digest."""

    key: str
    source: str
    revision: str
    dtype: str
    rank: int
    ranks: int


class Store:
    """The packed checkpoints below `root`. Thread-safe, and processes may share a root.

    At start, leftovers of crashed packings are removed and checkpoints whose files are damaged (by size or header)
    are not offered; the log names them, and preparing them again replaces them.
    """

    def __init__(self, root: Path, *, pvc_root: Path = PVC_ROOT, chunk_bytes: int = CHUNK_BYTES) -> None:
        if chunk_bytes < 8 or chunk_bytes % 8:
            raise ValueError(f"chunk_bytes {chunk_bytes} is not a positive multiple of 8")
        self._root = root
        self._pvc_root = pvc_root
        self._chunk_bytes = chunk_bytes
        self._mutex = threading.Lock()
        self._manifests: dict[str, Manifest] = {}
        self._damaged: set[str] = set()
        self.make_room: Callable[[int], None] = lambda nbytes: None
        """Called before so many bytes are packed; what it raises stops the packing."""
        for name in ("keys", "locks"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        for folder in sorted(root.iterdir()):
            if _is_digest(folder.name):
                self._admit(folder.name)

    def prepare(
        self,
        *,
        key: str,
        source: str,
        revision: str,
        dtype: str,
        progress: Callable[[Progress], None],
        rank: int = 0,
        ranks: int = 1,
    ) -> Manifest:
        """Makes a checkpoint available, packed, and remembers it under `key`. Blocks; run it in a thread.

        Idempotent: a key that was prepared before from the same source, revision and dtype answers at once, and
        callers that ask for it at the same time, in any process, share one packing. `dtype` as in `packing.pack`. With
        `ranks` > 1 it is the share of one rank, a checkpoint of its own; ranks need keys of their own.
        `progress` is called from this thread and from download threads; what it raises in this thread stops the
        preparation. Raises CheckpointError, or NoCapacityError when the disk is full.
        """
        wanted = _Key(key=key, source=source, revision=revision, dtype=dtype, rank=rank, ranks=ranks)
        parsed = parse_source(source, revision)
        with self._locked(_file_name(key)):
            known = self._remembered(wanted)
            if known is not None:
                return known
            with self._downloading(parsed):
                folder = fetch(
                    parsed,
                    report=_reporter(progress, Phase.FETCHING),
                    pvc_root=self._pvc_root,
                    downloads=self._root / DOWNLOADS,
                )
                try:
                    manifest = self._pack(wanted, folder, _reporter(progress, Phase.PACKING))
                except OSError as error:
                    raise _disk_error(error, self._root) from error
                if isinstance(parsed, ObjectSource) and ranks == 1:  # other ranks of this node want it too
                    shutil.rmtree(folder, ignore_errors=True)
        return manifest

    def lookup(self, key: str) -> Manifest | None:
        """The checkpoint that was prepared under `key`, by any process; None before that."""
        recorded = self._read_key(key)
        return None if recorded is None else self._admit(recorded["digest"])

    def manifests(self) -> dict[str, Manifest]:
        """All complete checkpoints known to this process, by digest."""
        with self._mutex:
            return dict(self._manifests)

    def packed(self) -> list[Packed]:
        """What is on disk, and when each was last used."""
        found = []
        for digest, manifest in self.manifests().items():
            with contextlib.suppress(FileNotFoundError):  # another process of this root removed it
                used_at = (self._root / digest).stat().st_mtime
                found.append(Packed(digest=digest, nbytes=manifest.nbytes, used_at=used_at))
        return found

    def use(self, digest: str) -> None:
        """Remember that a checkpoint was used now. The folder's time of change says it, so it survives the process."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._root / digest)

    def remove(self, digest: str) -> None:
        """Take a checkpoint off the disk; unknown ones succeed. Whoever has its files open goes on reading."""
        aside = self._root / f"{REMOVING_PREFIX}{digest}"
        with self._locked("install"):
            with self._mutex:
                self._manifests.pop(digest, None)
            with contextlib.suppress(FileNotFoundError):
                (self._root / digest).rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def folder(self, digest: str) -> Path:
        """Where a checkpoint lies. CheckpointError when it is not here."""
        if self._admit(digest) is None:
            raise CheckpointError(f"checkpoint {digest} is not on this node's disk", file=self._root)
        return self._root / digest

    def files(self, digest: str) -> dict[str, bytes]:
        """The small files of a checkpoint by name. CheckpointError when it is not here or they are damaged."""
        folder = self.folder(digest)
        return read_files(folder, self.manifests()[digest])

    def _pack(self, wanted: _Key, folder: Path, report: Callable[[int, int], None]) -> Manifest:
        staging = self._root / f"{PACKING_PREFIX}{_file_name(wanted.key)}"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            manifest = pack(
                open_source(folder),
                staging,
                dtype=wanted.dtype,
                chunk_bytes=self._chunk_bytes,
                report=report,
                reserve=self._reserve,
                rank=wanted.rank,
                ranks=wanted.ranks,
            )
            self._install(staging, manifest)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        self._remember(wanted, manifest.digest)
        return manifest

    def _install(self, staging: Path, manifest: Manifest) -> None:
        # Two keys may lead to one digest; the lock decides who comes second and finds it there.
        with self._locked("install"):
            if self._admit(manifest.digest) is not None:
                return
            target = self._root / manifest.digest
            shutil.rmtree(target, ignore_errors=True)  # damaged, or it would have been admitted
            staging.rename(target)
            flush_folder(self._root)
        with self._mutex:
            self._manifests[manifest.digest] = manifest

    def _reserve(self, nbytes: int) -> None:
        self.make_room(nbytes)
        require_free(self._root, nbytes, what="the packed checkpoint")

    def _admit(self, digest: str) -> Manifest | None:
        """The manifest of a complete checkpoint, looked for on disk when this process has not seen it yet."""
        with self._mutex:
            known = self._manifests.get(digest)
        folder = self._root / digest
        if known is not None or not _is_digest(digest) or not folder.is_dir():
            return known
        try:
            packed = PackedCheckpoint(folder)
            packed.close()
            if packed.manifest.digest != digest:
                raise CheckpointError(f"holds checkpoint {packed.manifest.digest}", file=folder)
        except CheckpointError as error:
            self._report_damage(digest, error)
            return None
        with self._mutex:
            self._manifests[digest] = packed.manifest
        return packed.manifest

    def _report_damage(self, digest: str, error: CheckpointError) -> None:
        with self._mutex:
            first = digest not in self._damaged
            self._damaged.add(digest)
        if first:
            log.warning("packed checkpoint is damaged and not offered", extra={"reason": str(error)})

    def _remembered(self, wanted: _Key) -> Manifest | None:
        recorded = self._read_key(wanted.key)
        if recorded is None or recorded != _record(wanted, recorded["digest"]):
            return None
        return self._admit(recorded["digest"])

    def _read_key(self, key: str) -> dict[str, Any] | None:
        path = self._root / "keys" / f"{_file_name(key)}.json"
        try:
            recorded = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("record of a key is unreadable", extra={"file": str(path), "reason": str(error)})
            return None
        sound = isinstance(recorded, dict) and isinstance(recorded.get("digest"), str)
        return recorded if sound and recorded.get("key") == key else None

    def _remember(self, wanted: _Key, digest: str) -> None:
        path = self._root / "keys" / f"{_file_name(wanted.key)}.json"
        aside = path.with_suffix(".new")
        with aside.open("w") as file:
            json.dump(_record(wanted, digest), file)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
        flush_folder(path.parent)

    @contextlib.contextmanager
    def _locked(self, name: str, *, wait: bool = True) -> Iterator[None]:
        """Holds a lock against other threads and processes. BlockingIOError when it is taken and `wait` is false."""
        with (self._root / "locks" / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield

    @contextlib.contextmanager
    def _downloading(self, source: Source) -> Iterator[None]:
        """Two keys of one bucket's folder gather it one after the other."""
        if not isinstance(source, ObjectSource):
            yield
            return
        with self._locked(f"download-{download_folder(self._root, source).name}"):
            yield

    def _remove_leftovers(self) -> None:
        for removing in self._root.glob(f"{REMOVING_PREFIX}*"):
            shutil.rmtree(removing, ignore_errors=True)
        for staging in self._root.glob(f"{PACKING_PREFIX}*"):
            # A lock that is taken means that the packing is alive.
            with (
                contextlib.suppress(BlockingIOError),
                self._locked(staging.name.removeprefix(PACKING_PREFIX), wait=False),
            ):
                shutil.rmtree(staging, ignore_errors=True)
                log.info("removed what a crashed packing left", extra={"folder": str(staging)})


def _record(wanted: _Key, digest: str) -> dict[str, Any]:
    share = {"rank": wanted.rank, "ranks": wanted.ranks}
    return {
        **(share if wanted.ranks > 1 else {}),
        "key": wanted.key,
        "source": wanted.source,
        "revision": wanted.revision,
        "dtype": wanted.dtype,
        "digest": digest,
    }


def _reporter(progress: Callable[[Progress], None], phase: Phase) -> Callable[[int, int], None]:
    return lambda done, total: progress(Progress(phase=phase, done_bytes=done, total_bytes=total))


def _file_name(key: str) -> str:
    """A key as a file name: readable where it is short, unique always."""
    name = "key-" + quote(key, safe="")
    if len(name) <= KEY_NAME_BYTES_MAX:
        return name
    return f"{name[:80]}-{hashlib.sha256(key.encode()).hexdigest()}"


def _is_digest(name: str) -> bool:
    return len(name) == 64 and set(name) <= set("0123456789abcdef")


def _disk_error(error: OSError, root: Path) -> CheckpointError | NoCapacityError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoCapacityError(f"the disk of {root} is full: {error.strerror}")
    return CheckpointError(f"cannot be packed: {error.strerror}", file=error.filename or root)
