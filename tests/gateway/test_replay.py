"""The replay machine in a toy world of workers that lie about nothing but lose, delay and repeat everything."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layercast.engine.v1alpha1 import engine_pb2

from layercast_gateway import replay
from layercast_gateway.errors import AttemptsExhaustedError, ClientError, DeadlineError, QueueDeadlineError
from layercast_gateway.replay import (
    CancelAt,
    Deliver,
    End,
    EndReason,
    Fail,
    Instruction,
    Phase,
    RequestState,
    Requeue,
    Submit,
    Work,
)  # fmt: skip

TRUTH = [7, 7, 8, 9, 7, 5, 6, 7, 9, 8, 2]
STOP_ID = 2
A, B, C = "a:1", "b:1", "c:1"


def new_state(*, max_tokens: int = 100, deadline: float = 1000.0) -> RequestState:
    sampling = engine_pb2.Sampling(max_tokens=max_tokens, stop_token_ids=[STOP_ID])
    work = Work(
        request_id="r", model="m", prompt=(1, 2), sampling=sampling, arrived_at=0.0, deadline=deadline
    )
    return RequestState(work=work)


def on(
    state: RequestState, address: str, attempt: int, *, now: float = 0.0, **event: object
) -> list[Instruction]:
    message = engine_pb2.Event(request_id="r", attempt=attempt, **event)  # type: ignore[arg-type]
    return replay.on_event(state, address=address, event=message, now=now)


def tokens(position: int, *ids: int) -> engine_pb2.Tokens:
    return engine_pb2.Tokens(position=position, token_ids=ids)


def dispatched(address: str = A) -> RequestState:
    state = new_state()
    assert replay.dispatch(state, address=address, accept_by=50.0) == [Submit(address)]
    return state


def test_old_attempts_are_told_to_stop() -> None:
    state = dispatched()
    assert replay.on_lost(state, address=A, now=0.0, silence_s=5.0)[-1] == Requeue("its replica was lost")
    assert on(state, A, 1, tokens=tokens(0, 7)) == [CancelAt(A, 1)]  # even while it is queued
    replay.dispatch(state, address=B, accept_by=50.0)
    assert on(state, A, 1, accepted=engine_pb2.Accepted()) == [CancelAt(A, 1)]
    assert on(state, A, 1, finished=engine_pb2.Finished()) == []
    event = engine_pb2.Event(request_id="x", attempt=4, accepted=engine_pb2.Accepted())
    assert replay.on_event(None, address=A, event=event, now=0.0) == [CancelAt(A, 4)]


def test_the_end_is_seen_without_being_told() -> None:
    state = dispatched()
    assert on(state, A, 1, tokens=tokens(0, 7, STOP_ID, 9)) == [
        Deliver((7, STOP_ID), ()),
        End(EndReason.STOP),
    ]
    limited = new_state(max_tokens=2)
    replay.dispatch(limited, address=A, accept_by=50.0)
    assert on(limited, A, 1, tokens=tokens(0, 7, 7, 7))[-1] == End(EndReason.LENGTH)
    assert limited.phase is Phase.ENDED


def test_other_holders_are_cancelled_at_the_end() -> None:
    state = dispatched()
    on(state, A, 1, accepted=engine_pb2.Accepted())
    on(state, B, 1, accepted=engine_pb2.Accepted())
    ends = on(state, B, 1, finished=engine_pb2.Finished(reason=engine_pb2.FINISH_REASON_LENGTH))
    assert ends == [CancelAt(A, 1), End(EndReason.LENGTH)]


def test_cancelled_by_the_worker_is_replayed() -> None:
    state = dispatched()
    ends = on(state, A, 1, finished=engine_pb2.Finished(reason=engine_pb2.FINISH_REASON_CANCELLED))
    assert isinstance(ends[-1], Requeue)


def test_loss_of_somebody_else_puts_on_watch() -> None:
    state = dispatched()
    on(state, A, 1, accepted=engine_pb2.Accepted())
    assert replay.next_time(state) == 1000.0  # who waits in a queue has nothing to say
    assert replay.on_lost(state, address=B, now=1.0, silence_s=4.0) == []
    assert replay.next_time(state) == 5.0
    on(state, C, 1, now=4.9, accepted=engine_pb2.Accepted(layers_done=1))
    on(state, C, 1, now=8.8, tokens=tokens(0, 7))
    assert state.owner == C
    assert replay.on_time(state, now=12.7) == []
    assert replay.on_time(state, now=12.8) == [
        CancelAt(A, 1), CancelAt(C, 1), Requeue("nothing was heard of its owner"),
    ]  # fmt: skip
    replay.dispatch(state, address=A, accept_by=50.0)
    on(state, A, 2, now=13.0, accepted=engine_pb2.Accepted())
    assert replay.next_time(state) == 1000.0  # a new attempt is not on watch


def test_the_patience_of_a_watch_only_shrinks() -> None:
    state = dispatched()
    replay.watch(state, now=0.0, silence_s=2.0)
    replay.watch(state, now=1.0, silence_s=10.0)
    assert (state.watch_s, state.suspect_at) == (2.0, 2.0)


def test_an_older_announcement_does_not_move_the_request_back() -> None:
    state = dispatched()
    on(state, B, 1, accepted=engine_pb2.Accepted())
    on(state, A, 1, accepted=engine_pb2.Accepted())
    assert state.owner == B
    on(state, A, 1, accepted=engine_pb2.Accepted(layers_done=2))
    assert state.owner == A


def test_never_accepted_is_replayed_elsewhere() -> None:
    state = dispatched()
    assert replay.on_time(state, now=50.0) == [
        CancelAt(A, 1), Requeue("nothing was heard of its owner", ignored_by=A),
    ]  # fmt: skip


def test_faults_are_bounded() -> None:
    state = new_state()
    for attempt in range(1, replay.FAULTS_MAX + 1):
        replay.dispatch(state, address=A, accept_by=50.0)
        on(state, A, attempt, accepted=engine_pb2.Accepted())
        last = replay.on_lost(state, address=A, now=0.0, silence_s=1.0)[-1]
    assert isinstance(last, Fail) and isinstance(last.error, AttemptsExhaustedError)
    assert "5 times" in last.error.message
    assert state.phase is Phase.ENDED


def test_returned_and_unaccepted_losses_are_no_faults() -> None:
    state = new_state()
    for attempt in range(1, 21):
        replay.dispatch(state, address=A, accept_by=50.0)
        if attempt % 2:
            replay.on_lost(state, address=A, now=0.0, silence_s=1.0)
        else:
            last = on(state, A, attempt, returned=engine_pb2.Returned(reason="full"))
            assert last == [Requeue("given back: full", refused_by=A)]
    assert state.faults == 0


def test_deadlines_and_rejections() -> None:
    waiting = replay.on_time(new_state(deadline=3.0), now=3.0)[-1]
    assert isinstance(waiting, Fail) and isinstance(waiting.error, QueueDeadlineError)
    state = dispatched()
    on(state, A, 1, tokens=tokens(0, 7))
    cancel, late = replay.on_time(state, now=1000.0)
    assert cancel == CancelAt(A, 1)
    assert isinstance(late, Fail) and isinstance(late.error, DeadlineError)
    assert replay.on_time(state, now=2000.0) == []
    rejected = on(dispatched(), A, 1, failed=engine_pb2.Failed(client_fault=True, message="no"))[-1]
    assert isinstance(rejected, Fail) and isinstance(rejected.error, ClientError)


@dataclass
class _Execution:
    """One attempt as workers see it: who has it, and how many tokens were sent."""

    attempt: int
    holder: str
    sent: int


@dataclass
class _World:
    """Workers that move one request among themselves, over streams that are ordered each, but not together."""

    chance: random.Random
    state: RequestState = field(default_factory=new_state)
    streams: dict[str, list[engine_pb2.Event]] = field(default_factory=lambda: {A: [], B: [], C: []})
    executions: list[_Execution] = field(default_factory=list)
    delivered: list[int] = field(default_factory=list)
    ends: list[Instruction] = field(default_factory=list)
    now: float = 0.0

    def carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Submit(address):
                    self.executions.append(_Execution(self.state.attempt, address, len(self.state.tokens)))
                    self.say(address, self.state.attempt, accepted=engine_pb2.Accepted())
                case CancelAt(address, attempt):
                    self.executions = [
                        e for e in self.executions if e.holder != address or e.attempt > attempt
                    ]
                case Deliver(token_ids, _):
                    self.delivered.extend(token_ids)
                case End() | Fail():
                    self.ends.append(instruction)

    def say(self, address: str, attempt: int, **event: object) -> None:
        self.streams[address].append(engine_pb2.Event(request_id="r", attempt=attempt, **event))  # type: ignore[arg-type]

    def dispatch(self) -> None:
        if self.state.phase is Phase.QUEUED:
            address = self.chance.choice([A, B, C])
            self.carry_out(replay.dispatch(self.state, address=address, accept_by=self.now + 3))

    def hear(self) -> None:
        talking = [address for address, events in self.streams.items() if events]
        if talking:
            address = self.chance.choice(talking)
            event = self.streams[address].pop(0)
            self.carry_out(replay.on_event(self.state, address=address, event=event, now=self.now))

    def execute(self) -> None:
        for e in self.executions:
            if e.sent >= len(TRUTH):
                continue
            back = self.chance.randint(0, min(2, e.sent))  # a repetition is allowed at any time
            count = self.chance.randint(1, 3)
            self.say(
                e.holder, e.attempt, tokens=tokens(e.sent - back, *TRUTH[e.sent - back : e.sent + count])
            )
            e.sent = min(e.sent + count, len(TRUTH))
            if e.sent == len(TRUTH):
                self.say(
                    e.holder, e.attempt, finished=engine_pb2.Finished(reason=engine_pb2.FINISH_REASON_STOP)
                )

    def hand_over(self) -> None:
        for e in self.executions:
            e.holder = self.chance.choice([A, B, C])
            self.say(e.holder, e.attempt, accepted=engine_pb2.Accepted(layers_done=1))

    def give_back(self) -> None:
        if self.executions:
            e = self.executions.pop(self.chance.randrange(len(self.executions)))
            self.say(e.holder, e.attempt, returned=engine_pb2.Returned())

    def lose(self) -> None:
        address = self.chance.choice([A, B, C])
        said = self.streams[address]
        self.streams[address] = []
        self.executions = [e for e in self.executions if e.holder != address]
        for event in said[: self.chance.randint(0, len(said))]:
            self.carry_out(replay.on_event(self.state, address=address, event=event, now=self.now))
        self.carry_out(replay.on_lost(self.state, address=address, now=self.now, silence_s=2))

    def wait(self) -> None:
        self.now += 1
        self.carry_out(replay.on_time(self.state, now=self.now))


CHAOS = ["dispatch", "hear", "hear", "hear", "execute", "hand_over", "give_back", "lose", "wait"]
CALM = ["dispatch", "execute", "hear", "hear", "hear", "wait"]


@given(st.lists(st.sampled_from(CHAOS), max_size=60), st.integers(0, 2**32))
@settings(max_examples=400)
def test_whatever_happens_the_text_comes_once_and_whole(story: list[str], seed: int) -> None:
    world = _World(chance=random.Random(seed))
    for action in story + CALM * 20:
        getattr(world, action)()
        assert world.delivered == TRUTH[: len(world.delivered)]
    assert len(world.ends) == 1  # one answer, inside the deadline, without an owner that nobody knows
    end = world.ends[0]
    if isinstance(end, Fail):
        assert isinstance(end.error, AttemptsExhaustedError)
    else:
        assert (end, world.delivered) == (End(EndReason.STOP), TRUTH)
    assert not [e for e in world.executions if e.attempt == world.state.attempt and e.sent < len(TRUTH)]


def test_only_a_queued_request_is_dispatched() -> None:
    with pytest.raises(AssertionError):
        replay.dispatch(dispatched(), address=B, accept_by=1.0)
