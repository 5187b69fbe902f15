"""Checkpoints on this node's disk: prepared in the background, and offered to peers once they are ready.

Preparing is blocking work on files, so one thread does it, one checkpoint at a time: two at once would only share
the disk's speed. What is known of a checkpoint is a whole message that is replaced, never changed, so an observer
on another thread sees a consistent one.

Peers read the packed files through the page cache: a region is a view into the mapped file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
from layercast.agent.v1alpha1 import agent_pb2 as pb

from layercast_agent.checkpoint_files import PackedCheckpoint, PackedSegment
from layercast_agent.errors import AgentError, CheckpointError, NoCapacityError
from layercast_agent.holdings import DISK_RANK, Holding, Holdings
from layercast_agent.layout import Manifest
from layercast_agent.regions import RegionTable
from layercast_agent.residency import Residency
from layercast_agent.room import choose
from layercast_agent.sources import parse_source
from layercast_agent.store import Phase, Progress, Store
from layercast_agent.tensor_parallel import DEGREES
from layercast_agent.transport.egress import EgressLimiter
from layercast_agent.workers import CommandError

log = logging.getLogger(__name__)

WAITING_MAX = 64
"""Checkpoints that may wait for their turn to be prepared."""

PROBE_BYTES = 16 * 1024 * 1024
"""Size of the disk probe: large enough to leave a disk's start-up behind, small enough for a slow one."""

PROBE_BLOCK_BYTES = 1024 * 1024

RELEASE_S = 1.0
"""How long a peer may finish reading a chunk when the agent ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A checkpoint that somebody asked for; fields as in PrepareCheckpointRequest."""

    key: str
    source: str
    revision: str
    dtype: str
    rank: int = 0
    ranks: int = 1


class Checkpoints:
    """What this node's disk holds and prepares. Thread-safe."""

    def __init__(
        self,
        *,
        store: Store,
        holdings: Holdings,
        regions: RegionTable,
        store_bytes_max: int = 0,
        disk_bytes_per_s: int = 0,
    ) -> None:
        """`disk_bytes_per_s` is the most that peers may read from the disk; 0 is as fast as it is."""
        self.disk_bytes_per_s = disk_bytes_per_s
        self._pace = EgressLimiter(disk_bytes_per_s)
        self._store = store
        self._holdings = holdings
        self._regions = regions
        self.store_bytes_max = store_bytes_max
        self.removed = 0
        """Checkpoints that made room for others since the start."""
        self.in_use: Callable[[], Collection[str]] = tuple
        """Digests that this node's replicas and host copies have or load."""
        self._kept_keys: frozenset[str] | None = None
        store.make_room = self._make_room
        self._lock = threading.Lock()
        self._wanted: dict[str, Wanted] = {}
        self._known: dict[str, pb.Checkpoint] = {}  # by key
        self._found: dict[str, pb.Checkpoint] = {}  # by digest: on disk at start
        self._closed = False
        self._packed: dict[str, PackedCheckpoint] = {}
        self._queue: queue.Queue[Wanted] = queue.Queue(WAITING_MAX)
        # A daemon: a download that hangs must not keep the process from ending. Packing is atomic on disk.
        self._thread = threading.Thread(target=self._prepare_all, name="prepare", daemon=True)

    def start(self) -> None:
        """Opens what the disk holds, then takes orders. Blocking; a damaged copy is reported, not fatal."""
        for manifest in self._store.manifests().values():
            self._found[manifest.digest] = self._offer("", manifest)
        self._thread.start()

    def close(self) -> None:
        """Withdraws all copies and takes no more orders. Does not wait for the one that is being prepared."""
        with self._lock:
            packed, self._packed = self._packed, {}
            self._closed = True
        for digest, checkpoint in packed.items():
            held = self._holdings.get(digest, rank=DISK_RANK)
            self._holdings.remove(digest, rank=DISK_RANK)
            with contextlib.suppress(
                NoCapacityError
            ):  # a peer still reads: the mapping ends with the process
                for region in held.regions if held is not None else ():
                    self._regions.remove(region.region_id, deadline_s=RELEASE_S)
                checkpoint.close()

    def prepare(self, wanted: Wanted) -> None:
        """AgentService.PrepareCheckpoint; returns at once. CommandError with a code of its table."""
        if not wanted.key:
            raise CommandError(grpc.StatusCode.INVALID_ARGUMENT, "key is missing")
        if wanted.ranks not in DEGREES or not wanted.rank < wanted.ranks:
            text = f"there is no rank {wanted.rank} of {wanted.ranks} ranks"
            raise CommandError(grpc.StatusCode.INVALID_ARGUMENT, text)
        try:
            parse_source(wanted.source, wanted.revision)
        except CheckpointError as error:
            raise CommandError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error
        with self._lock:
            known = self._known.get(wanted.key)
            if known is not None and known.state != pb.CHECKPOINT_STATE_FAILED:
                first = self._wanted[wanted.key]
                if first != wanted:
                    text = (
                        f"key {wanted.key!r} stands for source {first.source!r}, revision {first.revision!r}, "
                        f"dtype {first.dtype!r}, rank {first.rank} of {first.ranks}"
                    )
                    raise CommandError(grpc.StatusCode.INVALID_ARGUMENT, text)
                return
            try:
                self._queue.put_nowait(wanted)
            except queue.Full:
                text = f"{WAITING_MAX} checkpoints wait to be prepared already"
                raise CommandError(grpc.StatusCode.RESOURCE_EXHAUSTED, text) from None
            self._wanted[wanted.key] = wanted
            self._known[wanted.key] = pb.Checkpoint(key=wanted.key, state=pb.CHECKPOINT_STATE_FETCHING)

    def statuses(self) -> list[pb.Checkpoint]:
        """All that is known: by key, then what was found on disk and nobody has asked for since."""
        with self._lock:
            named = {checkpoint.digest for checkpoint in self._known.values()}
            return [*self._known.values(), *(c for c in self._found.values() if c.digest not in named)]

    def keep(self, keys: Collection[str]) -> None:
        """AgentService.KeepCheckpoints: what these keys lead to stays, others may make room."""
        self._kept_keys = frozenset(keys)

    def store_status(self) -> pb.Store:
        """How full the disk's share is."""
        used_bytes = sum(manifest.nbytes for manifest in self._store.manifests().values())
        return pb.Store(
            capacity_bytes=self.store_bytes_max, used_bytes=used_bytes, checkpoints_removed=self.removed
        )

    def held(self, digest: str) -> Holding | None:
        """The complete copy on this node's disk, if there is one; whoever asks is about to use it."""
        held = self._holdings.get(digest, rank=DISK_RANK)
        if held is not None:
            self._store.use(digest)
        return held

    def folder(self, digest: str) -> Path:
        """Where a copy that is held lies."""
        return self._store.folder(digest)

    def _make_room(self, nbytes: int) -> None:
        """On the preparing thread, before a packing. NoCapacityError when too much is wanted or in use."""
        kept = self._kept_keys
        wanted = None
        if kept is not None:
            manifests = [self._store.lookup(key) for key in kept]
            wanted = {manifest.digest for manifest in manifests if manifest is not None}
        for one in choose(
            self._store.packed(),
            need_bytes=nbytes,
            bytes_max=self.store_bytes_max,
            used={*self.in_use(), *self._read_by_peers()},
            wanted=wanted,
        ):
            self._withdraw(one.digest)
            self._store.remove(one.digest)
            self.removed += 1
            log.info("a checkpoint made room for another", extra={"digest": one.digest, "bytes": one.nbytes})

    def _read_by_peers(self) -> set[str]:
        with self._lock:
            digests = list(self._packed)
        found = set()
        for digest in digests:
            held = self._holdings.get(digest, rank=DISK_RANK)
            if held is not None and (
                self._holdings.followers(held)
                or any(self._regions.readers(region.region_id) for region in held.regions)
            ):
                found.add(digest)
        return found

    def _withdraw(self, digest: str) -> None:
        """No peer is told of it any more, and those that read a chunk are waited for."""
        held = self._holdings.get(digest, rank=DISK_RANK)
        self._holdings.remove(digest, rank=DISK_RANK)
        with self._lock:
            packed = self._packed.pop(digest, None)
            self._found.pop(digest, None)
            for key in [key for key, known in self._known.items() if known.digest == digest]:
                del self._known[key], self._wanted[key]
        for region in held.regions if held is not None else ():
            # Files that are gone stay readable to whoever has them open, so nobody is cut off either way.
            with contextlib.suppress(NoCapacityError):
                self._regions.remove(region.region_id, deadline_s=RELEASE_S)
        if packed is not None:
            packed.close()

    def _prepare_all(self) -> None:
        while True:
            wanted = self._queue.get()
            self._set(self._prepare(wanted))

    def _prepare(self, wanted: Wanted) -> pb.Checkpoint:
        """One checkpoint from order to end; returns what became of it."""
        log.info("a checkpoint is being prepared", extra={"key": wanted.key, "source": wanted.source})
        began = time.monotonic()
        try:
            manifest = self._store.prepare(
                key=wanted.key,
                source=wanted.source,
                revision=wanted.revision,
                dtype=wanted.dtype,
                rank=wanted.rank,
                ranks=wanted.ranks,
                progress=lambda progress: self._set(_under_way(wanted.key, progress)),
            )
        except AgentError as error:
            log.warning("a checkpoint failed", extra={"key": wanted.key, "reason": str(error)})
            return _failed(wanted.key, str(error))
        except Exception as error:  # a bug must not end the thread that all later checkpoints need
            log.exception("preparing a checkpoint broke", extra={"key": wanted.key})
            return _failed(wanted.key, f"{type(error).__name__}: {error}")
        took_s = round(time.monotonic() - began, 3)
        log.info(
            "a checkpoint is packed", extra={"key": wanted.key, "digest": manifest.digest, "took_s": took_s}
        )
        return self._offer(wanted.key, manifest)

    def _offer(self, key: str, manifest: Manifest) -> pb.Checkpoint:
        """Lets peers read a packed checkpoint; returns its status, failed when its files are damaged."""
        try:
            self._hold(manifest)
        except (CheckpointError, OSError) as error:
            log.warning(
                "a checkpoint on disk is unusable", extra={"digest": manifest.digest, "reason": str(error)}
            )
            return _failed(key, str(error), digest=manifest.digest)
        return _ready(key, manifest)

    def _hold(self, manifest: Manifest) -> None:
        """Opens the packed files as regions; a digest that is held already is left alone (two keys, one content)."""
        with self._lock:
            if self._closed or manifest.digest in self._packed:
                return
        files = self._store.files(manifest.digest)
        packed = PackedCheckpoint(self._store.folder(manifest.digest))
        with self._lock:
            if self._closed:
                packed.close()
                return
            self._packed[manifest.digest] = packed
        self._holdings.add(
            Holding(
                manifest=manifest,
                files=files,
                residency=Residency(manifest, complete=True),
                regions=tuple(self._regions.add(self._memory(packed, s.index)) for s in manifest.segments),
                rank=DISK_RANK,
            )
        )

    def _memory(self, packed: PackedCheckpoint, segment: int) -> PackedSegment:
        memory = packed.segment(segment)
        return replace(memory, pace=self._pace.take) if self._pace.limits else memory

    def _set(self, checkpoint: pb.Checkpoint) -> None:
        with self._lock:
            self._known[checkpoint.key] = checkpoint


def measure_disk(folder: Path) -> int:
    """Read rate of the disk below `folder` in bytes per second, by writing and reading a probe. Blocking.

    The kernel is asked to forget the probe before it is read. Where it does not (a file system in memory), the
    rate is that of memory, which is also what a later read would see. 0 when the probe cannot be written.
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        with probe.open("wb", buffering=0) as file:
            for _ in range(PROBE_BYTES // PROBE_BLOCK_BYTES):
                file.write(os.urandom(PROBE_BLOCK_BYTES))
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        with probe.open("rb", buffering=0) as file:
            while file.read(PROBE_BLOCK_BYTES):
                pass
        return int(PROBE_BYTES / (time.perf_counter() - began))
    except OSError as error:
        log.warning(
            "the disk's speed cannot be measured", extra={"folder": str(folder), "reason": str(error)}
        )
        return 0
    finally:
        probe.unlink(missing_ok=True)


def _under_way(key: str, progress: Progress) -> pb.Checkpoint:
    packing = progress.phase is Phase.PACKING
    return pb.Checkpoint(
        key=key,
        state=pb.CHECKPOINT_STATE_PACKING if packing else pb.CHECKPOINT_STATE_FETCHING,
        done_bytes=progress.done_bytes,
        total_bytes=progress.total_bytes,
    )


def _failed(key: str, error: str, *, digest: str = "") -> pb.Checkpoint:
    return pb.Checkpoint(key=key, digest=digest, state=pb.CHECKPOINT_STATE_FAILED, error=error)


def _ready(key: str, manifest: Manifest) -> pb.Checkpoint:
    return pb.Checkpoint(
        key=key,
        digest=manifest.digest,
        state=pb.CHECKPOINT_STATE_READY,
        done_bytes=manifest.nbytes,
        total_bytes=manifest.nbytes,
        segment_bytes=[segment.nbytes for segment in manifest.segments],
        context_length_max=int(manifest.config.get("max_position_embeddings", 0)),
        on_disk=True,
    )
