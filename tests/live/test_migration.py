"""When a request that moves is brought over in another round, and when it stops: the last pause is bounded."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercast_agent.migration import (
    LAST_TOKENS_MAX,
    ROUNDS_MAX,
    Moved,
    RoundCosts,
    Step,
    by_tokens,
    next_step,
    pause_s,
    share_out,
)


def play(prefix: int, ratio: float) -> tuple[int, int]:
    """Rounds and what is left for the last pause; `ratio` tokens are generated in the time that one is brought over."""
    moved, computed = Moved(computed=prefix, held=0, prefilling=False), float(prefix)
    while next_step(moved) is Step.ROUND:
        size = moved.computed - moved.held
        computed += size * ratio
        moved = replace(
            moved, held=moved.computed, computed=int(computed), rounds=moved.rounds + 1, last_round=size
        )
    return moved.rounds, moved.computed - moved.held


def test_a_tenth_is_left_after_each_round() -> None:
    """The digest's example: 1000, 100, 10."""
    assert play(1000, 0.1) == (2, 10)


@given(st.integers(0, 1_000_000), st.floats(0, 3))
def test_moves_end(prefix: int, ratio: float) -> None:
    """Also when the source is as fast as the way over; and where it is slower, the last pause is short."""
    rounds, left = play(prefix, ratio)
    assert rounds <= ROUNDS_MAX
    if ratio <= 0.1:
        assert left <= LAST_TOKENS_MAX


def test_a_prompt_is_brought_over_while_it_is_computed() -> None:
    assert next_step(Moved(computed=0, held=0, prefilling=True)) is Step.WAIT
    assert next_step(Moved(computed=8, held=0, prefilling=True)) is Step.ROUND
    assert next_step(Moved(computed=8, held=8, prefilling=True)) is Step.WAIT
    assert next_step(Moved(computed=9, held=8, prefilling=False)) is Step.LAST


@pytest.mark.parametrize(
    ("bytes_per_s", "prefill", "tokens"),
    [(0.0, 100.0, False), (1e6, 0.0, False), (1e6, 500.0, False), (1e6, 2000.0, True)],
)
def test_the_shorter_way_is_taken(bytes_per_s: float, prefill: float, tokens: bool) -> None:
    """100 positions of 1 kB: 0.1 s at 1 MB/s."""
    costs = RoundCosts(positions=100, row_bytes=1000, bytes_per_s=bytes_per_s, prefill_tokens_per_s=prefill)
    assert by_tokens(costs) is tokens


def test_the_pause_and_the_places() -> None:
    moved = Moved(computed=110, held=101, prefilling=False)
    assert pause_s(moved, prefill_tokens_per_s=100) == pytest.approx(0.1)
    assert pause_s(moved, prefill_tokens_per_s=0) == 0
    assert share_out(["a", "b", "c"], ["x", "y"]) == {"a": "x", "b": "y", "c": "x"}
    assert share_out(["a"], []) == {}
