"""Demand to replicas: golden numbers worked out by hand from the formulas, and what must hold for any demand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercast_operator.modelservice import Band
from layercast_operator.policy import Decision, KvUse, PolicyInput, Rule, decide, replicas_for

QUEUE = Band(low=0.5, high=0.7)
KV = Band(low=0.75, high=0.95)


def given_(worlds: Any, **changes: Any) -> PolicyInput:
    values: dict[str, Any] = {
        "now": 100.0,
        "current": 1,
        "capacity": 8,
        "demand": worlds.demand(),
        "kv": KvUse(used=0, pages_per_replica=100),
        "prefill_tokens_per_s": 1000.0,
        "load_time_s": None,
        "below_since": None,
        **changes,
    }
    return PolicyInput(**values)


@pytest.mark.parametrize(
    ("amount", "each", "band", "low", "high"),
    [
        # 1800 / (0.7 * 1000) = 2.57 and 1800 / (0.5 * 1000) = 3.6
        (1800, 1000, QUEUE, 3, 4),
        # exactly one: 700 / 700, and 700 / 500 = 1.4
        (700, 1000, QUEUE, 1, 2),
        # Llama3-8B of the released configuration: 30000 / 10500 = 2.86, 30000 / 7500 = 4
        (30000, 15000, QUEUE, 3, 4),
        # Mistral-24B: 60000 / 8400 = 7.14, 60000 / 6000 = 10
        (60000, 12000, QUEUE, 8, 10),
        # KV: 180 / 95 = 1.89, 180 / 75 = 2.4
        (180, 100, KV, 2, 3),
        (1, 100, KV, 1, 1),
        (0, 1000, QUEUE, 0, 0),
        # 2.1 / (0.7 * 1) is 3.0000000000000004 in floats and 3 in truth
        (2.1, 1, QUEUE, 3, 5),
    ],
)
def test_the_band_is_the_papers(amount: float, each: float, band: Band, low: int, high: int) -> None:
    got = replicas_for(amount, each=each, band=band)
    assert (got.low, got.high) == (low, high)


@pytest.mark.parametrize(
    ("tokens", "used", "current", "replicas", "rule"),
    [
        (1800, 0, 1, 4, Rule.QUEUE),  # 3..4: jump to ceil(3.5)
        (700, 0, 1, 1, Rule.STEADY),  # 1..2 holds 1
        (0, 180, 1, 3, Rule.KV),  # 2..3: ceil(2.5)
        (1800, 450, 1, 6, Rule.KV),  # queue 3..4, KV 450/95=4.7 -> 5, 450/75 = 6: 5..6 -> ceil(5.5)
        (1800, 0, 3, 3, Rule.STEADY),
        (1800, 0, 4, 4, Rule.STEADY),
        (30000, 0, 1, 7, Rule.QUEUE),  # 43..60, bounded by max
    ],
)
def test_growing_jumps_to_the_middle_of_the_band(
    worlds: Any, *, tokens: float, used: int, current: int, replicas: int, rule: Rule
) -> None:
    got = decide(
        worlds.scaling(1, 7),
        given_(
            worlds,
            current=current,
            demand=worlds.demand(tokens, 1, 1),
            kv=KvUse(used=used, pages_per_replica=100),
        ),
    )
    assert (got.replicas, got.rule) == (replicas, rule)
    assert bool(got.limited) == (tokens == 30000)


def test_shrinking_takes_one_after_a_whole_window(worlds: Any) -> None:
    scaling = worlds.scaling(1, 4, scale_down_s=10.0)
    first = decide(scaling, given_(worlds, current=4, now=100.0))
    assert (first.replicas, first.rule, first.below_since) == (4, Rule.WINDOW, 100.0)
    almost = decide(scaling, given_(worlds, current=4, now=109.9, below_since=first.below_since))
    assert (almost.replicas, almost.below_since) == (4, 100.0)
    after = decide(scaling, given_(worlds, current=4, now=110.0, below_since=almost.below_since))
    assert (after.replicas, after.rule) == (3, Rule.SHRINK)


def test_the_window_is_at_least_the_measured_load_time(worlds: Any) -> None:
    scaling = worlds.scaling(1, 4, scale_down_s=10.0)
    waits = decide(scaling, given_(worlds, current=2, now=130.0, below_since=100.0, load_time_s=31.0))
    assert (waits.replicas, waits.rule) == (2, Rule.WINDOW)
    goes = decide(scaling, given_(worlds, current=2, now=131.0, below_since=100.0, load_time_s=31.0))
    assert goes.replicas == 1


def test_demand_in_between_restarts_the_window(worlds: Any) -> None:
    got = decide(
        worlds.scaling(1, 4),
        given_(worlds, current=3, now=109.0, below_since=100.0, demand=worlds.demand(1800, 3, 3)),
    )
    assert (got.replicas, got.rule, got.below_since) == (3, Rule.STEADY, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"demand": None}, "no gateway"),
        ({"kv": None}, "KV use"),
    ],
)
def test_unknown_is_not_zero(worlds: Any, changes: dict[str, Any], words: str) -> None:
    got = decide(worlds.scaling(1, 4), given_(worlds, current=3, below_since=0.0, **changes))
    assert (got.replicas, got.rule, got.below_since) == (3, Rule.UNKNOWN, None)
    assert words in got.reason


def test_a_silent_gateway_may_grow_and_never_shrinks(worlds: Any) -> None:
    partly = worlds.demand(1800, 2, 2, complete=False)
    grows = decide(worlds.scaling(1, 4), given_(worlds, demand=partly))
    assert grows.replicas == 4
    nothing = worlds.demand(complete=False)
    holds = decide(worlds.scaling(1, 4), given_(worlds, current=4, below_since=0.0, demand=nothing))
    assert (holds.replicas, holds.rule) == (4, Rule.UNKNOWN)


def test_without_a_measured_rate_only_an_empty_queue_says_something(worlds: Any) -> None:
    waiting = given_(worlds, current=2, prefill_tokens_per_s=None, demand=worlds.demand(900, 1, 1))
    got = decide(worlds.scaling(1, 4), waiting)
    assert (got.replicas, got.rule) == (2, Rule.UNKNOWN)
    assert "prefill rate" in got.reason
    empty = given_(worlds, current=2, prefill_tokens_per_s=None, below_since=0.0)
    assert decide(worlds.scaling(1, 4), empty).replicas == 1


def test_from_zero_one_waiting_request_is_enough(worlds: Any) -> None:
    got = decide(
        worlds.scaling(0, 4),
        given_(worlds, current=0, prefill_tokens_per_s=None, demand=worlds.demand(50, 1, 1)),
    )
    assert (got.replicas, got.rule) == (1, Rule.FROM_ZERO)


def test_to_zero_only_without_a_request(worlds: Any) -> None:
    scaling = worlds.scaling(0, 4)
    streaming = given_(worlds, below_since=0.0, demand=worlds.demand(0, 0, 1))
    assert decide(scaling, streaming).replicas == 1
    assert decide(scaling, given_(worlds, below_since=0.0)).replicas == 0
    kept = decide(worlds.scaling(1, 4), given_(worlds, below_since=0.0))
    assert (kept.replicas, kept.rule) == (1, Rule.STEADY)


@pytest.mark.parametrize(
    ("capacity", "tokens", "replicas", "words"),
    [
        (3, 30000, 3, "spec.scaling.max is 5"),
        (3, 2500, 3, "5 replicas are wanted, 3 devices"),  # 4..5 -> 5
        (None, 2500, 5, ""),
        (0, 0, 0, "1 replica is wanted, 0 devices"),
    ],
)
def test_devices_limit_and_it_is_said(
    worlds: Any, capacity: int | None, tokens: float, replicas: int, words: str
) -> None:
    got = decide(worlds.scaling(1, 5), given_(worlds, capacity=capacity, demand=worlds.demand(tokens, 1, 1)))
    assert got.replicas == replicas
    assert words in got.limited and bool(got.limited) == bool(words)


def test_a_changed_bound_is_obeyed_at_once(worlds: Any) -> None:
    above = decide(worlds.scaling(1, 2), given_(worlds, current=4, demand=None))
    assert (above.replicas, above.rule) == (2, Rule.BOUNDS)
    below = decide(worlds.scaling(2, 4), given_(worlds, current=0, demand=None))
    assert (below.replicas, below.rule) == (2, Rule.BOUNDS)


counts = st.integers(0, 12)
amounts = st.floats(0, 1e6, allow_nan=False)


@given(
    least=st.integers(0, 4),
    extra=st.integers(0, 8),
    current=counts,
    capacity=st.none() | counts,
    tokens=amounts,
    used=st.integers(0, 2000),
    rate=st.none() | st.floats(0.1, 1e5),
    complete=st.booleans(),
    known=st.booleans(),
)
def test_any_demand(worlds: Any, known: bool, complete: bool, **drawn: Any) -> None:
    least = drawn["least"]
    most = max(least + drawn["extra"], 1)
    told = worlds.demand(drawn["tokens"], 1, 1, complete=complete) if known else None
    values = given_(
        worlds,
        current=drawn["current"],
        capacity=drawn["capacity"],
        demand=told,
        kv=KvUse(used=drawn["used"], pages_per_replica=100),
        prefill_tokens_per_s=drawn["rate"],
        below_since=0.0,
    )
    got: Decision = decide(worlds.scaling(least, most), values)
    room = most if drawn["capacity"] is None else min(most, drawn["capacity"])
    assert min(least, room) <= got.replicas <= room
    assert got.reason
    inside = min(least, room) <= drawn["current"] <= room
    if inside and not (known and complete):
        assert got.replicas >= drawn["current"]
    if inside:
        assert got.replicas >= drawn["current"] - 1
    # The decision is a fixed point: asking again at once does not move it further up.
    if inside and got.replicas > drawn["current"]:
        again = decide(
            worlds.scaling(least, most),
            given_(
                worlds,
                current=got.replicas,
                capacity=drawn["capacity"],
                demand=told,
                kv=values.kv,
                prefill_tokens_per_s=drawn["rate"],
            ),
        )
        assert again.replicas == got.replicas


@given(tokens=amounts, more=amounts, current=st.integers(1, 6))
def test_more_demand_never_means_fewer(worlds: Any, tokens: float, more: float, current: int) -> None:
    scaling = worlds.scaling(1, 12)
    few = decide(scaling, given_(worlds, current=current, demand=worlds.demand(tokens, 1, 1)))
    many = decide(scaling, given_(worlds, current=current, demand=worlds.demand(tokens + more, 1, 1)))
    assert many.replicas >= few.replicas
