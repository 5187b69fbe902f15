"""The requests that this replica owns, and what their gateways are told.

Lives on the asyncio thread. A request is owned from its `Accepted` to its end: finished, cancelled, given back, or
handed off. Whoever owns a request answers for it; whoever does not keeps no trace of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from layercast.engine.v1alpha1 import engine_pb2 as pb

from layercast_agent.engine.engine import Engine
from layercast_agent.engine.sequence import Sequence, TokenEvent
from layercast_agent.errors import RequestError
from layercast_agent.worker import wire
from layercast_agent.worker.engine_loop import EngineLoop
from layercast_agent.worker.streams import GatewayStreams

log = logging.getLogger(__name__)

T = TypeVar("T")


class RequestDesk:
    """Takes requests in, gives tokens out."""

    def __init__(self, *, replica_id: str, model: str, loop: EngineLoop, streams: GatewayStreams) -> None:
        self.replica_id = replica_id
        self.model = model
        self.owned: dict[str, Sequence] = {}
        self.first_token_at: float | None = None
        self.on_first_token: Callable[[str], None] = lambda request_id: None
        self.divert: Callable[[Sequence], bool] = lambda seq: False
        self.on_own: Callable[[Sequence], None] = lambda seq: None
        self._started: set[str] = set()
        self._unannounced: dict[str, int] = {}
        self._moved_here: set[str] = set()
        self._emptied = asyncio.Event()
        self._loop = loop
        self._streams = streams
        self._refusal = ""

    @property
    def refuses(self) -> bool:
        """Nothing new is taken: the replica is about to end."""
        return bool(self._refusal)

    def refuse_new(self, reason: str) -> None:
        """From now on new requests go straight back to their gateways."""
        self._refusal = reason

    def submit(self, request: pb.Request) -> None:
        """A gateway's Submit: idempotent by (request id, attempt)."""
        seq = wire.sequence_of(request)
        if not self.make_way(seq):
            self._resend(self.owned[seq.request_id])
            return
        refusal = self._refusal or (
            ""
            if request.model == self.model
            else f"this replica serves {self.model!r}, not {request.model!r}"
        )
        if refusal:
            self._streams.send(seq.gateway_id, [wire.returned(seq, reason=refusal)])
            return
        self._admit(request, seq)

    def _admit(self, request: pb.Request, seq: Sequence) -> None:
        """Never waits for the engine: a stream's next command must not queue behind a long step."""
        try:
            self._loop.check(seq)
        except RequestError as error:
            self._streams.send(seq.gateway_id, [wire.refused(request, message=str(error))])
            return
        self.own(seq, layers_done=0)
        self.announce(seq)
        if not self.divert(seq):
            self.enqueue(seq)

    def enqueue(self, seq: Sequence) -> None:
        """Puts an owned request into the engine's queue; it goes back to its gateway when there is no room."""
        added = asyncio.wrap_future(self._loop.call(lambda engine: engine.add(seq)))
        added.add_done_callback(lambda done: self._added(seq, done))

    def _added(self, seq: Sequence, done: asyncio.Future[None]) -> None:
        error = None if done.cancelled() else done.exception()
        if error is not None:
            self.give_back([seq], reason=str(error))

    def embed(self, seq: Sequence) -> torch.Tensor:
        """See `EngineLoop.embed`."""
        return self._loop.embed(seq)

    def make_way(self, seq: Sequence) -> bool:
        """Ends an older attempt of a request that comes in; False when it, or a newer one, is here already."""
        mine = self.owned.get(seq.request_id)
        if mine is None:
            return True
        if mine.attempt >= seq.attempt:
            return False
        self.cancel(mine.request_id, mine.attempt)
        return True

    def own(self, seq: Sequence, *, layers_done: int, moved: bool = False) -> bool:
        """The request is about to enter the engine; its gateway hears of it with `announce`.

        `moved`: it ran elsewhere, and its gateway is told all its tokens again. False: see `make_way`.
        """
        if not self.make_way(seq):
            return False
        self.owned[seq.request_id] = seq
        if moved:
            self._moved_here.add(seq.request_id)
        self._unannounced[seq.request_id] = layers_done
        self.on_own(seq)
        return True

    def announce(self, seq: Sequence) -> None:
        """Tells the gateway who owns the request; once, and always before its first token."""
        layers_done = self._unannounced.pop(seq.request_id, None) if self.holds(seq) else None
        if layers_done is not None:
            events = [wire.accepted(seq, replica_id=self.replica_id, layers_done=layers_done)]
            # The tokens of whoever had it before come on another stream, maybe later than the next one from here.
            so_far = wire.tokens_so_far(seq) if seq.request_id in self._moved_here else None
            self._moved_here.discard(seq.request_id)
            self._streams.send(seq.gateway_id, [*events, *([so_far] if so_far is not None else [])])

    def can_reach(self, gateway_id: str) -> bool:
        """Whether tokens for that gateway have a way out of here."""
        return self._streams.connected(gateway_id)

    def holds(self, seq: Sequence) -> bool:
        """Whether this very attempt is owned: its gateway may have ended it, or begun a newer one here."""
        return self.owned.get(seq.request_id) is seq

    def disown(self, seq: Sequence) -> bool:
        """Forgets an attempt that ended or belongs to another replica now; False when it was not owned any more."""
        if not self.holds(seq):
            return False
        del self.owned[seq.request_id]
        self._started.discard(seq.request_id)
        self._unannounced.pop(seq.request_id, None)
        self._moved_here.discard(seq.request_id)
        if not self.owned:
            self._emptied.set()
        return True

    async def wait_empty(self, deadline_s: float) -> None:
        """Returns when nothing is owned, or when the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while self.owned:
                    self._emptied.clear()
                    await self._emptied.wait()

    def cancel(self, request_id: str, attempt: int) -> None:
        """A gateway's Cancel."""
        seq = self.owned.get(request_id)
        if seq is None or seq.attempt > attempt:
            return
        self.disown(seq)
        self._loop.call(lambda engine: engine.cancel(request_id))

    def cancel_gateway(self, gateway_id: str) -> None:
        """The gateway is gone for good: so are its requests."""
        for seq in [s for s in self.owned.values() if s.gateway_id == gateway_id]:
            self.cancel(seq.request_id, seq.attempt)

    def give_back(self, sequences: Iterable[Sequence], *, reason: str) -> None:
        """Returns requests, already out of the engine, to their gateways; newer attempts of them stay."""
        for seq in sequences:
            if self.disown(seq):
                self._streams.send(seq.gateway_id, [wire.returned(seq, reason=reason)])

    async def return_waiting(
        self, reason: str, *, which: Callable[[Sequence], bool] = lambda seq: True
    ) -> None:
        """Gives back what waits in the engine, or those of them that are meant."""

        def release(engine: Engine) -> list[Sequence]:
            waiting = [seq for seq in engine.waiting if which(seq)]
            for seq in waiting:
                engine.release(seq)
            return waiting

        self.give_back(await self.ask(release), reason=reason)

    async def return_all(self, reason: str) -> None:
        """Gives back everything that this replica owns, with the tokens that it produced."""
        sequences = list(self.owned.values())

        def release(engine: Engine) -> None:
            for seq in sequences:
                engine.cancel(seq.request_id)

        await self.ask(release)
        self.give_back(sequences, reason=reason)

    def tokens(self, events: list[TokenEvent]) -> None:
        """One step's tokens, on their way from the engine thread to the gateways."""
        mine = [event for event in events if self._is_mine(event)]
        for event in mine:
            if event.request_id not in self._started:
                self._started.add(event.request_id)
                self.announce(self.owned[event.request_id])
                self.first_token_at = self.first_token_at or time.time()
                self.on_first_token(event.request_id)
        for gateway_id, batch in wire.events_by_gateway(mine).items():
            self._streams.send(gateway_id, batch)
        for event in mine:
            if event.finish is not None or event.error:
                self.disown(self.owned[event.request_id])

    def _is_mine(self, event: TokenEvent) -> bool:
        """False for a request that ended or left meanwhile, and for an attempt that was replaced."""
        seq = self.owned.get(event.request_id)
        return seq is not None and seq.attempt == event.attempt

    async def ask(self, function: Callable[[Engine], T]) -> T:
        """Runs a function on the engine thread and waits for its result."""
        return await asyncio.wrap_future(self._loop.call(function))

    def tell(self, function: Callable[[Engine], None]) -> None:
        """Runs a function on the engine thread sometime."""
        self._loop.call(function)

    def _resend(self, seq: Sequence) -> None:
        events = [wire.accepted(seq, replica_id=self.replica_id)]
        so_far = wire.tokens_so_far(seq)
        if so_far is not None:
            events.append(so_far)
        self._streams.send(seq.gateway_id, events)
