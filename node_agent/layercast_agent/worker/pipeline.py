"""The leader of an execution pipeline: serves requests before any replica has the whole model.

One task of a replica that loads while nobody complete serves. It watches which layers the members of the pipeline
hold, and as soon as all of them together hold every layer (`pipelines.plan_pipeline`) it takes waiting requests and
sends their hidden states from stage to stage, token by token. A request keeps its stages, because their KV lies
there. When the leader is complete, each request goes on alone, between two tokens: with its KV read from the stages,
or with its prefix computed again, whichever is estimated to be shorter (`pipelines.fetch_is_shorter`).

A member that fails costs its requests a new start on the next pipeline, or here once the leader is complete; their
tokens stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from itertools import count

import grpc
import torch
from layercast.peer.v1alpha1 import peer_pb2 as pb

from layercast_agent.engine.engine import Engine
from layercast_agent.engine.sequence import Sequence, TokenEvent
from layercast_agent.errors import AgentError
from layercast_agent.layout import Manifest
from layercast_agent.pipelines import Stage, SwitchCosts, fetch_is_shorter, fetch_s, plan_pipeline
from layercast_agent.worker.desk import RequestDesk
from layercast_agent.worker.engine_loop import EngineLoop
from layercast_agent.worker.handoffs import admit
from layercast_agent.worker.rates import Compared
from layercast_agent.worker.stage_host import StageCall, StageHost

log = logging.getLogger(__name__)

IN_FLIGHT_MAX = 8
"""Requests on the way at once: enough to keep every stage busy."""

WATCH_AGAIN_S = 0.2
"""Before a member that could not be watched is tried again."""

POLL_S = 0.05
"""How often the leader looks for requests when nothing wakes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a request's layers run, for its whole life in the pipeline."""

    session: str
    stages: tuple[Stage, ...]


class Pipeline:
    """Leads. Used on the asyncio thread only."""

    def __init__(
        self,
        *,
        me: pb.Peer,
        members: Ordered[pb.Peer],
        manifest: Manifest,
        loop: EngineLoop,
        desk: RequestDesk,
        host: StageHost,
        row_bytes: int,
        positions_max: int,
        bytes_per_s: Callable[[], float],
        emit: Callable[[list[TokenEvent]], None],
    ) -> None:
        """`row_bytes` is the KV of one position in one layer; `bytes_per_s` how fast a peer is read now."""
        self._me = me
        self._peers = {peer.peer_id: peer for peer in (*members, me)}
        self._manifest = manifest
        self._layers = manifest.layers
        self._loop = loop
        self._desk = desk
        self._host = host
        self._row_bytes = row_bytes
        self._positions_max = positions_max
        self._bytes_per_s = bytes_per_s
        self._emit = emit
        self._resident: dict[str, set[int]] = {peer: set() for peer in self._peers}
        self._names = count()
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watches: list[asyncio.Task[None]] = []
        self._running = False
        self._generating: set[str] = set()
        self.served = 0
        self.fetched = 0
        self.recomputed = 0
        self.resumes = Compared()

    async def run(self) -> None:
        """Leads until this replica is complete and its last request has gone over to the engine."""
        self._watches += [asyncio.create_task(self._watch(peer)) for peer in self._members()]
        self._running = True
        try:
            while not (self._loop.complete and not self._generating):
                self._look_here()
                stages = plan_pipeline(self._resident, layers=self._layers, leader=self._me.peer_id)
                if stages is not None and self._can_lead():
                    await self._take(stages)
                await self._pause()
            # What is left are the ends of sessions at members: without them their pages would wait for a timeout.
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            self._running = False
            for task in (*self._watches, *self._tasks):
                task.cancel()
            await asyncio.gather(*self._watches, *self._tasks, return_exceptions=True)

    def admit(self, peer: pb.Peer) -> None:
        """One more member, for the requests that are taken from now on. Idempotent by name."""
        if not self._running or peer.peer_id in self._peers:
            return
        self._peers[peer.peer_id] = peer
        self._resident[peer.peer_id] = set()
        self._watches.append(asyncio.create_task(self._watch(peer)))
        log.info("a pipeline has a new member", extra={"peer": peer.peer_id, "members": len(self._peers) - 1})

    def wake(self) -> None:
        """Something changed here: a segment or a request arrived."""
        self._wake.set()

    def _members(self) -> list[pb.Peer]:
        return [peer for peer in self._peers.values() if peer.peer_id != self._me.peer_id]

    def _can_lead(self) -> bool:
        """Embedding and head are the leader's own; once it is complete its engine takes what waits."""
        return not self._loop.complete and self._loop.has(0) and self._loop.has(self._layers + 1)

    def _look_here(self) -> None:
        self._resident[self._me.peer_id] = {
            layer for layer in range(self._layers) if self._loop.has(layer + 1)
        }

    async def _pause(self) -> None:
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                await self._wake.wait()

    async def _watch(self, peer: pb.Peer) -> None:
        """Learns which layers a member holds; a member that is away holds none."""
        while True:
            try:
                await self._follow(peer)
            except grpc.aio.AioRpcError as error:
                log.info("a member is not watched", extra={"peer": peer.peer_id, "reason": error.details()})
            self._resident[peer.peer_id].clear()
            await asyncio.sleep(WATCH_AGAIN_S)

    async def _follow(self, peer: pb.Peer) -> None:
        """Until the member's stream ends."""
        request = pb.WatchResidencyRequest(digest=self._manifest.digest)
        async for message in self._host.stub(peer).WatchResidency(request):
            held = (item.segment - 1 for item in message.segments if self._holds_layer(item))
            self._resident[peer.peer_id].update(held)
            self._wake.set()

    def _holds_layer(self, item: pb.SegmentResidency) -> bool:
        complete = _ones(item.verified_chunks) == self._manifest.chunk_count(item.segment)
        return complete and 0 < item.segment <= self._layers

    async def _take(self, stages: tuple[Stage, ...]) -> None:
        """Takes waiting requests into the pipeline, the earliest first."""
        room = IN_FLIGHT_MAX - len(self._generating)
        if room <= 0 or not self._loop.view.load.requests_waiting:
            return
        for seq in await self._desk.ask(lambda engine: _release_earliest(engine, room)):
            self._generating.add(seq.request_id)
            place = Placement(session=f"{self._me.peer_id}/{next(self._names)}", stages=stages)
            self._spawn(self._serve(seq, place))

    async def _serve(self, seq: Sequence, place: Placement) -> None:
        """One request, from its first layer here to its end, or to where the engine takes over."""
        computed = 0
        try:
            while self._owned(seq) and not self._loop.complete:
                event = await self._next_token(seq, place, computed)
                computed = seq.prefix_length - 1
                if not self._owned(seq):
                    return
                self._emit([event])
                self.served += 1
                if event.finish is not None:
                    return
            if self._owned(seq):
                await self._go_alone(seq, place, computed)
        except AgentError as error:
            log.info("a pipeline failed a request", extra={"request": seq.request_id, "reason": str(error)})
            if self._owned(seq):
                await self._requeue(seq)
        finally:
            self._generating.discard(seq.request_id)
            self._wake.set()
            self._spawn(self._end(place))

    async def _next_token(self, seq: Sequence, place: Placement, computed: int) -> TokenEvent:
        hidden = await asyncio.wrap_future(self._loop.execute(lambda engine: engine.embedding(seq, computed)))
        call = StageCall(
            session=place.session,
            digest=self._manifest.digest,
            start=computed,
            positions_max=min(self._positions_max, len(seq.prompt) + seq.sampling.max_tokens),
            stages=tuple(
                pb.StageRange(peer=self._peers[stage.peer_id], first=stage.first, last=stage.last)
                for stage in place.stages
            ),
        )
        result = await self._host.through(call, hidden)
        return await asyncio.wrap_future(
            self._loop.execute(lambda engine: engine.choose(seq, result[-1:].to(engine.model.device)))
        )

    # Mode switch

    async def _go_alone(self, seq: Sequence, place: Placement, computed: int) -> None:
        """The leader is complete: the request becomes an ordinary one of its engine."""
        began = time.monotonic()
        away = [stage for stage in place.stages if stage.peer_id != self._me.peer_id]
        costs = SwitchCosts(
            positions=computed,
            remote_bytes=sum(stage.last - stage.first for stage in away) * computed * self._row_bytes,
            prefill_tokens_per_s=self._loop.view.prefill_tokens_per_s,
            bytes_per_s=self._bytes_per_s(),
        )
        state = None
        if computed and fetch_is_shorter(costs):
            with contextlib.suppress(AgentError):
                state = await self._gather(place, computed)
        if state is None:
            await self._requeue(seq)
            self.recomputed += 1
        else:
            await self._desk.ask(lambda engine: engine.adopt(seq, state, computed))
            self.fetched += 1
            self.resumes = self.resumes.with_one(
                predicted_s=fetch_s(costs), actual_s=time.monotonic() - began
            )
        log.info(
            "a request left its pipeline",
            extra={
                "request": seq.request_id,
                "by": "recomputation" if state is None else "handoff",
                "seconds": round(time.monotonic() - began, 4),
            },
        )

    async def _gather(self, place: Placement, positions: int) -> torch.Tensor:
        """KV of all layers at the first `positions`, uint8, as `Engine.adopt` wants it. Raises AgentError."""
        parts = []
        for stage in place.stages:
            request = pb.ReadStageRequest(
                session=place.session, first=stage.first, last=stage.last, positions=positions
            )
            parts.append(await self._host.fetch(self._peers[stage.peer_id], request))
        return torch.cat(parts)

    async def _requeue(self, seq: Sequence) -> None:
        """Back into this replica's queue with its tokens and nothing else; to its gateway when there is no room."""
        try:
            await self._desk.ask(lambda engine: admit(engine, seq, layers_done=0, state=None))
        except AgentError as error:
            self._desk.give_back([seq], reason=str(error))

    async def _end(self, place: Placement) -> None:
        peers = {stage.peer_id for stage in place.stages}
        await asyncio.gather(*(self._host.end_at(self._peers[peer], place.session) for peer in peers))

    def _owned(self, seq: Sequence) -> bool:
        return self._desk.holds(seq)

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _release_earliest(engine: Engine, room: int) -> list[Sequence]:
    taken = sorted(engine.waiting, key=lambda seq: seq.order)[:room]
    for seq in taken:
        engine.release(seq)
        seq.reset()
    return taken


def _ones(bitmap: bytes) -> int:
    return int.from_bytes(bitmap, "little").bit_count()
