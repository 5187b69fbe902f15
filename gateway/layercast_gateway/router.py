"""Which replica is given the next request, and whether waiting for one makes sense.

The queue stays in the gateway: a serving replica is given at most `window` requests that have no first token yet,
so that a new replica relieves the others by itself. While replicas load live they take requests over from the
serving ones, which may therefore hold as much more as those targets would: window x (1 + live / serving).

With prefill/decode disaggregation a request is given to a replica that computes prompts, and one is named where it
goes on. Roles are a wish: without a replica of one role those of the other take whole requests.
Pure: everything that matters is in the arguments, and the answer says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from layercast_gateway.routes import EndpointRole, EndpointState


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One endpoint of a model and what the gateway knows of it. Times are monotonic seconds."""

    replica_id: str
    address: str
    state: EndpointState
    connected: bool
    """Its stream is open."""
    unstarted: int
    """Requests that it was given and that have no token yet in their current attempt."""
    in_flight: int
    """All requests that it holds."""
    avoid_until: float = 0.0
    """It was lost: others are preferred until then."""
    hold_until: float = 0.0
    """It gave a request back: it is given nothing until then."""
    role: EndpointRole = EndpointRole.BOTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """`candidate` is None when nobody can be given a request now; `reason` says why, either way.

    `retry_at` is when the passing of time alone could change that, None when only an event can.
    """

    candidate: Candidate | None
    reason: str
    retry_at: float | None = None
    decode: Candidate | None = None
    """Where it goes on after its prompt; None: it stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Availability:
    """How many replicas serve a model, and how many may soon."""

    serving: int
    coming: int


def availability(candidates: Iterable[Candidate]) -> Availability:
    """Serving replicas with an open stream; coming are those that load or whose stream is being opened."""
    serving = coming = 0
    for candidate in candidates:
        if candidate.state is EndpointState.SERVING and candidate.connected:
            serving += 1
        elif candidate.state is not EndpointState.DRAINING:
            coming += 1
    return Availability(serving=serving, coming=coming)


def window_of(candidates: Iterable[Candidate], *, window: int) -> int:
    """Requests without a first token that each serving replica may have: window x (1 + live / serving)."""
    states = [c.state for c in candidates if c.role is not EndpointRole.DECODE]
    serving = states.count(EndpointState.SERVING)
    live = states.count(EndpointState.LIVE)
    return window * (serving + live) // serving if serving else 0


def choose(candidates: Sequence[Candidate], *, window: int, now: float) -> Choice:
    """The replica that is given the next request, and the one where it decodes when that is another's part.

    Those that decode are given new requests only when no other replica serves.
    """
    serving = [c for c in candidates if c.state is EndpointState.SERVING and c.connected]
    if not any(c.role is not EndpointRole.DECODE for c in serving):
        return _choose([replace(c, role=EndpointRole.BOTH) for c in candidates], window=window, now=now)
    choice = _choose([c for c in candidates if c.role is not EndpointRole.DECODE], window=window, now=now)
    if choice.candidate is None or choice.candidate.role is not EndpointRole.PREFILL:
        return choice
    decode = _choose_decode(serving, now=now)
    if decode is None:
        return replace(choice, reason=f"{choice.reason}; nobody else decodes")
    return replace(choice, decode=decode, reason=f"{choice.reason}; decodes at {decode.replica_id}")


def _choose_decode(serving: Iterable[Candidate], *, now: float) -> Candidate | None:
    """The one with the fewest requests; none that was lost or gave a request back a moment ago."""
    able = [c for c in serving if c.role is EndpointRole.DECODE and max(c.avoid_until, c.hold_until) <= now]
    return min(able, key=lambda c: (c.in_flight, c.replica_id), default=None)


def _choose(candidates: Sequence[Candidate], *, window: int, now: float) -> Choice:
    """Of the serving ones that have room: the one with the fewest requests without a token, then with the fewest
    requests, then with the lowest id, so that equal inputs give equal answers. One that was lost a moment ago is
    used only when no other replica serves; one that just gave a request back is not used at all.
    """
    serving = [c for c in candidates if c.state is EndpointState.SERVING and c.connected]
    if not serving:
        return Choice(candidate=None, reason="no replica serves")
    usable = [c for c in serving if c.hold_until <= now]
    if not usable:
        first = min(c.hold_until for c in serving)
        return Choice(candidate=None, reason="every serving replica gave requests back", retry_at=first)
    trusted = [c for c in usable if c.avoid_until <= now]
    limit = window_of(candidates, window=window)
    with_room = [c for c in trusted or usable if c.unstarted < limit]
    if not with_room:
        later = [t for c in serving for t in (c.avoid_until, c.hold_until) if t > now]
        reason = f"window full: {limit} without a token at each of {len(trusted or usable)}"
        return Choice(candidate=None, reason=reason, retry_at=min(later, default=None))
    best = min(with_room, key=lambda c: (c.unstarted, c.in_flight, c.replica_id))
    reason = f"least loaded of {len(with_room)} with room: {best.unstarted} of {limit} without a token"
    if not trusted:
        reason = f"lost a moment ago, but no other serves; {reason}"
    return Choice(candidate=best, reason=reason)


def gives_up_at(*, arrived_at: float, unavailable_since: float | None, wait_s: float) -> float | None:
    """When a waiting request is refused because nobody will serve it; None while somebody serves or comes.

    A request that finds no replica waits `wait_s` all the same: its waiting is what makes the operator scale
    from zero, and the operator needs a moment to see it.
    """
    if unavailable_since is None:
        return None
    return max(arrived_at, unavailable_since) + wait_s
