"""The source's side of live scale-up: shares its queue with replicas that are still loading.

One task of a complete replica. New and waiting requests are offered to the targets, with the hidden states after
the embedding; shortly before a step ends, the earliest requests, as many as the next one computes, are taken back with
the layers done so far (`live.choose_take` at the target) and finished here, batched with running decodes.

A target that fails is dropped: what it owned is replayed by the gateways, what it did not accept never left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

import grpc
from layercast.peer.v1alpha1 import peer_pb2 as pb
from layercast.peer.v1alpha1 import peer_pb2_grpc

from layercast_agent.engine.engine import Engine
from layercast_agent.engine.sequence import Sequence
from layercast_agent.errors import AgentError, NoCapacityError
from layercast_agent.tls import Tls, aio_channel
from layercast_agent.worker import wire
from layercast_agent.worker.desk import RequestDesk
from layercast_agent.worker.engine_loop import LoopView
from layercast_agent.worker.handoffs import HandoffShelf, admit, fetch_state
from layercast_agent.worker.rates import Mean

log = logging.getLogger(__name__)

CALL_DEADLINE_S = 5.0
"""For OfferHandoffs and TakeHandoff: a layer's time and a state's transfer, with a wide margin."""

POLL_S = 0.02
"""How often an idle source asks again when its targets had nothing for it."""

IDLE_S = 0.1
"""After so long an engine that has nothing really has nothing."""

FULL_BACKOFF_S = 0.2
"""How long a target that had no room is left alone."""

LEAD = 2.0
"""How many times its usual duration a take begins before it must be done: one that is late leaves a step empty."""


@dataclass(slots=True, kw_only=True)
class Link:
    """One target: how to reach it, and what it owns that came from here."""

    peer: pb.Peer
    channel: grpc.aio.Channel
    stub: peer_pb2_grpc.PeerServiceAsyncStub
    outstanding: dict[str, Sequence] = field(default_factory=dict)
    admitting: set[asyncio.Task[None]] = field(default_factory=set)
    full_until: float = 0.0
    asked_at: float = 0.0
    first_token_at: float | None = None

    @property
    def earliest(self) -> Sequence | None:
        """The first of what it owns."""
        return min(self.outstanding.values(), key=lambda seq: seq.order, default=None)


class Cooperation:
    """Shares the queue of one source with any number of targets. Used on the asyncio thread only."""

    def __init__(
        self,
        *,
        me: pb.Peer,
        token: bytes,
        tls: Tls | None,
        desk: RequestDesk,
        shelf: HandoffShelf,
        look: Callable[[], LoopView],
    ) -> None:
        self._me = me
        self._token = token
        self._tls = tls
        self._desk = desk
        self._shelf = shelf
        self._look = look
        self._taken_in_step = -1
        self._taken_tokens = 0
        self._taken_at = 0.0
        self._take_times = Mean()
        self._tasks: set[asyncio.Task[None]] = set()
        self._links: dict[str, Link] = {}
        self._offers: deque[Sequence] = deque()
        self._taken_from: dict[str, str] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._releasing: asyncio.Task[None] | None = None
        self.given = 0
        self.taken = 0

    @property
    def active(self) -> bool:
        return bool(self._links)

    @property
    def offered(self) -> list[Sequence]:
        """Requests that wait to be offered."""
        return list(self._offers)

    def add_target(self, peer: pb.Peer) -> None:
        """Starts cooperation with a target; a repeat changes nothing."""
        if peer.peer_id in self._links:
            return
        channel = aio_channel(peer.address, self._tls)
        stub = peer_pb2_grpc.PeerServiceStub(channel)
        self._links[peer.peer_id] = Link(peer=peer, channel=channel, stub=stub)
        log.info("cooperation with a target begins", extra={"target": peer.peer_id})
        if self._task is None or self._task.done():
            self._releasing = asyncio.create_task(self._release_waiting())
            self._task = asyncio.create_task(self._run())
        self._wake.set()

    def divert(self, seq: Sequence) -> bool:
        """Takes a new request for the targets; False when nobody cooperates."""
        if not self._links:
            return False
        self._offers.append(seq)
        self._wake.set()
        return True

    def wake(self) -> None:
        """Something changed: the engine finished a turn, or the first token of a request went out."""
        self._wake.set()

    def first_token(self, request_id: str) -> None:
        """The first token of a request went out; its giver is told with the next take."""
        link = self._links.get(self._taken_from.pop(request_id, ""))
        if link is not None and link.first_token_at is None:
            link.first_token_at = time.time()

    async def close(self) -> list[Sequence]:
        """Ends all cooperation; returns the requests that were not offered yet."""
        for target in list(self._links):
            self._drop(target, reason="this replica stops cooperating")
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._releasing is not None:  # what the engine lets go would be nobody's
            await self._releasing
        await asyncio.gather(*self._tasks, return_exceptions=True)
        offers, self._offers = list(self._offers), deque()
        return offers

    async def _release_waiting(self) -> None:
        """What waits in the engine is offered too, from its next boundary on: a step of prompts takes a while."""
        with contextlib.suppress(NoCapacityError):  # the engine is being stopped, and gives back what it has
            self._offers.extendleft(reversed(await self._desk.ask(_release_fresh)))
        self._wake.set()

    async def _run(self) -> None:
        while self._links:
            await self._share()
            if self._releasing is not None:
                await self._releasing
        self._reclaim()

    async def _share(self) -> None:
        """Gives and takes until no target is left."""
        while self._links:
            if await self._offer_next() or await self._take_next():
                continue
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._wake.wait()

    def _reclaim(self) -> None:
        """Nobody is left to help: the requests are this replica's own again."""
        while self._offers:
            self._keep(self._offers.popleft())

    def _keep(self, seq: Sequence) -> None:
        if self._desk.holds(seq):
            self._desk.enqueue(seq)

    async def _offer_next(self) -> bool:
        """Offers one request to the target that owns the fewest; False when none could be."""
        now = time.monotonic()
        able = [link for link in self._links.values() if link.full_until <= now]
        if not self._offers:
            return False
        if not able:
            return self._keep_one_when_idle()
        link = min(able, key=lambda link: (len(link.outstanding), link.peer.peer_id))
        seq = self._offers.popleft()
        if self._desk.holds(seq):
            await self._offer(link, seq)
        return True

    def _keep_one_when_idle(self) -> bool:
        """Targets are full: an idle source does not wait for them."""
        if not self._has_room(self._offers[0].prefix_length):
            return False
        self._count_taken(self._offers[0].prefix_length)
        self._keep(self._offers.popleft())
        return True

    def _has_room(self, tokens: int) -> bool:
        """Whether the step after this one has room for half of so many prompt tokens more.

        So a step never begins without prompts while some wait, and is as full as any: what a source would compute
        without any help is what it computes with it, less the layers that were gathered meanwhile, and cooperation is
        never the slower way. A prompt of more than one step leaves no room. Judged by what the running step began with.
        """
        view = self._look()
        taken = self._taken_tokens if view.begun == self._taken_in_step else 0
        if view.load.requests_waiting + view.load.requests_running == 0:
            # Idle; what was taken a moment ago may not show yet.
            if time.monotonic() - self._taken_at > IDLE_S:
                return True
            return taken + min(tokens, view.step_tokens_max) <= view.step_tokens_max
        return view.room - taken >= max(1, min(tokens, view.step_tokens_max) // 2)

    def _is_time(self, tokens: int) -> bool:
        """Whether the running step ends soon: until then requests gather layers where they are (docs/adr/0030)."""
        if not self._take_times.samples:
            return True
        view = self._look()
        takes = max(1, view.step_tokens_max // max(1, tokens))
        return time.monotonic() >= view.ends_at - LEAD * takes * self._take_times.seconds

    def _count_taken(self, tokens: int) -> None:
        begun = self._look().begun
        self._taken_tokens = tokens + (self._taken_tokens if begun == self._taken_in_step else 0)
        self._taken_in_step, self._taken_at = begun, time.monotonic()

    async def _offer(self, link: Link, seq: Sequence) -> None:
        handoff = await self._shelve_embedding(seq)
        request = pb.OfferHandoffsRequest(source=self._me, handoffs=[handoff])
        try:
            answer = await link.stub.OfferHandoffs(request, timeout=CALL_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            self._drop(link.peer.peer_id, reason=error.details() or error.code().name)
            answer = pb.OfferHandoffsResponse()
        finally:
            self._shelf.close(seq.request_id)
        if seq.request_id in answer.accepted_request_ids:
            self._desk.disown(seq)
            link.outstanding[seq.request_id] = seq
            self.given += 1
            return
        self._offers.appendleft(seq)
        if answer.complete:
            self._drop(link.peer.peer_id, reason="it is complete")
        else:
            link.full_until = time.monotonic() + FULL_BACKOFF_S

    async def _shelve_embedding(self, seq: Sequence) -> pb.Handoff:
        state = await asyncio.to_thread(self._desk.embed, seq)
        return self._shelf.put(seq, layers_done=0, state=state, model=self._desk.model, now=time.monotonic())

    async def _take_next(self) -> bool:
        """Takes the earliest request when the running step is about to end and the next one has room for it."""
        link = min(self._links.values(), key=_turn, default=None)
        if link is None or self._offers:
            return False
        earliest = link.earliest
        tokens = 1 if earliest is None else earliest.prefix_length
        if not self._has_room(tokens) or not self._is_time(tokens):
            return False
        began = link.asked_at = time.monotonic()
        request = pb.TakeHandoffRequest(taker=self._me)
        if link.first_token_at is not None:
            request.first_token_at.FromNanoseconds(int(link.first_token_at * 1e9))
        try:
            answer = await link.stub.TakeHandoff(request, timeout=CALL_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            self._drop(link.peer.peer_id, reason=error.details() or error.code().name)
            return True
        if not answer.HasField("handoff"):
            link.outstanding.clear()
            if answer.complete:
                self._drop(link.peer.peer_id, reason="it is complete and nothing waits there")
            return answer.complete
        taken = await self._take(link, answer.handoff)
        self._take_times = self._take_times.after(time.monotonic() - began)
        return taken

    async def _take(self, link: Link, handoff: pb.Handoff) -> bool:
        """Brings a request over; the engine takes it in between two steps, and nobody here waits for that."""
        seq = wire.sequence_of(handoff.request)
        link.outstanding.pop(seq.request_id, None)
        state = None
        try:
            reachable = self._desk.can_reach(seq.gateway_id)
            if reachable:
                state = await fetch_state(handoff, giver=link.peer, token=self._token, tls=self._tls)
        except AgentError as error:
            _not_taken(seq, error)
            reachable = False
        if not reachable:
            await self._release(link, seq, taken=False)
            return False
        if not self._desk.own(seq, layers_done=handoff.layers_done):
            # Its gateway has begun anew here: the giver forgets it.
            await self._release(link, seq, taken=True)
            return True
        self._count_taken(seq.prefix_length)
        admission = self._spawn(self._admit(link, seq, layers_done=handoff.layers_done, state=state))
        link.admitting.add(admission)
        admission.add_done_callback(link.admitting.discard)
        return True

    async def _admit(self, link: Link, seq: Sequence, *, layers_done: int, state: bytearray | None) -> None:
        self._taken_from[seq.request_id] = link.peer.peer_id
        taken = True
        try:
            await self._desk.ask(lambda engine: admit(engine, seq, layers_done=layers_done, state=state))
            self._desk.announce(seq)
            self.taken += 1
        except AgentError as error:
            _not_taken(seq, error)
            self._desk.disown(seq)
            self._taken_from.pop(seq.request_id, None)
            taken = False
        await self._release(link, seq, taken=taken)

    async def _release(self, link: Link, seq: Sequence, *, taken: bool) -> None:
        """Tells the giver what became of its request."""
        release = pb.ReleaseHandoffRequest(request_id=seq.request_id, taken=taken)
        try:
            await link.stub.ReleaseHandoff(release, timeout=CALL_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            self._drop(link.peer.peer_id, reason=error.details() or error.code().name)

    def _drop(self, target: str, *, reason: str) -> None:
        link = self._links.pop(target, None)
        if link is not None:
            log.info("cooperation with a target ends", extra={"target": target, "reason": reason})
            self._spawn(_close(link))

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _close(link: Link) -> None:
    """Ends the connection once the giver was told what became of all that was taken."""
    await asyncio.gather(*link.admitting, return_exceptions=True)
    await link.channel.close()


def _turn(link: Link) -> tuple[float, float]:
    """Who is asked next: who has the earliest request; the one that was asked longest ago where none is known."""
    earliest = link.earliest
    return (earliest.arrived_at if earliest is not None else float("inf"), link.asked_at)


def _not_taken(seq: Sequence, error: AgentError) -> None:
    log.warning("a handoff was not taken", extra={"request": seq.request_id, "reason": str(error)})


def _release_fresh(engine: Engine) -> list[Sequence]:
    fresh = [seq for seq in engine.waiting if seq.layers_done == 0]
    for seq in fresh:
        engine.release(seq)
    return fresh
