"""Brings requests to replicas and their tokens back: the edge around queue, router and replay.

Everything runs in one event loop and no method waits, so there is nothing to lock. Decisions are made elsewhere
(`router.choose`, `replay`); here their instructions are carried out. One loop, `run`, dispatches what waits and acts
on what is due; whatever might change either wakes it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from layercast.engine.v1alpha1 import engine_pb2

from layercast_gateway import replay
from layercast_gateway.alarm import Alarm
from layercast_gateway.counts import demands, occupations
from layercast_gateway.errors import GatewayError, NoReplicaError, ShuttingDownError, UnknownModelError
from layercast_gateway.metrics import Demand, Metrics, ModelSeries
from layercast_gateway.pulse import Pulse
from layercast_gateway.queue import Admission, RequestQueue
from layercast_gateway.replay import Phase, RequestState, Work
from layercast_gateway.replicas import Occupation, Replicas
from layercast_gateway.router import Availability, availability, choose, gives_up_at
from layercast_gateway.routes import EndpointState, ModelRoute, RouteTable
from layercast_gateway.settings import Settings
from layercast_gateway.submission import request_of
from layercast_gateway.tls import Tls

log = logging.getLogger(__name__)

IDLE_S = 60.0
REMOVED_PATIENCE = 5
"""A worker that left the table may be dead without a broken stream: silence counts after so many times `silence_s`."""


TELL_AGAIN_S = 1.0
TOLD_MAX = 4096
"""Cancellations that are remembered; one that is forgotten may be sent again."""


class Sink(Protocol):
    """Who receives the tokens of a request."""

    def on_tokens(self, token_ids: Sequence[int], logprobs: Sequence[engine_pb2.TokenLogprobs]) -> bool:
        """New tokens; True when no more are wanted: the request then ends without a further call."""

    def on_end(self, reason: replay.EndReason) -> None:
        """The request ended well."""

    def on_error(self, error: GatewayError) -> None:
        """The request ended without success."""


@dataclass(slots=True, kw_only=True)
class _Tracked:
    state: RequestState
    sink: Sink
    accepted_at: float
    series: ModelSeries
    last_token_at: float | None = None


class Dispatcher:
    """All requests of this gateway between acceptance and their end."""

    def __init__(
        self, *, settings: Settings, gateway_id: str, metrics: Metrics, tls: Tls | None = None
    ) -> None:
        self._settings = settings
        self._gateway_id = gateway_id
        self._metrics = metrics
        self._table: RouteTable | None = None
        self._queues: dict[str, RequestQueue] = {}
        self._requests: dict[str, _Tracked] = {}
        self._unavailable_since: dict[str, float] = {}
        self._due = 0.0
        self._wake = asyncio.Event()
        self._told: dict[tuple[str, replay.Instruction], float] = {}
        """Who was told to end what nobody waits for, and when to say it again if it is not heard."""
        self.closing = False
        self.changed = Pulse()
        """Fires whenever routes or connections change."""
        self.replicas = Replicas(gateway_id=gateway_id, events=self, tls=tls)

    # --- routes -------------------------------------------------------------------------------------------------

    @property
    def table(self) -> RouteTable | None:
        """The last routing table; None before the first."""
        return self._table

    def route(self, model: str) -> ModelRoute:
        """The route of a model; UnknownModelError, or NoReplicaError before the first table."""
        if self._table is None:
            raise NoReplicaError("This gateway has no routing table yet.")
        if model not in self._table:
            raise UnknownModelError(model)
        return self._table[model]

    def available(self, model: str) -> Availability:
        """Who serves a model, and who will."""
        route = (self._table or {}).get(model)
        return availability(self.replicas.candidates(route) if route else ())

    def on_table(self, table: RouteTable) -> None:
        """Takes a new routing table."""
        if self._table is None:
            log.info("routing table received", extra={"models": sorted(table)})
        self._table = table
        for model in table:
            self._metrics.add_model(model)
        now = time.monotonic()
        left = self.replicas.follow(table)
        for tracked in self._requests.values():
            if tracked.state.owner in left:
                patience_s = REMOVED_PATIENCE * self._settings.silence_s
                replay.watch(tracked.state, now=now, silence_s=patience_s)
        self._routes_changed()

    def _routes_changed(self) -> None:
        now = time.monotonic()
        for model in {*(self._table or {}), *self._queues}:
            found = self.available(model)
            if found.serving or found.coming:
                self._unavailable_since.pop(model, None)
            else:
                self._unavailable_since.setdefault(model, now)
        self.changed.fire()
        self._due = 0.0
        self._wake.set()

    # --- requests -----------------------------------------------------------------------------------------------

    @contextmanager
    def admit(self, model: str, places: int) -> Iterator[Admission]:
        """Keeps places in a model's queue; QueueFullError when there are not as many."""
        queue = self._queues.setdefault(model, RequestQueue(requests_max=self._settings.queue_requests_max))
        admission = Admission(queue, places)
        try:
            yield admission
        finally:
            admission.close()

    def gives_up_at(self, model: str, *, accepted_at: float) -> float | None:
        """When a waiting request is refused because nobody will serve it (monotonic); None: not foreseeable."""
        return gives_up_at(
            arrived_at=accepted_at,
            unavailable_since=self._unavailable_since.get(model),
            wait_s=self._settings.no_replica_wait_s,
        )

    def no_replica(self, model: str) -> NoReplicaError:
        """The error for it, with the operator's reason."""
        route = (self._table or {}).get(model)
        reason = route.message if route is not None and route.message else "none is on its way"
        return NoReplicaError(f"No replica serves the model `{model}`: {reason}.".replace("..", "."))

    def submit(self, work: Work, sink: Sink, *, admission: Admission, accepted_at: float) -> None:
        """Accepts a request: its sink hears of it until it ends. `accepted_at` is monotonic seconds."""
        admission.use()
        state = RequestState(work=work)
        series = self._metrics.of(work.model)
        self._requests[work.request_id] = _Tracked(
            state=state, sink=sink, accepted_at=accepted_at, series=series
        )
        self._queues[work.model].put(work.request_id, arrived_at=work.arrived_at)
        refused_at = self.gives_up_at(work.model, accepted_at=accepted_at)
        self._look_again_at(work.deadline if refused_at is None else min(work.deadline, refused_at))
        self._wake.set()

    def abandon(self, request_id: str) -> None:
        """Nobody wants the rest of a request. Unknown ids succeed."""
        if tracked := self._requests.get(request_id):
            self._carry_out(tracked, replay.abandon(tracked.state))

    def fail_all(self) -> None:
        """Ends every request because this process ends, also those that still wait for a tokenizer."""
        self.closing = True
        self.changed.fire()
        for tracked in [*self._requests.values()]:
            self._carry_out(
                tracked, replay.fail(tracked.state, ShuttingDownError("This gateway is shutting down."))
            )

    def demands(self) -> list[Demand]:
        """Demand by model."""
        reserved = {model: queue.reserved for model, queue in self._queues.items()}
        return demands(self._states(), reserved, models=self._table or ())

    def _states(self) -> Iterator[RequestState]:
        return (tracked.state for tracked in self._requests.values())

    # --- events of the streams ----------------------------------------------------------------------------------

    def on_connected(self, address: str) -> None:
        """A worker can be given requests."""
        log.info("worker connected", extra={"address": address})
        self._routes_changed()

    def on_lost(self, address: str, reason: str) -> None:
        """A worker's stream broke: its requests go elsewhere."""
        log.warning("worker lost", extra={"address": address, "reason": reason})
        now, silence_s = time.monotonic(), self._settings.silence_s
        self.replicas.avoid(address, now=now)
        models = self.replicas.models(address)
        for tracked in [t for t in self._requests.values() if t.state.work.model in models]:
            instructions = replay.on_lost(tracked.state, address=address, now=now, silence_s=silence_s)
            self._carry_out(tracked, instructions)
        self._routes_changed()

    def on_events(self, address: str, events: Sequence[engine_pb2.Event]) -> None:
        """What one step of a worker brought."""
        now = time.monotonic()
        for event in events:
            tracked = self._requests.get(event.request_id)
            state = tracked.state if tracked is not None else None
            instructions = replay.on_event(state, address=address, event=event, now=now)
            if tracked is None:
                self._cancel_unknown(event.request_id, instructions, now=now)
                continue
            # An announcement of an old attempt is answered; one of the current attempt needs no answer.
            if not instructions and event.accepted.layers_done:
                self._metrics.handoffs.labels(tracked.state.work.model).inc()
            try:
                self._carry_out(tracked, instructions, now=now)
            except Exception:  # a defect of ours ends this request, not the stream with all the others
                log.exception("a request failed", extra={"request": event.request_id})
                self._carry_out(tracked, replay.fail(tracked.state, GatewayError("Internal error.")))

    # --- the loop -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Dispatches and watches the time until cancelled."""
        alarm = Alarm(self._wake.set)
        try:
            while True:
                self._wake.clear()
                now = time.monotonic()
                if now >= self._due:
                    self._due = self._act_on_time(now)
                for model in [*self._queues]:
                    self._dispatch(model, now)
                if self.replicas.retired:
                    used = {a for t in self._requests.values() for a in t.state.holders}
                    await self.replicas.close_unused(used)
                alarm.at_latest(self._due)
                await self._wake.wait()
        finally:
            alarm.close()

    def _look_again_at(self, when: float) -> None:
        self._due = min(self._due, when)

    def _act_on_time(self, now: float) -> float:
        """Ends what is overdue and replays what is suspect; returns when there is more to do."""
        due = now + IDLE_S
        for tracked in [*self._requests.values()]:
            state, model = tracked.state, tracked.state.work.model
            instructions = replay.on_time(state, now=now)
            if not instructions and state.phase is Phase.QUEUED:
                ends = self.gives_up_at(model, accepted_at=tracked.accepted_at)
                if ends is not None and ends <= now:
                    instructions = replay.fail(state, self.no_replica(model))
                due = min(due, ends if ends is not None else due)
            self._carry_out(tracked, instructions)
            if state.phase is not Phase.ENDED:
                due = min(due, replay.next_time(state))
        return due

    def _dispatch(self, model: str, now: float) -> None:
        """Gives waiting requests away while somebody has room."""
        queue = self._queues[model]
        route = (self._table or {}).get(model)
        if route is None or not queue:
            return
        serving = {e.address for e in route.endpoints if e.state is EndpointState.SERVING}
        occupied = occupations(self._states(), serving)
        while (request_id := queue.head()) is not None:
            candidates = self.replicas.candidates(route, occupied)
            choice = choose(candidates, window=self._settings.window_requests, now=now)
            if choice.candidate is None:
                self._look_again_at(choice.retry_at if choice.retry_at is not None else self._due)
                return
            queue.remove(request_id)
            tracked = self._requests[request_id]
            if log.isEnabledFor(logging.DEBUG):
                fields = {"request": request_id, "replica": choice.candidate.replica_id}
                fields |= {"reason": choice.reason, "attempt": str(tracked.state.attempt + 1)}
                log.debug("request dispatched", extra=fields)
            accept_by = now + self._settings.accept_timeout_s
            self._look_again_at(accept_by)
            address, decode = choice.candidate.address, choice.decode
            onward = None if decode is None else (decode.replica_id, decode.address)
            instructions = replay.dispatch(
                tracked.state, address=address, accept_by=accept_by, decode_at=onward
            )
            self._carry_out(tracked, instructions)
            before = occupied.get(address, Occupation())
            occupied[address] = Occupation(before.unstarted + 1, before.in_flight + 1)
            if decode is not None:
                before = occupied.get(decode.address, Occupation())
                occupied[decode.address] = Occupation(before.unstarted, before.in_flight + 1)

    # --- instructions -------------------------------------------------------------------------------------------

    def _carry_out(
        self, tracked: _Tracked, instructions: Sequence[replay.Instruction], *, now: float = 0.0
    ) -> None:
        """`now` counts for tokens."""
        for instruction in instructions:
            match instruction:
                case replay.Deliver():
                    if self._deliver(tracked, instruction, now=now):
                        self._carry_out(tracked, replay.abandon(tracked.state))
                        break  # the sink ended the request by itself
                case replay.Submit(address):
                    self._submit(tracked.state, address)
                case replay.CancelAt(address, attempt):
                    self._cancel(tracked.state.work.request_id, address, attempt)
                case replay.Requeue():
                    self._requeue(tracked.state, instruction)
                case replay.End(reason):
                    tracked.sink.on_end(reason)
                case replay.Fail(error):
                    tracked.sink.on_error(error)
        if tracked.state.phase is Phase.ENDED:
            self._forget(tracked.state.work)

    def _submit(self, state: RequestState, address: str) -> None:
        work = state.work
        if state.attempt > 1:
            self._metrics.replays.labels(work.model).inc()
            self._cancel(work.request_id, address, state.attempt - 1)
        request = request_of(state, gateway_id=self._gateway_id)
        sent = self.replicas.send(
            address, engine_pb2.GenerateRequest(submit=engine_pb2.Submit(request=request))
        )
        assert sent, "only connected replicas are chosen, and nothing waits in between"

    def _cancel(self, request_id: str, address: str, attempt: int) -> None:
        """Best effort: a worker that cannot be told cancels by itself ten seconds after its stream broke."""
        cancel = engine_pb2.Cancel(request_id=request_id, attempt=attempt)
        self.replicas.send(address, engine_pb2.GenerateRequest(cancel=cancel))

    def _cancel_unknown(
        self, request_id: str, instructions: Sequence[replay.Instruction], *, now: float
    ) -> None:
        """Not for each token that was under way: that alone would fill the stream to the worker."""
        for instruction in instructions:
            told = request_id, instruction
            if isinstance(instruction, replay.CancelAt) and self._told.get(told, 0.0) <= now:
                if len(self._told) >= TOLD_MAX:
                    self._told.clear()
                self._told[told] = now + TELL_AGAIN_S
                self._cancel(request_id, instruction.address, instruction.attempt)

    def _deliver(self, tracked: _Tracked, deliver: replay.Deliver, *, now: float) -> bool:
        count = len(deliver.token_ids)
        if tracked.last_token_at is None:
            tracked.series.ttft.observe(now - tracked.accepted_at)
        else:
            tracked.series.tbt.observe((now - tracked.last_token_at) / count, times=count)
        tracked.last_token_at = now
        tracked.series.tokens.count += count
        if tracked.state.owner is not None:
            self.replicas.trust(tracked.state.owner)
        if self._queues[tracked.state.work.model]:
            self._wake.set()  # a window may have room now
        return tracked.sink.on_tokens(deliver.token_ids, deliver.logprobs)

    def _requeue(self, state: RequestState, requeue: replay.Requeue) -> None:
        work, now = state.work, time.monotonic()
        fields = {"request": work.request_id, "attempt": state.attempt, "tokens": len(state.tokens)}
        log.info("request is replayed", extra={**fields, "reason": requeue.reason})
        if requeue.refused_by is not None:
            self.replicas.hold(requeue.refused_by, now=now)
        if requeue.ignored_by is not None:
            self.replicas.avoid(requeue.ignored_by, now=now)
        self._queues[work.model].put(work.request_id, arrived_at=work.arrived_at)
        self._due = 0.0
        self._wake.set()

    def _forget(self, work: Work) -> None:
        self._requests.pop(work.request_id, None)
        self._queues[work.model].remove(work.request_id)
        self._wake.set()
