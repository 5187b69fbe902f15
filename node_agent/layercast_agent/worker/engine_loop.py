"""The engine thread: runs turns and, between two turns, what other threads ask of the engine.

A turn is one continuous-batching step once the model is complete, and one layer of few requests before that. Whoever
wants to look at or change the engine sends a function with `call`; it runs at the next turn's boundary, which is a
layer boundary while the replica is live. Nothing else ever touches the engine.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import torch

from layercast_agent import live
from layercast_agent.engine.engine import Engine, EngineLoad
from layercast_agent.engine.sequence import Sequence, TokenEvent
from layercast_agent.errors import NoCapacityError
from layercast_agent.worker.lookahead import look_ahead
from layercast_agent.worker.pacing import ComputeShare
from layercast_agent.worker.rates import Compared, PrefillRate, StepTimes

log = logging.getLogger(__name__)

T = TypeVar("T")

COMPUTE_NICENESS = 5
"""How much computing on shared cores gives way to agents, gateway and operator, and to parameters that arrive here."""

IDLE_WAIT_S = 1.0
"""Longest sleep of an idle thread; every change wakes it, so this only bounds a lost wake-up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopView:
    """What the last turn left behind, and what the running one began with; read by other threads without asking."""

    begun: int
    """Steps that began; a complete model's only."""
    ends_at: float
    """When the running one is expected to end, its pause included, in seconds of the monotonic clock; may be past."""
    room: int
    """Prompt tokens that the step after the running one has room for (`lookahead.Lookahead`)."""
    step_tokens_max: int
    load: EngineLoad
    prefill_tokens_per_s: float
    compared: Mapping[str, Compared]
    """How long steps were expected to take, and what they took."""
    first_layer_at: float | None


class EngineLoop:
    """One thread that owns one engine."""

    def __init__(
        self,
        *,
        engine: Engine,
        layers: int,
        share: ComputeShare,
        on_tokens: Callable[[list[TokenEvent]], None],
        on_turn: Callable[[], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._engine = engine
        self._layers = layers
        self._share = share
        self._on_tokens = on_tokens
        self._on_turn = on_turn
        self._on_failure = on_failure
        self._calls: deque[Callable[[], None]] = deque()
        self._works: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._attached: set[int] = set()
        self._segments = layers + 2
        self._times = StepTimes(prefill=PrefillRate(chunk_tokens=engine.limits.step_tokens_max))
        self._quantum: list[Sequence] = []
        self._begun = 0
        self._ends_at = 0.0
        self._room = engine.limits.step_tokens_max
        self._first_layer_at: float | None = None
        self.view = self._look()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, *, deadline_s: float) -> bool:
        """Ends the thread after the current turn; False when it did not end in time. Later calls fail."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(deadline_s)
        return not self._thread.is_alive()

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Runs `function(engine)` on the engine thread at the next boundary."""
        return self._queue(function, self._calls)

    def execute(self, function: Callable[[Engine], T]) -> Future[T]:
        """The same for work of the device, a stage of somebody's pipeline: it is a turn of its own, in order."""
        return self._queue(function, self._works)

    def _queue(self, function: Callable[[Engine], T], queue: deque[Callable[[], None]]) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(self._engine))
            except Exception as error:
                future.set_exception(error)

        with self._wake:
            if self._stopping:
                future.set_exception(NoCapacityError("the replica is being stopped"))
                return future
            queue.append(run)
            self._wake.notify()
        return future

    def check(self, seq: Sequence) -> None:
        """Raises RequestError for what this engine could never serve. From any thread: it reads only limits."""
        self._engine.check(seq)

    def embed(self, seq: Sequence) -> torch.Tensor:
        """The state of a request after no layer, its embeddings, as `Engine.export_state` gives it.

        From any thread, for a request that is not in the engine: it reads only parameters. An overloaded source
        must be able to give work away in the middle of a long step.
        """
        with torch.inference_mode():
            self._engine.embed(seq)
            state = self._engine.export_state(seq)
            seq.hidden = None
            return state

    def attach(self, segment: int, tensors: Mapping[str, torch.Tensor]) -> Future[None]:
        """Makes a verified segment executable."""

        def run(engine: Engine) -> None:
            engine.model.attach(tensors)
            self._attached.add(segment)

        return self.call(run)

    def has(self, segment: int) -> bool:
        """Whether a segment is attached."""
        return segment in self._attached

    @property
    def complete(self) -> bool:
        """Every segment is attached: the replica can finish requests by itself."""
        return len(self._attached) == self._segments

    def _run(self) -> None:
        if self._share.share < 1:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), COMPUTE_NICENESS)
        try:
            with torch.inference_mode():
                while not self._stopping:
                    if not self._turn():
                        self._pause(IDLE_WAIT_S, until_called=True)
        except Exception as error:
            # Whatever went wrong in a turn, the requests are whole at their gateways: give them back.
            log.exception("the engine failed")
            self._stopping = True
            self._on_failure(error)
        finally:
            self._refuse_calls()

    def _turn(self) -> bool:
        """Calls, then one turn; False when there was nothing to do."""
        called = self._run_calls()
        if called:
            self._publish()
        started, cpu_started = time.monotonic(), time.thread_time()
        prefix_before = self._engine.prefill_tokens_done
        self._quantum = []
        events = self._execute()
        if events is None:
            return called
        wall_s = time.monotonic() - started
        pause_s = self._share.after(cpu_s=time.thread_time() - cpu_started, wall_s=wall_s)
        tokens = self._engine.prefill_tokens_done - prefix_before
        self._ends_at = time.monotonic() + pause_s
        self._measure(tokens, wall_s + pause_s, decoded=bool(events))
        if events:
            self._on_tokens(events)
        self._publish()
        if pause_s > 0.001:
            self._pause(pause_s, until_called=False)
        return True

    def _execute(self) -> list[TokenEvent] | None:
        if self._works:
            self._works.popleft()()
            return []
        if self.complete:
            if not self._engine.waiting and not self._engine.running:
                return None
            self._begin_step()
            return self._engine.step()
        self._quantum = self._choose_quantum()
        if not self._quantum:
            return None
        self._engine.run_layer(*self._quantum)
        if self._first_layer_at is None:
            self._first_layer_at = time.time()
        return []

    def _begin_step(self) -> None:
        """Says what the step that begins now will take and leave, as far as can be known."""
        engine = self._engine
        ahead = look_ahead(engine.running, engine.waiting, limits=engine.limits, layers=self._layers)
        self._begun += 1
        self._room = ahead.room
        self._ends_at = time.monotonic() + self._times.expected_s(ahead.prompt_tokens)
        self.view = self._look()

    def _choose_quantum(self) -> list[Sequence]:
        able = {seq.request_id: seq for seq in self._engine.waiting if self._can_start(seq)}
        queue = [live_request(seq) for seq in able.values()]
        quantum = live.next_quantum(
            queue,
            layers=self._layers,
            resident=lambda layer: layer + 1 in self._attached,
            tokens_max=self._engine.limits.step_tokens_max,
        )
        return [able[each.request_id] for each in quantum]

    def _can_start(self, seq: Sequence) -> bool:
        """The first layer needs hidden states or the embedding; the first quantum needs pages."""
        if seq.hidden is None and 0 not in self._attached:
            return False
        return bool(seq.pages) or self._engine.has_room(seq)

    def _measure(self, tokens: int, seconds: float, *, decoded: bool) -> None:
        part = 1.0
        if self._quantum:
            tokens, part = sum(seq.prefix_length for seq in self._quantum), 1 / self._layers
        self._times = self._times.after(tokens=tokens, seconds=seconds, part=part, decoded=decoded)

    def _look(self) -> LoopView:
        return LoopView(
            begun=self._begun,
            ends_at=self._ends_at,
            room=self._room,
            step_tokens_max=self._engine.limits.step_tokens_max,
            load=self._engine.load(),
            prefill_tokens_per_s=self._times.prefill.tokens_per_s,
            compared=self._times.compared,
            first_layer_at=self._first_layer_at,
        )

    def _publish(self) -> None:
        self.view = self._look()
        self._on_turn()

    def _run_calls(self) -> bool:
        ran = False
        while self._calls:
            self._calls.popleft()()
            ran = True
        return ran

    def _pause(self, seconds: float, *, until_called: bool) -> None:
        """Sleeps; calls are answered meanwhile, so that a paced device never delays a handoff."""
        deadline = time.monotonic() + seconds
        while not self._stopping and (left := deadline - time.monotonic()) > 0:
            with self._wake:
                if not self._calls and not (until_called and self._works):
                    self._wake.wait(left)
            if until_called and (self._calls or self._works):
                return
            if self._run_calls():
                self._publish()
        if not until_called:
            self._share.paused(seconds)

    def _refuse_calls(self) -> None:
        with self._wake:
            self._stopping = True
            calls = [*self._calls, *self._works]
            self._calls.clear()
            self._works.clear()
        for run in calls:
            run()


def live_request(seq: Sequence) -> live.LiveRequest:
    """What the choices of live scale-up see of a sequence."""
    return live.LiveRequest(
        request_id=seq.request_id,
        arrived_at=seq.arrived_at,
        layers_done=seq.layers_done,
        tokens=seq.prefix_length,
    )
