"""What this process can give to peers: the serving side of GetManifest and WatchResidency.

A worker holds the checkpoint of its replica, an agent those on its disk. Both answer peers with the same two
handler bodies. Parameter bytes do not pass here: a holding names regions, and the transport reads them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

import grpc
from grpc import aio
from layercast.peer.v1alpha1 import peer_pb2

from layercast_agent.errors import AgentError
from layercast_agent.layout import Manifest
from layercast_agent.regions import RegionRef
from layercast_agent.residency import Residency

# A burst of chunks becomes one message: watchers decide by level, so only the last bitmap matters.
COALESCE_S = 0.002

# Watchers ping an idle stream to notice a dead node; without these a server takes that for abuse.
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
)

_Context = aio.ServicerContext[peer_pb2.WatchResidencyRequest, peer_pb2.WatchResidencyResponse]
_ManifestContext = aio.ServicerContext[peer_pb2.GetManifestRequest, peer_pb2.GetManifestResponse]


DISK_RANK, DEVICE_RANK, MEMORY_RANK = 0, 1, 2
"""Where a copy lies; of complete ones, peers are given that of the highest rank."""
_DescribeContext = aio.ServicerContext[peer_pb2.DescribeRegionsRequest, peer_pb2.DescribeRegionsResponse]
Describe = Callable[[tuple[RegionRef, ...]], peer_pb2.DescribeRegionsResponse]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Holding:
    """One checkpoint, complete or not, that peers may read. Compared by identity."""

    manifest: Manifest
    files: Mapping[str, bytes]
    residency: Residency
    regions: tuple[RegionRef, ...]  # one per segment, in the manifest's order
    rank: int = DEVICE_RANK


class Holdings:
    """All holdings of this process, by digest and rank. `add`, `remove` and `get` are thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[tuple[str, int], Holding] = {}
        self._watchers: dict[int, tuple[Holding, Callable[[], None]]] = {}
        self._next_watcher = 0
        self.describe: Describe | None = None
        """How regions are read one-sidedly, where this process offers that."""

    def add(self, holding: Holding) -> None:
        """Offer a holding; one of the same digest and rank is replaced and its watchers are sent away."""
        key = (holding.manifest.digest, holding.rank)
        with self._lock:
            replaced = self._held.get(key)
            self._held[key] = holding
        self._wake_watchers(replaced)

    def remove(self, digest: str, *, rank: int = DEVICE_RANK) -> None:
        """Withdraw a holding: its watchers are told ABORTED. Unknown ones succeed.

        Call it before `RegionTable.remove`, so that watchers go elsewhere instead of being refused.
        """
        with self._lock:
            removed = self._held.pop((digest, rank), None)
        self._wake_watchers(removed)

    def get(self, digest: str, *, rank: int | None = None) -> Holding | None:
        """The holding of a checkpoint, if there is one; without a rank the one that peers are given.

        Complete ones come first, so nobody who could read a disk is made to wait for a copy that is still filling.
        """
        with self._lock:
            if rank is not None:
                return self._held.get((digest, rank))
            found = [holding for (held, _), holding in self._held.items() if held == digest]
        return max(found, key=lambda holding: (holding.residency.complete, holding.rank), default=None)

    def followers(self, holding: Holding) -> int:
        """How many peers follow it at the moment."""
        with self._lock:
            return sum(1 for watched, _ in self._watchers.values() if watched is holding)

    @property
    def watchers(self) -> int:
        """How many peers follow a holding at the moment."""
        with self._lock:
            return len(self._watchers)

    async def get_manifest(
        self, request: peer_pb2.GetManifestRequest, context: _ManifestContext
    ) -> peer_pb2.GetManifestResponse:
        """Body of PeerService.GetManifest."""
        holding = self.get(request.digest)
        if holding is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"checkpoint {request.digest} is not held here")
        return peer_pb2.GetManifestResponse(manifest_json=holding.manifest.to_json(), files=holding.files)

    async def describe_regions(
        self, request: peer_pb2.DescribeRegionsRequest, context: _DescribeContext
    ) -> peer_pb2.DescribeRegionsResponse:
        """Body of PeerService.DescribeRegions."""
        holding = self.get(request.digest)
        if holding is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"checkpoint {request.digest} is not held here")
        if self.describe is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no one-sided reads here")
        try:
            return await asyncio.to_thread(self.describe, holding.regions)
        except AgentError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

    async def watch_residency(
        self, request: peer_pb2.WatchResidencyRequest, context: _Context
    ) -> AsyncIterator[peer_pb2.WatchResidencyResponse]:
        """Body of PeerService.WatchResidency: an async generator, all segments first, then what changed.

        Delegate with `async for message in holdings.watch_residency(request, context): yield message`.
        """
        holding = self.get(request.digest, rank=MEMORY_RANK if request.host_memory else None)
        if holding is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"checkpoint {request.digest} is not held here")
        woken = asyncio.Event()
        forget = self._watch(holding, asyncio.get_running_loop(), woken)
        try:
            version = -1
            while self.get(request.digest, rank=holding.rank) is holding:
                woken.clear()
                version, changed = holding.residency.snapshot(since=version)
                if changed:
                    yield _residency_message(holding, changed)
                await woken.wait()
                await asyncio.sleep(COALESCE_S)
        finally:
            forget()
        await context.abort(grpc.StatusCode.ABORTED, f"checkpoint {request.digest} is being released here")

    def _watch(
        self, holding: Holding, loop: asyncio.AbstractEventLoop, woken: asyncio.Event
    ) -> Callable[[], None]:
        """Set `woken` when the residency changes or the holding goes; returns how to stop that."""

        def wake() -> None:
            # A loop that is closing has no watcher left to wake.
            if not loop.is_closed():
                loop.call_soon_threadsafe(woken.set)

        with self._lock:
            key = self._next_watcher
            self._next_watcher += 1
            self._watchers[key] = (holding, wake)
        unsubscribe = holding.residency.subscribe(wake)

        def forget() -> None:
            unsubscribe()
            with self._lock:
                self._watchers.pop(key, None)

        return forget

    def _wake_watchers(self, holding: Holding | None) -> None:
        with self._lock:
            wakes = [wake for watched, wake in self._watchers.values() if watched is holding]
        for wake in wakes:
            wake()


def _residency_message(holding: Holding, changed: Mapping[int, bytes]) -> peer_pb2.WatchResidencyResponse:
    return peer_pb2.WatchResidencyResponse(
        segments=[
            peer_pb2.SegmentResidency(
                segment=segment,
                region=peer_pb2.Region(
                    region_id=holding.regions[segment].region_id,
                    epoch=holding.regions[segment].epoch,
                    size_bytes=holding.regions[segment].nbytes,
                ),
                verified_chunks=bitmap,
            )
            for segment, bitmap in changed.items()
        ]
    )
