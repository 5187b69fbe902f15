"""One replica: a model on this worker's device, from assignment to release.

Puts the parts together: parameter memory that a transfer fills and peers read, the engine and its thread, the desk
of requests, and the two sides of live cooperation. The decisions are elsewhere (`live`, the engine's scheduler, the
operator); this is the dull part that does what was decided, on the asyncio thread unless said otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from collections.abc import Sequence as Ordered

import grpc
import torch
from layercast.agent.v1alpha1 import agent_pb2
from layercast.peer.v1alpha1 import peer_pb2, peer_pb2_grpc

from layercast_agent import live
from layercast_agent.engine.engine import Engine
from layercast_agent.engine.sequence import Sequence, TokenEvent
from layercast_agent.errors import AgentError, NoCapacityError
from layercast_agent.migration import share_out
from layercast_agent.runner import TransferOutcome, TransferRunner, UpstreamSpec
from layercast_agent.tls import aio_channel
from layercast_agent.worker import wire
from layercast_agent.worker.cooperation import Cooperation
from layercast_agent.worker.desk import RequestDesk
from layercast_agent.worker.engine_loop import EngineLoop, live_request
from layercast_agent.worker.handoffs import HandoffShelf, Lease, admit, fetch_state
from layercast_agent.worker.host import WorkerHost
from layercast_agent.worker.loading import ModelMemory
from layercast_agent.worker.moving import Mover
from layercast_agent.worker.onward import Onward
from layercast_agent.worker.pipeline import Pipeline
from layercast_agent.worker.stage_host import StageHost
from layercast_agent.worker.timeline import Timeline

log = logging.getLogger(__name__)

LIVE_REFRESH_S = 1.0
"""How often a live target repeats StartCooperation, which heals whatever the source forgot."""

LEASE_CHECK_S = 0.5
"""How often leases are looked at."""

STOP_DEADLINE_S = 10.0
"""For the engine thread and the transfer to end: a turn, or one chunk."""


class Replica:
    """What a worker does between AssignReplica and UnassignReplica."""

    def __init__(self, *, spec: agent_pb2.StartReplicaRequest, memory: ModelMemory, host: WorkerHost) -> None:
        self.spec, self.role = spec, agent_pb2.REPLICA_ROLE_UNSPECIFIED
        self.memory = memory
        self.state = agent_pb2.REPLICA_STATE_LOADING
        self.error = ""
        self.timeline = Timeline(assigned_at=time.time())
        self.runner: TransferRunner | None = None
        self.preferred_upstream = ""
        self.handoffs_given = 0
        self.handoffs_taken = 0
        self._host = host
        self._me = host.peer(spec.replica_id)
        self._tasks: set[asyncio.Task[None]] = set()
        self._first_layer = asyncio.Event()
        self._aio = asyncio.get_running_loop()
        self.loop = EngineLoop(
            engine=memory.engine,
            layers=memory.shape.layers,
            share=host.share,
            on_tokens=lambda events: self._soon(self._tokens, events),
            on_turn=lambda: self._soon(self._turned),
            on_failure=lambda error: self._soon(self._failed, error),
        )
        self.desk = RequestDesk(
            replica_id=spec.replica_id, model=spec.model, loop=self.loop, streams=host.streams
        )
        self.shelf = HandoffShelf(host.table)
        self.cooperation = Cooperation(
            me=self._me,
            token=host.settings.token,
            tls=host.tls,
            desk=self.desk,
            shelf=self.shelf,
            look=lambda: self.loop.view,
        )
        self.stages = StageHost(
            me=self._me,
            token=host.settings.token,
            tls=host.tls,
            digest=spec.digest,
            loop=self.loop,
            table=host.table,
            dtype=memory.shape.dtype,
        )
        self.mover = Mover(
            me=self._me,
            digest=spec.digest,
            layers=memory.shape.layers,
            row_bytes=memory.shape.kv_row_bytes,
            positions_max=memory.engine.limits.context_length_max,
            desk=self.desk,
            stages=self.stages,
            look=lambda: self.loop.view,
        )
        Onward(desk=self.desk, mover=self.mover, spawn=self._spawn)
        self.pipeline: Pipeline | None = None
        self.desk.divert = self.cooperation.divert
        self.desk.on_first_token = self.cooperation.first_token
        self.loop.start()
        self._spawn(self._watch_leases())

    # Loading

    def begin_transfer(self, request: agent_pb2.StartTransferRequest, upstreams: list[UpstreamSpec]) -> None:
        """Starts the transfer, or gives a running one better upstreams."""
        if self.runner is not None:
            if request.generation > self.runner.status().generation:
                self.preferred_upstream = upstreams[0].peer_id
                self.runner.replace_upstreams(upstreams, request.generation)
                self._begin_early(request)
            return
        self.preferred_upstream = upstreams[0].peer_id
        self.runner = TransferRunner(
            transfer_id=request.transfer_id,
            manifest=self.memory.manifest,
            memories=self.memory.memories,
            residency=self.memory.residency,
            upstreams=upstreams,
            generation=request.generation,
            segment_order=list(request.segment_order) or list(range(len(self.memory.memories))),
            token=self._host.settings.token,
            tls=self._host.tls,
            plane=self._host.plane,
            read_bytes=self._host.read_bytes,
            on_segment=self._on_segment,
            on_end=self._on_transfer_end,
        )
        self._begin_early(request)
        self.runner.start()

    def _begin_early(self, request: agent_pb2.StartTransferRequest) -> None:
        """Executes what it has, as a target or as a leader, when it is asked to and only loads until now."""
        if self.state == agent_pb2.REPLICA_STATE_LOADING and request.HasField("live_source"):
            self.state = agent_pb2.REPLICA_STATE_LIVE
            self._spawn(self._stay_live(request.live_source))
        elif self.state in wire.STATES_BEFORE_LEADING and request.HasField("lead"):  # who led may be gone
            self.state = agent_pb2.REPLICA_STATE_LEADING
            self.pipeline = self._lead(request.lead)
            self._spawn(self.pipeline.run())

    def _lead(self, lead: agent_pb2.Pipeline) -> Pipeline:
        shape = self.memory.shape
        return Pipeline(
            me=self._me,
            members=lead.members,
            manifest=self.memory.manifest,
            loop=self.loop,
            desk=self.desk,
            host=self.stages,
            row_bytes=shape.kv_row_bytes,
            positions_max=self.memory.engine.limits.context_length_max,
            bytes_per_s=lambda: self.runner.status().bytes_per_s if self.runner is not None else 0.0,
            emit=self._tokens,
        )

    def _on_segment(self, segment: int) -> None:
        """On the transfer's thread: a segment is verified, let the engine use it."""
        attached = self.loop.attach(segment, self.memory.tensors(segment))
        attached.add_done_callback(lambda _: self._soon(self._attached))

    def _attached(self) -> None:
        self.timeline.first_segment_at = self.timeline.first_segment_at or time.time()
        if self.memory.residency.layers_resident > 0:
            self._first_layer.set()
        if self.pipeline is not None:
            self.pipeline.wake()
        if self.loop.complete and self.timeline.complete_at is None:
            self.timeline.complete_at = time.time()
            if self.state in wire.STATES_ARRIVING:
                self.state = agent_pb2.REPLICA_STATE_SERVING
            log.info("the replica is complete", extra={"replica": self.spec.replica_id})

    def _on_transfer_end(self, outcome: TransferOutcome) -> None:
        if not outcome.complete and outcome.reason != "cancelled":
            self._soon(self._failed, AgentError(outcome.reason))

    async def _stay_live(self, source: peer_pb2.Peer) -> None:
        """Asks the source to share its queue, from the first resident layer until the last segment."""
        async with aio_channel(source.address, self._host.tls) as channel:
            stub = peer_pb2_grpc.PeerServiceStub(channel)
            request = peer_pb2.StartCooperationRequest(target=self._me, digest=self.spec.digest)
            await self._first_layer.wait()
            while self.state == agent_pb2.REPLICA_STATE_LIVE:
                try:
                    await stub.StartCooperation(request, timeout=LIVE_REFRESH_S)
                except grpc.aio.AioRpcError as error:
                    log.info(
                        "the source does not cooperate",
                        extra={"source": source.peer_id, "reason": error.details()},
                    )
                await asyncio.sleep(LIVE_REFRESH_S)

    # Handoffs, as target and as giver

    async def accept_offers(self, request: peer_pb2.OfferHandoffsRequest) -> peer_pb2.OfferHandoffsResponse:
        """PeerService.OfferHandoffs: queues requests of an overloaded source here."""
        answer = peer_pb2.OfferHandoffsResponse(complete=self.loop.complete)
        shares = self.state == agent_pb2.REPLICA_STATE_LIVE and not self.loop.complete
        serves = self.state == agent_pb2.REPLICA_STATE_SERVING
        for handoff in request.handoffs:
            if (serves if handoff.session else shares) and await self._accept(handoff, giver=request.source):
                answer.accepted_request_ids.append(handoff.request.request_id)
                self.handoffs_taken += 1
        return answer

    async def _accept(self, handoff: peer_pb2.Handoff, *, giver: peer_pb2.Peer) -> bool:
        """Whether its giver may forget it: it is here, or a newer attempt of it is."""
        seq = wire.sequence_of(handoff.request)
        if not self.desk.make_way(seq):
            return True  # a repeat must not fail at fetching a state that was fetched before
        if not self.desk.can_reach(seq.gateway_id):
            return False
        try:
            await self._import(seq, handoff, giver)
        except AgentError as error:
            self.desk.disown(seq)
            log.info("an offer was refused", extra={"request": seq.request_id, "reason": str(error)})
            return False
        self.desk.announce(seq)
        return True

    async def _import(self, seq: Sequence, handoff: peer_pb2.Handoff, giver: peer_pb2.Peer) -> None:
        if handoff.session:
            if not self.desk.own(seq, layers_done=0, moved=True):
                return
            held = await self.desk.ask(lambda engine: engine.moves.settle(seq, handoff.session))
            self.stages.settled(handoff.session)
            log.info("a request moved here", extra={"request": seq.request_id, "positions_held": held})
            return
        state = await fetch_state(handoff, giver=giver, token=self._host.settings.token, tls=self._host.tls)
        if not self.desk.own(seq, layers_done=handoff.layers_done):
            return
        await self.desk.ask(lambda engine: admit(engine, seq, layers_done=handoff.layers_done, state=state))

    async def give(self, request: peer_pb2.TakeHandoffRequest) -> peer_pb2.TakeHandoffResponse:
        """PeerService.TakeHandoff: the earliest waiting request, at the next layer boundary."""
        if request.HasField("first_token_at") and self.timeline.first_token_at is None:
            self.timeline.first_token_at = request.first_token_at.ToNanoseconds() / 1e9
        given = await self.desk.ask(self._release_earliest)
        answer = peer_pb2.TakeHandoffResponse(
            complete=self.loop.complete, waiting=self.loop.view.load.requests_waiting
        )
        if given is not None:
            seq, layers_done, state = given
            handoff = self.shelf.put(
                seq, layers_done=layers_done, state=state, model=self.spec.model, now=time.monotonic()
            )
            answer.handoff.CopyFrom(handoff)
        return answer

    def _release_earliest(self, engine: Engine) -> tuple[Sequence, int, torch.Tensor | None] | None:
        """On the engine thread: chooses, exports and lets go."""
        waiting = list(engine.waiting)
        chosen = live.choose_take((live_request(seq) for seq in waiting), giver_complete=self.loop.complete)
        if chosen is None:
            return None
        seq = next(seq for seq in waiting if seq.request_id == chosen.request_id)
        layers_done = seq.layers_done
        state = engine.export_state(seq) if seq.hidden is not None else None
        engine.release(seq)
        return seq, layers_done, state

    async def release(self, request: peer_pb2.ReleaseHandoffRequest) -> None:
        """PeerService.ReleaseHandoff: the taker owns it now, or it is ours again."""
        lease = self.shelf.close(request.request_id)
        if lease is None:
            return
        if request.taken:
            self.desk.disown(lease.seq)
            self.handoffs_given += 1
        else:
            await self._take_back(lease)

    async def _take_back(self, lease: Lease) -> None:
        seq = lease.seq
        if not self.desk.holds(seq):
            return
        memory = lease.memory
        state = memory.view(0, memory.nbytes) if memory is not None else None
        try:
            await self.desk.ask(lambda engine: admit(engine, seq, layers_done=lease.layers_done, state=state))
        except AgentError as error:
            self.desk.give_back([seq], reason=str(error))

    async def _watch_leases(self) -> None:
        while True:
            await asyncio.sleep(LEASE_CHECK_S)
            await self.stages.expire()
            for request_id in self.shelf.expired(time.monotonic()):
                lease = self.shelf.close(request_id)
                if lease is not None:
                    log.warning("a handoff was never released", extra={"request": request_id})
                    await self._take_back(lease)

    async def set_role(self, role: agent_pb2.ReplicaRole.ValueType) -> None:
        """What runs goes on; prompts that wait here go to those who compute prompts from now on."""
        self.role = role
        if role == agent_pb2.REPLICA_ROLE_DECODE:
            await self.desk.return_waiting("it decodes now", which=lambda seq: seq.decode_at is not None)

    # Ending

    async def begin_drain(self, *, grace_s: float, destinations: Ordered[peer_pb2.Peer] = ()) -> None:
        """Stops new work; running requests move to `destinations` when there are any. Idempotent."""
        if self.state in (agent_pb2.REPLICA_STATE_DRAINING, agent_pb2.REPLICA_STATE_DRAINED):
            return
        self.state = agent_pb2.REPLICA_STATE_DRAINING
        self._spawn(self._drain_unless_stopped(grace_s, destinations))

    async def _drain_unless_stopped(self, grace_s: float, destinations: Ordered[peer_pb2.Peer]) -> None:
        with contextlib.suppress(NoCapacityError):  # `close` gives back what is left
            await self._drain(grace_s, destinations)

    async def _drain(self, grace_s: float, destinations: Ordered[peer_pb2.Peer]) -> None:
        reason = "the replica is being drained"
        self.desk.refuse_new(reason)
        self.desk.give_back(await self.cooperation.close(), reason=reason)
        await self.desk.return_waiting(reason)
        began = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._move_away(destinations)
        await self.desk.wait_empty(max(0.0, grace_s - (time.monotonic() - began)))
        await self.desk.return_all(reason)
        if self.state == agent_pb2.REPLICA_STATE_DRAINING:
            self.state = agent_pb2.REPLICA_STATE_DRAINED

    async def _move_away(self, destinations: Ordered[peer_pb2.Peer]) -> None:
        """All at once: each is in rounds of its own, and what is brought over is a fraction of what goes on here."""
        peers = {peer.peer_id: peer for peer in destinations}
        places = share_out(list(self.desk.owned), list(peers))
        moves = (self.mover.move(self.desk.owned[request], peers[place]) for request, place in places.items())
        for outcome in await asyncio.gather(*moves, return_exceptions=True):
            if isinstance(outcome, Exception):
                log.error("a move ended by an exception", exc_info=outcome)

    async def close(self) -> None:
        """Gives back what is left and frees the device; peers that still read are waited for."""
        reason = "the replica is being stopped"
        self.desk.refuse_new(reason)
        for task in list(self._tasks):
            task.cancel()
        self.desk.give_back(await self.cooperation.close(), reason=reason)
        with contextlib.suppress(AgentError):
            await self.desk.return_all(reason)
        await self.stages.close()
        runner = self.runner
        if runner is not None:
            await asyncio.to_thread(runner.cancel, STOP_DEADLINE_S)
        await asyncio.to_thread(self.loop.stop, deadline_s=STOP_DEADLINE_S)
        await asyncio.to_thread(self.memory.close, deadline_s=STOP_DEADLINE_S)

    # What other threads report

    def _soon(self, function: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the process is ending and its event loop is closed
            self._aio.call_soon_threadsafe(function, *args)

    def _tokens(self, events: list[TokenEvent]) -> None:
        self.desk.tokens(events)
        first = self.desk.first_token_at
        if first is not None and self.timeline.first_token_at is None:
            self.timeline.first_token_at = first

    def _turned(self) -> None:
        self.cooperation.wake()
        if self.pipeline is not None:
            self.pipeline.wake()

    def _failed(self, error: Exception) -> None:
        self.state = agent_pb2.REPLICA_STATE_FAILED
        self.error = f"{type(error).__name__}: {error}"
        self.desk.refuse_new(self.error)
        log.error("the replica failed", extra={"replica": self.spec.replica_id, "reason": self.error})
        self.desk.give_back(list(self.desk.owned.values()), reason=self.error)

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
