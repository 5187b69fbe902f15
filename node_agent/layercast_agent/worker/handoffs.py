"""Moves a request's state between replicas: bytes into a region here, bytes out of a peer's region there.

The giver keeps a lease until the taker says what became of it. Whatever goes wrong in between, the request stays
whole: a lease that nobody closes is taken back, and tokens depend only on (prompt, sampling, position), so even two
owners could not make a client see a different answer.
"""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import dataclass

import torch
from layercast.peer.v1alpha1 import peer_pb2 as pb

from layercast_agent.engine.engine import Engine
from layercast_agent.engine.sequence import Sequence
from layercast_agent.errors import AgentError, CorruptChunkError
from layercast_agent.regions import RegionRef, RegionTable
from layercast_agent.tls import Tls
from layercast_agent.transport.tcp import read_region
from layercast_agent.worker import wire

LEASE_S = 10.0
"""How long a taker may be silent before the giver owns the request again."""

READ_DEADLINE_S = 5.0
"""For one request's state; megabytes at most."""

REMOVE_DEADLINE_S = 5.0
"""How long a reader may hold a region that is being freed."""


class StateBytes:
    """A request's exported state as memory that a peer may read."""

    def __init__(self, state: torch.Tensor) -> None:
        self._view = memoryview(state.cpu().numpy().data)
        self.nbytes = len(self._view)

    def view(self, offset: int, nbytes: int) -> memoryview:
        return self._view[offset : offset + nbytes]

    @property
    def crc32(self) -> int:
        return zlib.crc32(self._view)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A request between two replicas; times in seconds of the monotonic clock."""

    seq: Sequence
    layers_done: int
    memory: StateBytes | None
    region: RegionRef | None
    expires_at: float


class HandoffShelf:
    """Requests that were given away and not yet released. Used on the asyncio thread only."""

    def __init__(self, table: RegionTable) -> None:
        self._table = table
        self._leases: dict[str, Lease] = {}

    def put(
        self, seq: Sequence, *, layers_done: int, state: torch.Tensor | None, model: str, now: float
    ) -> pb.Handoff:
        """Opens a lease and describes it for the taker."""
        memory = StateBytes(state) if state is not None else None
        region = self._table.add(memory) if memory is not None else None
        self._leases[seq.request_id] = Lease(
            seq=seq, layers_done=layers_done, memory=memory, region=region, expires_at=now + LEASE_S
        )
        handoff = pb.Handoff(
            request=wire.request_of(seq, model=model),
            layers_done=layers_done,
            positions=len(seq.prompt) + len(seq.generated),
        )
        if memory is not None and region is not None:
            handoff.crc32 = memory.crc32
            handoff.state.CopyFrom(
                pb.Region(region_id=region.region_id, epoch=region.epoch, size_bytes=region.nbytes)
            )
        return handoff

    def close(self, request_id: str) -> Lease | None:
        """Ends a lease and frees its region once nobody reads it; None when there was none."""
        lease = self._leases.pop(request_id, None)
        if lease is not None and lease.region is not None:
            region_id = lease.region.region_id
            asyncio.get_running_loop().run_in_executor(
                None, lambda: self._table.remove(region_id, deadline_s=REMOVE_DEADLINE_S)
            )
        return lease

    def expired(self, now: float) -> list[str]:
        """Requests whose taker has been silent for too long."""
        return [request_id for request_id, lease in self._leases.items() if lease.expires_at <= now]

    def __len__(self) -> int:
        return len(self._leases)


def region_message(region: RegionRef) -> pb.Region:
    """A region as peers are told of it."""
    return pb.Region(region_id=region.region_id, epoch=region.epoch, size_bytes=region.nbytes)


async def fetch_state(
    handoff: pb.Handoff, *, giver: pb.Peer, token: bytes, tls: Tls | None
) -> bytearray | None:
    """The state's bytes, checked; None when the handoff carries none and the taker recomputes.

    Raises PeerError when the giver is gone, refuses, or the bytes are not what it said.
    """
    if not handoff.HasField("state"):
        return None
    region = RegionRef(
        region_id=handoff.state.region_id, epoch=handoff.state.epoch, nbytes=handoff.state.size_bytes
    )
    data = await asyncio.to_thread(
        read_region,
        giver.data_address,
        token=token,
        tls=tls,
        region=region,
        deadline_s=READ_DEADLINE_S,
    )
    if zlib.crc32(data) != handoff.crc32:
        raise CorruptChunkError(
            f"the state of request {handoff.request.request_id} from {giver.peer_id} does not match its checksum"
        )
    return data


def admit(engine: Engine, seq: Sequence, *, layers_done: int, state: bytearray | memoryview | None) -> None:
    """Queues a request that came with its state, wholly or not at all. On the engine thread; raises AgentError."""
    engine.add(seq)
    if state is None:
        return
    try:
        engine.import_state(seq, layers_done, state)
    except AgentError:
        engine.release(seq)
        raise
