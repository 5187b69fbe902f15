"""Checkpoints on this node's disk: prepared in the background, and offered to peers once they are ready.

Preparing is blocking work on files, so one thread does it, one checkpoint at a time: two at once would only share
the disk's speed. What is known of a checkpoint is a whole message that is replaced, never changed, so an observer
on another thread sees a consistent one.

Peers read the packed files through the page cache: a region is a view into the mapped file.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from layercast.agent.v1alpha1 import agent_pb2 as pb

from layercast_agent.checkpoint_files import PackedCheckpoint
from layercast_agent.errors import AgentError, CheckpointError
from layercast_agent.holdings import Holding, Holdings
from layercast_agent.layout import Manifest
from layercast_agent.regions import RegionTable
from layercast_agent.residency import Residency
from layercast_agent.store import Progress, Store
from layercast_agent.workers import CommandError

log = logging.getLogger(__name__)

WAITING_MAX = 64
"""Checkpoints that may wait for their turn to be prepared."""

PROBE_BYTES = 16 * 1024 * 1024
"""Size of the disk probe: large enough to leave a disk's start-up behind, small enough for a slow one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A checkpoint that somebody asked for; fields as in PrepareCheckpointRequest."""

    key: str
    source: str
    revision: str
    dtype: str


@dataclass(frozen=True, slots=True)
class SegmentFile:
    """One segment of a packed checkpoint as memory that peers may read."""

    packed: PackedCheckpoint
    segment: int

    @property
    def nbytes(self) -> int:
        """Size of the segment."""
        return self.packed.manifest.segments[self.segment].nbytes

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes of the segment's data section, zero copy."""
        return self.packed.view(self.segment, offset, nbytes)


class Checkpoints:
    """What this node's disk holds and prepares. Thread-safe."""

    def __init__(self, *, store: Store, holdings: Holdings, regions: RegionTable) -> None:
        self._store = store
        self._holdings = holdings
        self._regions = regions
        self._lock = threading.Lock()
        self._wanted: dict[str, Wanted] = {}
        self._known: dict[str, pb.Checkpoint] = {}  # by key
        self._found: dict[str, pb.Checkpoint] = {}  # by digest: on disk at start, keys not asked for yet
        self._packed: dict[str, PackedCheckpoint] = {}
        self._queue: queue.Queue[Wanted | None] = queue.Queue(WAITING_MAX)
        # A daemon: a download that hangs must not keep the process from ending. Packing is atomic on disk.
        self._thread = threading.Thread(target=self._prepare_all, name="prepare", daemon=True)

    def start(self) -> None:
        """Opens what the disk holds, then takes orders. Blocking; a broken copy is reported, not fatal."""
        for digest, manifest in self._store.manifests().items():
            status = self._ready("", manifest)
            try:
                self._hold(manifest)
            except (CheckpointError, OSError) as error:
                log.warning("a checkpoint on disk is unusable", extra={"digest": digest, "reason": str(error)})
                status = pb.Checkpoint(digest=digest, state=pb.CHECKPOINT_STATE_FAILED, error=str(error))
            self._found[digest] = status
        self._thread.start()

    def close(self) -> None:
        """Takes no more orders and withdraws all copies. Does not wait for one that is being prepared."""
        with self._lock:
            packed, self._packed = self._packed, {}
        for digest in packed:
            self._holdings.remove(digest)

    def prepare(self, wanted: Wanted) -> None:
        """AgentService.PrepareCheckpoint; returns at once. CommandError with a code of its table."""
