"""How many replicas demand calls for: pure arithmetic over plain values, with its reason in words.

The formulas are BlitzScale's (OSDI'25; section 5.2 of the digest, `generate_scale_target`), reduced to replicas
that prefill and decode (colocated). With Q waiting prompt tokens, R prefill tokens per second of one replica,
U used KV pages and B pages of one replica:

    lo = max(ceil(Q / (q_high * R)), ceil(U / (k_high * B)))      fewest replicas that keep within the targets
    hi = max(ceil(Q / (q_low  * R)), ceil(U / (k_low  * B)), lo)  more than this would idle

    lo > N   jump to ceil((lo + hi) / 2) at once
    hi < N   one less, after demand was that low for a whole window

Where a service is disaggregated the two needs are of different replicas, so they are added instead of compared, and
what will soon be KV counts for decode already: all prompts that wait, as far as prefill gets through them while a
replica loads (decode pre-scaling, section 5.4).

N counts replicas on their way: capacity that was asked for is not asked for twice. Unknown is not zero: what
cannot be measured never shrinks anything and is said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from layercast_operator.modelservice import Band, Disaggregation, RoleBounds, Scaling
from layercast_operator.roles import RoleNeeds
from layercast_operator.snapshot import Demand

# A quotient that is whole up to float rounding must not be rounded up to one replica more.
_ROUNDING = 1e-9


class Rule(Enum):
    """Which rule decided; a label of metrics and a field of status."""

    START = "start"
    FIXED = "fixed"
    MANUAL = "manual"
    QUEUE = "queue"
    KV = "kv"
    FROM_ZERO = "from-zero"
    SHRINK = "shrink"
    BOUNDS = "bounds"
    REPAIR = "repair"
    STEADY = "steady"
    WINDOW = "window"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class KvUse:
    """KV pages of all replicas that are not leaving."""

    used: int
    pages_per_replica: float
    page_tokens: int = 0
    """Tokens of one page; 0 means unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaBand:
    """How many replicas would do: at least `low`, at most `high`."""

    low: int
    high: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInput:
    """Everything that a decision depends on; None always means unknown."""

    now: float
    current: int
    """Replicas that serve or were asked for."""
    capacity: int | None
    """Replicas that the devices can hold."""
    demand: Demand | None
    kv: KvUse | None
    prefill_tokens_per_s: float | None
    load_time_s: float | None
    """How long the last replicas took from assignment to completion."""
    below_since: float | None
    """Since when demand has called for fewer replicas than `current`, without a gap in what was seen."""
    disaggregation: Disaggregation | None = None
    """Prompts and answers are the work of different replicas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How many replicas, by which rule, and why."""

    replicas: int
    rule: Rule
    reason: str
    below_since: float | None = None
    limited: str = ""
    """Why it is not what demand calls for; empty when it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What demand calls for, before bounds. `high` None: not known, so nothing may shrink."""

    low: int
    target: int
    high: int | None
    rule: Rule
    reason: str
    unknown: str


def replicas_for(amount: float, *, each: float, band: Band) -> ReplicaBand:
    """Replicas that keep `amount` within the band when each takes `each` (tokens per second, or pages)."""
    low = math.ceil(amount / (band.high * each) - _ROUNDING)
    high = math.ceil(amount / (band.low * each) - _ROUNDING)
    return ReplicaBand(low=max(low, 0), high=max(high, low, 0))


def decide(scaling: Scaling, given: PolicyInput) -> Decision:
    """The number of replicas from demand, within bounds."""
    most = scaling.replicas_max
    if given.capacity is not None:
        most = min(most, given.capacity)
    least = min(scaling.replicas_min, most)
    if not least <= given.current <= most:
        return _into_bounds(scaling, given, least=least, most=most)
    if given.demand is None:
        limited = _limit(scaling, given, wanted=scaling.replicas_min)
        reason = "held: no gateway tells the demand"
        return Decision(replicas=given.current, rule=Rule.UNKNOWN, reason=reason, limited=limited)
    wanted = _wanted(scaling, given, given.demand)
    limited = _limit(scaling, given, wanted=max(wanted.target, scaling.replicas_min))
    if wanted.low > given.current:
        replicas = max(least, min(wanted.target, most))
        rule = Rule.FROM_ZERO if given.current == 0 else wanted.rule
        return Decision(replicas=replicas, rule=rule, reason=wanted.reason, limited=limited)
    if wanted.high is None:
        reason = f"held: {wanted.unknown}"
        return Decision(replicas=given.current, rule=Rule.UNKNOWN, reason=reason, limited=limited)
    if max(wanted.high, least) < given.current:
        return _shrink(scaling, given, wanted=wanted, limited=limited)
    return Decision(replicas=given.current, rule=Rule.STEADY, reason=wanted.reason, limited=limited)


def _into_bounds(scaling: Scaling, given: PolicyInput, *, least: int, most: int) -> Decision:
    replicas = max(least, min(given.current, most))
    reason = f"{given.current} is outside spec.scaling ({scaling.replicas_min} to {scaling.replicas_max})"
    if given.capacity is not None and given.capacity < given.current:
        reason = f"only {counted(given.capacity, 'device')} can hold a replica"
    limited = _limit(scaling, given, wanted=max(given.current, scaling.replicas_min))
    return Decision(replicas=replicas, rule=Rule.BOUNDS, reason=reason, limited=limited)


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 replica, 2 replicas."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def limit_of_devices(*, wanted: int, capacity: int | None) -> str:
    """Why `wanted` replicas cannot be had on the devices; empty when they can."""
    if capacity is None or wanted <= capacity:
        return ""
    verb = "is" if wanted == 1 else "are"
    return f"{counted(wanted, 'replica')} {verb} wanted, {counted(capacity, 'device')} can hold one each"


def _limit(scaling: Scaling, given: PolicyInput, *, wanted: int) -> str:
    if wanted > scaling.replicas_max:
        return f"demand calls for {counted(wanted, 'replica')}, spec.scaling.max is {scaling.replicas_max}"
    return limit_of_devices(wanted=wanted, capacity=given.capacity)


def _wanted(scaling: Scaling, given: PolicyInput, demand: Demand) -> _Wanted:
    """The union of what the queue, the KV use and mere presence call for."""
    lows, highs, unknown = [0], [0], []
    why: list[tuple[int, Rule, str]] = []
    queue = _queue_band(scaling, given, demand)
    if queue is None:
        unknown.append("the prefill rate has not been measured yet")
    else:
        lows.append(queue.low)
        highs.append(queue.high)
        why.append((queue.low, Rule.QUEUE, _queue_words(given, demand, queue)))
    pages: ReplicaBand | None = None
    if given.kv is None:
        unknown.append("the KV use of a replica is unknown")
    else:
        pages = _kv_band(scaling, given, given.kv, demand, queue)
        if pages.high:
            lows.append(pages.low)
            highs.append(pages.high)
            why.append((pages.low, Rule.KV, f"{_kv_words(given, given.kv, demand)}: {_span(pages)}"))
    if given.disaggregation is not None and why:
        both = _together(queue, pages, given.disaggregation)
        lows, highs = [both.low], [both.high]
        texts = "; ".join(text for _, _, text in why)
        why = [(both.low, max(why, key=lambda entry: entry[0])[1], f"{texts}; together {_span(both)}")]
    present = demand.requests_waiting + demand.requests_in_flight > 0
    if present:
        lows.append(1)
        highs.append(1)
        text = f"{demand.requests_waiting:.0f} requests wait, {demand.requests_in_flight:.0f} are in flight"
        why.append((1, Rule.QUEUE, text))
    if not demand.complete:
        unknown.append(demand.problem or "a gateway does not tell its demand")
    low, high = max(lows), max(highs)
    middle = math.ceil((low + max(high, low)) / 2)
    _, rule, reason = max(why, key=lambda entry: entry[0], default=(0, Rule.STEADY, "no demand"))
    return _Wanted(
        low=low,
        target=middle,
        high=None if unknown else high,
        rule=rule,
        reason=reason,
        unknown="; ".join(unknown),
    )


def _queue_words(given: PolicyInput, demand: Demand, queue: ReplicaBand) -> str:
    if demand.prompt_tokens_waiting <= 0:
        return "no prompt tokens wait"
    text = f"{demand.prompt_tokens_waiting:.0f} prompt tokens wait"
    return f"{text} at {given.prefill_tokens_per_s or 0:.0f} tokens/s a replica: {_span(queue)}"


def _span(band: ReplicaBand) -> str:
    if band.low == band.high:
        return counted(band.low, "replica")
    return f"{band.low} to {counted(band.high, 'replica')}"


def _queue_band(scaling: Scaling, given: PolicyInput, demand: Demand) -> ReplicaBand | None:
    """None when the rate is unknown and matters; an empty queue needs no rate."""
    if demand.prompt_tokens_waiting <= 0:
        return ReplicaBand(low=0, high=0)
    if not given.prefill_tokens_per_s:
        return None
    found = replicas_for(demand.prompt_tokens_waiting, each=given.prefill_tokens_per_s, band=scaling.queue_s)
    return found if given.disaggregation is None else _capped(found, given.disaggregation.prefill)


def _together(prefill: ReplicaBand | None, decode: ReplicaBand | None, bounds: Disaggregation) -> ReplicaBand:
    """Replicas of both roles; where that is more than one, there is at least the least of each."""
    nothing = ReplicaBand(low=0, high=0)
    needs = (prefill or nothing, decode or nothing)

    def total(prefill: int, decode: int) -> int:
        if prefill + decode < 2:
            return prefill + decode
        return max(prefill, bounds.prefill.least) + max(decode, bounds.decode.least)

    return ReplicaBand(low=total(*(need.low for need in needs)), high=total(*(need.high for need in needs)))


def _capped(found: ReplicaBand, bounds: RoleBounds) -> ReplicaBand:
    """No more than may have the role."""
    most = bounds.most or found.high
    return ReplicaBand(low=min(found.low, most), high=min(found.high, most))


def _kv_band(
    scaling: Scaling, given: PolicyInput, kv: KvUse, demand: Demand, queue: ReplicaBand | None
) -> ReplicaBand:
    if given.disaggregation is None:
        return replicas_for(kv.used, each=kv.pages_per_replica, band=scaling.kv_utilization)
    pages = kv.used + _pages_coming(scaling, given, kv, demand, queue)
    found = replicas_for(pages, each=kv.pages_per_replica, band=scaling.kv_utilization)
    return _capped(found, given.disaggregation.decode)


def _pages_coming(
    scaling: Scaling, given: PolicyInput, kv: KvUse, demand: Demand, queue: ReplicaBand | None
) -> float:
    """KV of the prompts that wait, as far as prefill gets through them in the time that a replica needs to load."""
    if not kv.page_tokens:
        return 0.0
    tokens = demand.prompt_tokens_waiting
    if queue is not None and given.prefill_tokens_per_s:
        span_s = max(given.load_time_s or 0.0, scaling.queue_s.high)
        tokens = min(tokens, max(queue.high, 1) * given.prefill_tokens_per_s * span_s)
    return tokens / kv.page_tokens


def _kv_words(given: PolicyInput, kv: KvUse, demand: Demand) -> str:
    text = f"{kv.used} KV pages are used of {kv.pages_per_replica:.0f} a replica"
    if given.disaggregation is not None and demand.prompt_tokens_waiting > 0:
        text += ", and prompts that wait will need more"
    return text


def role_needs(scaling: Scaling, given: PolicyInput) -> RoleNeeds:
    """Fewest replicas of each role that keep within the targets; 0 where that cannot be known."""
    if given.demand is None or given.disaggregation is None:
        return RoleNeeds()
    queue = _queue_band(scaling, given, given.demand)
    pages = None if given.kv is None else _kv_band(scaling, given, given.kv, given.demand, queue)
    return RoleNeeds(prefill=queue.low if queue else 0, decode=pages.low if pages else 0)


def _shrink(scaling: Scaling, given: PolicyInput, *, wanted: _Wanted, limited: str) -> Decision:
    """One less after a whole window; never a window shorter than what loading it again would take."""
    window_s = max(scaling.scale_down_s, given.load_time_s or 0.0)
    since = given.now if given.below_since is None else given.below_since
    left_s = window_s - (given.now - since)
    if left_s > _ROUNDING:
        reason = f"fewer would do ({wanted.reason}); {left_s:.0f} s of the window are left"
        return Decision(
            replicas=given.current, rule=Rule.WINDOW, reason=reason, below_since=since, limited=limited
        )
    reason = f"fewer would do for {window_s:.0f} s ({wanted.reason})"
    return Decision(
        replicas=given.current - 1, rule=Rule.SHRINK, reason=reason, below_since=since, limited=limited
    )
