"""Checkpoint copies in this node's host memory: filled like a replica, read by anybody, dropped when told to.

A copy is a target of the ordinary transfer (`runner`) whose memory lies in the arena, and a holding that peers may
read from its first verified chunk on. Which copies there are is the operator's decision; the pool only keeps its
bounds: it never holds more than the arena, and it frees nothing that somebody reads.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from layercast.agent.v1alpha1 import agent_pb2 as pb

from layercast_agent.arena import Arena, ArenaMemory
from layercast_agent.errors import NoCapacityError
from layercast_agent.holdings import MEMORY_RANK, Holding, Holdings
from layercast_agent.layout import Manifest
from layercast_agent.read_bytes import ReadBytes
from layercast_agent.regions import RegionTable
from layercast_agent.residency import Residency
from layercast_agent.runner import TransferOutcome, TransferRunner, UpstreamSpec
from layercast_agent.tls import Tls
from layercast_agent.workers import CommandError

log = logging.getLogger(__name__)

CANCEL_S = 5.0
"""How long links of a transfer may take to write their last byte."""

READERS_S = 10.0
"""How long readers may take with their chunk; longer than any lease and any send."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Copy:
    """One checkpoint in the arena."""

    manifest: Manifest
    memories: Sequence[ArenaMemory]
    holding: Holding
    runner: TransferRunner
    started_at: float
    complete_at: float | None = None
    dropping: bool = False
    error: str = ""

    @property
    def state(self) -> pb.HostCopyState.ValueType:
        if self.dropping:
            return pb.HOST_COPY_STATE_DROPPING
        if self.error:
            return pb.HOST_COPY_STATE_FAILED
        if self.complete_at is not None:
            return pb.HOST_COPY_STATE_COMPLETE
        return pb.HOST_COPY_STATE_FILLING


class HostPool:
    """The copies of one arena. Thread-safe."""

    def __init__(
        self,
        *,
        arena: Arena,
        holdings: Holdings,
        regions: RegionTable,
        token: bytes,
        tls: Tls | None = None,
    ) -> None:
        self.arena = arena
        self._tls = tls
        self._holdings = holdings
        self._regions = regions
        self._token = token
        self._lock = threading.Lock()
        self._copies: dict[str, _Copy] = {}
        self.read_bytes = ReadBytes()

    def holds(self, digest: str) -> bool:
        """Whether chunks of a checkpoint can be read here, all of them or some."""
        with self._lock:
            copy = self._copies.get(digest)
            return copy is not None and not copy.dropping and not copy.error

    def digests(self) -> tuple[str, ...]:
        """Of all copies, whatever their state."""
        with self._lock:
            return tuple(self._copies)

    def holding(self, digest: str) -> Holding | None:
        """What peers are told of a copy."""
        return self._holdings.get(digest, rank=MEMORY_RANK)

    def improve(self, digest: str, upstreams: Sequence[UpstreamSpec], generation: int) -> bool:
        """Give a copy that is here other upstreams; False when there is none, or one that failed.

        CommandError (ABORTED) when it is being dropped.
        """
        with self._lock:
            copy = self._copies.get(digest)
        if copy is None or (copy.error and not copy.dropping):
            return False
        if copy.dropping:
            raise CommandError(grpc.StatusCode.ABORTED, f"the copy of {digest} is being dropped")
        copy.runner.replace_upstreams(upstreams, generation)
        return True

    def start(
        self,
        *,
        manifest: Manifest,
        files: Mapping[str, bytes],
        upstreams: Sequence[UpstreamSpec],
        generation: int,
    ) -> None:
        """Make a copy and begin to fill it; one that failed is replaced. CommandError by the table of the wire."""
        if not self.arena.nbytes:
            raise CommandError(
                grpc.StatusCode.FAILED_PRECONDITION, "this node keeps no copies in host memory"
            )
        self.drop(manifest.digest, only_failed=True)
        with self._lock:
            if manifest.digest in self._copies:  # somebody else was faster
                return
            copy = self._new(manifest, files, upstreams, generation)
            self._copies[manifest.digest] = copy
            self._holdings.add(copy.holding)
            copy.runner.start()
        log.info("a host copy begins", extra={"digest": manifest.digest, "bytes": manifest.nbytes})

    def drop(self, digest: str, *, only_failed: bool = False) -> None:
        """Give a copy's memory back; unknown digests succeed. Blocking.

        CommandError (UNAVAILABLE) when somebody still reads after `READERS_S`; then it may be called again.
        """
        with self._lock:
            copy = self._copies.get(digest)
            if copy is None or (only_failed and not copy.error):
                return
            copy.dropping = True
        # In this order: nobody new comes, nobody writes, those that read are waited for.
        self._holdings.remove(digest, rank=MEMORY_RANK)
        try:
            copy.runner.cancel(CANCEL_S)
            for region in copy.holding.regions:
                self._regions.remove(region.region_id, deadline_s=READERS_S)
        except NoCapacityError as error:
            raise CommandError(grpc.StatusCode.UNAVAILABLE, str(error)) from error
        with self._lock:
            if self._copies.get(digest) is copy:
                del self._copies[digest]
                for memory in copy.memories:
                    self.arena.free(memory)
                log.info("a host copy is dropped", extra={"digest": digest})

    def status(self) -> pb.HostPool:
        """The pool as the operator sees it. Waits for nobody."""
        with self._lock:
            copies = list(self._copies.values())
        return pb.HostPool(
            capacity_bytes=self.arena.nbytes,
            used_bytes=self.arena.used_bytes,
            touched_bytes=self.arena.touched_bytes,
            huge_pages=self.arena.huge,
            copies=[self._status(copy) for copy in copies],
            read_bytes=self.read_bytes.by_transport(),
        )

    def close(self) -> None:
        """Withdraws all copies; memory ends with the process."""
        with self._lock:
            copies = dict(self._copies)
        for digest, copy in copies.items():
            self._holdings.remove(digest, rank=MEMORY_RANK)
            with contextlib.suppress(NoCapacityError):
                copy.runner.cancel(CANCEL_S)

    def _new(
        self,
        manifest: Manifest,
        files: Mapping[str, bytes],
        upstreams: Sequence[UpstreamSpec],
        generation: int,
    ) -> _Copy:
        memories = self._allocate(manifest)
        residency = Residency(manifest)
        holding = Holding(
            manifest=manifest,
            files=files,
            residency=residency,
            regions=tuple(self._regions.add(memory) for memory in memories),
            rank=MEMORY_RANK,
        )
        runner = TransferRunner(
            transfer_id=manifest.digest,
            manifest=manifest,
            memories=memories,
            residency=residency,
            upstreams=upstreams,
            generation=generation,
            segment_order=(),
            token=self._token,
            tls=self._tls,
            read_bytes=self.read_bytes,
            on_segment=lambda segment: None,
            on_end=lambda outcome: self._ended(manifest.digest, outcome),
        )
        return _Copy(
            manifest=manifest, memories=memories, holding=holding, runner=runner, started_at=time.time()
        )

    def _allocate(self, manifest: Manifest) -> list[ArenaMemory]:
        """Memory of all segments, or nothing is taken."""
        memories: list[ArenaMemory] = []
        try:
            for segment in manifest.segments:
                memories.append(self.arena.allocate(segment.nbytes, unit=manifest.chunk_bytes))
        except NoCapacityError as error:
            for memory in memories:
                self.arena.free(memory)
            text = f"the copy takes {manifest.nbytes} bytes, and {error}"
            raise CommandError(grpc.StatusCode.RESOURCE_EXHAUSTED, text) from error
        return memories

    def _ended(self, digest: str, outcome: TransferOutcome) -> None:
        """On the transfer's thread."""
        with self._lock:
            copy = self._copies.get(digest)
        if copy is None or copy.dropping:
            return
        if outcome.complete:
            copy.complete_at = time.time()
            log.info("a host copy is complete", extra={"digest": digest})
        else:
            copy.error = outcome.reason
            log.warning("a host copy failed", extra={"digest": digest, "reason": outcome.reason})

    def _status(self, copy: _Copy) -> pb.HostCopy:
        transfer = copy.runner.status()
        shown = pb.HostCopy(
            digest=copy.manifest.digest,
            state=copy.state,
            total_bytes=copy.manifest.nbytes,
            segments_resident=[
                copy.holding.residency.segment_complete(segment.index) for segment in copy.manifest.segments
            ],
            transfer=pb.Transfer(
                transfer_id=transfer.transfer_id,
                generation=transfer.generation,
                upstream=transfer.upstream,
                done_bytes=transfer.done_bytes,
                total_bytes=transfer.total_bytes,
                bytes_per_s=transfer.bytes_per_s,
                failures=transfer.failures,
                stalled=transfer.stalled,
            ),
            followers=self._holdings.followers(copy.holding),
            readers=sum(self._regions.readers(region.region_id) for region in copy.holding.regions),
            started_at=_timestamp(copy.started_at),
            error=copy.error,
        )
        if copy.complete_at is not None:
            shown.complete_at.CopyFrom(_timestamp(copy.complete_at))
        return shown


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(int(seconds * 1e9))
    return stamp
