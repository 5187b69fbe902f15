"""One request from acceptance to its end, over as many replicas as it takes: the state machine of replay.

A worker produces the tokens of a request, but the gateway is what remembers them: when a replica dies, gives the
request back or leaves a gap, the request goes to another replica as a new attempt that continues after the tokens
that are already here. Tokens depend on (prompt, sampling, seed, position) only, so a position is taken once, from
whoever brings it first, and the text neither repeats nor skips.

Who owns a request can be unknown for a moment: replicas hand requests over among themselves and announce it on
their own streams, which are not ordered against each other; and a replica may die between taking a request and
announcing it. What arrives after a loss may have been said before it, so nothing proves that a request is elsewhere.
Therefore a lost stream puts every request of its model *on watch* for the rest of its attempt: when nothing is heard
of it for a while, it is replayed. A needless replay costs work, never a token.

Events in, instructions out; nothing here knows the network or reads a clock. Replicas are named by the address of
their worker, because the stream of an event is what proves who sent it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import msgspec
from layercast.engine.v1alpha1 import engine_pb2

from layercast_gateway.errors import (
    AttemptsExhaustedError,
    ClientError,
    DeadlineError,
    GatewayError,
    QueueDeadlineError,
)

FAULTS_MAX = 5
"""A request that was under execution at so many failures is answered with an error: it may be their cause."""


class EndReason(Enum):
    """Why a request ended well, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a client asked for; the same for every attempt."""

    request_id: str
    model: str
    prompt: tuple[int, ...]
    sampling: engine_pb2.Sampling
    arrived_at: float
    """Unix seconds; the order of service everywhere."""
    deadline: float
    """Monotonic seconds."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Send the current attempt to `address`, after a Cancel of the attempts before it."""

    address: str


@dataclass(frozen=True, slots=True)
class CancelAt:
    """Tell `address` that the attempts up to `attempt` are over."""

    address: str
    attempt: int


class Deliver(msgspec.Struct, frozen=True):
    """New tokens for the client, in order, each once. A struct, because one is made for every token."""

    token_ids: tuple[int, ...]
    logprobs: tuple[engine_pb2.TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Requeue:
    """The request waits again, by its arrival.

    `refused_by` gave it back and should rest a moment; `ignored_by` never answered and should be avoided.
    """

    reason: str
    refused_by: str | None = None
    ignored_by: str | None = None


@dataclass(frozen=True, slots=True)
class End:
    """The request is over."""

    reason: EndReason


@dataclass(frozen=True, slots=True)
class Fail:
    """The request is over, without success."""

    error: GatewayError


Instruction = Submit | CancelAt | Deliver | Requeue | End | Fail


class Phase(Enum):
    """Where a request is."""

    QUEUED = "queued"
    DISPATCHED = "dispatched"
    ENDED = "ended"


@dataclass(slots=True, kw_only=True)
class RequestState:
    """Changed by the functions of this module only."""

    work: Work
    phase: Phase = Phase.QUEUED
    attempt: int = 0
    """0 before the first dispatch."""
    faults: int = 0
    tokens: list[int] = field(default_factory=list)
    started: bool = False
    """A token came in the current attempt."""
    accepted: bool = False
    """A worker announced ownership in the current attempt."""
    given_to: str | None = None
    """Where the current attempt was submitted."""
    decode_at: tuple[str, str] | None = None
    """Replica id and address of whoever goes on with the current attempt after its prompt."""
    confirmed: bool = False
    """`given_to` said that it received the current attempt."""
    watch_s: float | None = None
    """On watch: how long the current attempt may be silent."""
    owner: str | None = None
    """Who is believed to hold it: the last to announce it or to bring tokens, at first `given_to`."""
    holders: set[str] = field(default_factory=set)
    """Everyone who may hold something of the current attempt."""
    suspect_at: float | None = None
    """Monotonic: replayed then, unless it is heard of before."""
    ends: frozenset[int] = field(init=False)
    """Tokens that end it; read from the message once, because every token asks."""
    tokens_max: int = field(init=False)

    def __post_init__(self) -> None:
        """Reads what every token asks for."""
        self.ends = frozenset(self.work.sampling.stop_token_ids)
        self.tokens_max = self.work.sampling.max_tokens


def dispatch(
    state: RequestState, *, address: str, accept_by: float, decode_at: tuple[str, str] | None = None
) -> list[Instruction]:
    """A queued request goes to a replica, which has until `accept_by` (monotonic) to announce that it owns it."""
    assert state.phase is Phase.QUEUED, "only a queued request is dispatched"
    state.phase = Phase.DISPATCHED
    state.attempt += 1
    state.started = state.accepted = state.confirmed = False
    state.watch_s = None
    state.given_to = state.owner = address
    state.decode_at = decode_at
    state.holders = {address}
    state.suspect_at = accept_by
    return [Submit(address)]


def on_event(
    state: RequestState | None, *, address: str, event: engine_pb2.Event, now: float
) -> list[Instruction]:
    """What follows from one event of the worker at `address`. `state` is None for a request that is not known."""
    kind = event.WhichOneof("event")
    if state is None or state.phase is not Phase.DISPATCHED or event.attempt != state.attempt:
        # Only these two say that the worker still executes something for nobody.
        return [CancelAt(address, event.attempt)] if kind in ("accepted", "tokens") else []
    state.suspect_at = None if state.watch_s is None else now + state.watch_s
    if kind == "tokens":
        return _on_tokens(state, address=address, tokens=event.tokens)
    if kind == "accepted":
        _on_accepted(state, address=address)
        return []
    if kind == "finished":
        return _on_finished(state, address=address, reason=event.finished.reason)
    if kind == "returned":
        refused = Requeue(f"given back: {event.returned.reason}", refused_by=address)
        return _requeue(state, refused, silent=address)
    if kind == "failed":
        return _on_failed(state, address=address, failed=event.failed)
    return []


def on_lost(state: RequestState, *, address: str, now: float, silence_s: float) -> list[Instruction]:
    """The stream to `address` broke: its own requests are replayed at once, the others are put on watch."""
    if state.phase is not Phase.DISPATCHED:
        return []
    state.holders.discard(address)
    if state.owner == address:
        # A dispatch that was never accepted was not executed: it cannot be what broke the replica.
        return _replay(state, "its replica was lost", fault=state.accepted)
    watch(state, now=now, silence_s=silence_s)
    return []


def watch(state: RequestState, *, now: float, silence_s: float) -> None:
    """From now on the current attempt is replayed when nothing is heard of it for `silence_s`."""
    if state.phase is not Phase.DISPATCHED:
        return
    state.watch_s = silence_s if state.watch_s is None else min(state.watch_s, silence_s)
    ends = now + state.watch_s
    state.suspect_at = ends if state.suspect_at is None else min(state.suspect_at, ends)


def on_time(state: RequestState, *, now: float) -> list[Instruction]:
    """What follows from the passing of time: the deadline, and the end of a suspect's time."""
    if state.phase is Phase.ENDED:
        return []
    if state.work.deadline <= now:
        if state.tokens:
            return fail(state, DeadlineError("The request's deadline passed before its last token."))
        return fail(state, QueueDeadlineError("The request's deadline passed before a replica answered it."))
    if state.suspect_at is not None and state.suspect_at <= now:
        ignored_by = None if state.accepted else state.given_to
        return _requeue(state, Requeue("nothing was heard of its owner", ignored_by=ignored_by), silent=None)
    return []


def fail(state: RequestState, error: GatewayError) -> list[Instruction]:
    """Ends the request with an error wherever it is."""
    return [*_leave(state, Phase.ENDED), Fail(error)]


def abandon(state: RequestState) -> list[Instruction]:
    """Nobody waits for the rest: the client left, or the text is complete."""
    return list(_leave(state, Phase.ENDED))


def next_time(state: RequestState) -> float:
    """When `on_time` has something to say, at the latest."""
    return min(state.work.deadline, state.suspect_at if state.suspect_at is not None else state.work.deadline)


def _on_accepted(state: RequestState, *, address: str) -> None:
    """Ownership moves with each announcement, but for one that says nothing new.

    The first announcement of the replica that the request was submitted to may arrive after one of a replica that
    took it over from there; it is the older one.
    """
    first = address == state.given_to and not state.confirmed
    if address == state.given_to:
        state.confirmed = True
    if not (first and state.accepted):
        state.owner = address
    state.accepted = True
    state.holders.add(address)


def _on_tokens(state: RequestState, *, address: str, tokens: engine_pb2.Tokens) -> list[Instruction]:
    have = len(state.tokens)
    if tokens.position > have:
        return _replay(state, f"tokens {have} to {tokens.position - 1} are missing")
    behind = have - tokens.position
    fresh = tuple(tokens.token_ids[behind:])
    told = tokens.logprobs
    logprobs = tuple(told[behind:]) if told else ()
    if not fresh:
        return []
    state.accepted = state.started = True
    state.owner = address
    state.holders.add(address)
    taken, end = _until_end(state, fresh)
    state.tokens.extend(taken)
    deliver = Deliver(taken, logprobs[: len(taken)])
    if end is None:
        return [deliver]
    return [*_leave(state, Phase.ENDED, silent=address), deliver, End(end)]


def _until_end(state: RequestState, fresh: Sequence[int]) -> tuple[tuple[int, ...], EndReason | None]:
    """The tokens up to the end of the request, and the reason when that end is among them.

    The end is seen here, not only told by Finished: when a replica dies between its last token and Finished, the
    request is over and must not be replayed.
    """
    for index, token_id in enumerate(fresh, start=1):
        if token_id in state.ends:
            return tuple(fresh[:index]), EndReason.STOP
        if len(state.tokens) + index >= state.tokens_max:
            return tuple(fresh[:index]), EndReason.LENGTH
    return tuple(fresh), None


def _on_finished(state: RequestState, *, address: str, reason: int) -> list[Instruction]:
    if reason == engine_pb2.FINISH_REASON_CANCELLED:
        # Nobody here cancelled this attempt: the worker gave up on a broken stream.
        return _replay(state, "the worker cancelled it")
    end = EndReason.STOP if reason == engine_pb2.FINISH_REASON_STOP else EndReason.LENGTH
    return [*_leave(state, Phase.ENDED, silent=address), End(end)]


def _on_failed(state: RequestState, *, address: str, failed: engine_pb2.Failed) -> list[Instruction]:
    if failed.client_fault:
        error = ClientError(failed.message, code="rejected_by_replica")
        return [*_leave(state, Phase.ENDED, silent=address), Fail(error)]
    return _replay(state, f"it failed: {failed.message}", refused_by=address)


def _replay(
    state: RequestState, reason: str, *, fault: bool = True, refused_by: str | None = None
) -> list[Instruction]:
    state.faults += fault
    if state.faults >= FAULTS_MAX:
        message = f"The request was tried {state.faults} times without success; the last time {reason}."
        return fail(state, AttemptsExhaustedError(message))
    return _requeue(state, Requeue(reason, refused_by=refused_by), silent=refused_by)


def _requeue(state: RequestState, requeue: Requeue, *, silent: str | None) -> list[Instruction]:
    return [*_leave(state, Phase.QUEUED, silent=silent), requeue]


def _leave(state: RequestState, phase: Phase, *, silent: str | None = None) -> list[CancelAt]:
    """Ends the current attempt everywhere but at `silent`, which ended it by itself."""
    cancels = [CancelAt(holder, state.attempt) for holder in sorted(state.holders - {silent})]
    state.phase = phase
    state.holders = set()
    state.given_to = state.owner = state.decode_at = None
    state.suspect_at = None
    return cancels
