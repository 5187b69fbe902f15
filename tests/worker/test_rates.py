"""The prefill rate is that of a full queue, whatever small prompts come between."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercast_agent.worker.rates import MEASURES_FROM, WINDOW_S, Compared, Mean, PrefillRate, StepTimes
from layercast_operator.modelservice import Band
from layercast_operator.policy import replicas_for

CHUNK = 128
TARGET_S = Band(low=0.5, high=0.7)


NEW = PrefillRate(chunk_tokens=CHUNK)


def after(
    sizes: list[int], *, fixed_s: float = 0.0, token_s: float = 0.0, rate: PrefillRate = NEW
) -> PrefillRate:
    """What a device whose steps cost `fixed_s` and `token_s` a token tells after steps of these sizes."""
    for tokens in sizes:
        rate = rate.after(tokens=tokens, seconds=fixed_s + token_s * tokens)
    return rate


def test_tiny_prompts_do_not_lower_what_a_chunk_showed() -> None:
    chunk = after([CHUNK], fixed_s=0.05, token_s=0.002)
    assert chunk.tokens_per_s == pytest.approx(CHUNK / 0.306)
    assert after([3, 5, 8] * 400, fixed_s=0.05, token_s=0.002, rate=chunk) == chunk


def test_one_short_request_at_zero_asks_for_one_replica() -> None:
    """Five tokens in 0.6 s were taken for a rate of 8 a second, and a prompt of 12 for the work of three replicas."""
    rate = after([5] * 20, fixed_s=0.59, token_s=0.002)
    assert not rate.measured
    assert replicas_for(12, each=5 / 0.6, band=TARGET_S).high == 3
    assert replicas_for(12, each=rate.tokens_per_s, band=TARGET_S).high == 1


def test_a_cold_first_step_is_soon_forgotten() -> None:
    cold = PrefillRate(chunk_tokens=CHUNK).after(tokens=100, seconds=1.0)
    assert after([100] * 10, token_s=0.001, rate=cold).tokens_per_s > 900


def test_one_layer_of_a_prompt_shows_what_all_layers_would() -> None:
    rate = PrefillRate(chunk_tokens=CHUNK).after(tokens=100, seconds=0.01, part=1 / 30)
    assert rate.measured and rate.tokens_per_s == pytest.approx(100 / 0.3)


def test_steps_without_prompt_tokens_say_nothing() -> None:
    rate = after([64], token_s=0.001)
    assert rate.after(tokens=0, seconds=1.0) is rate


FIXED_S = st.floats(0.0, 1.0)
TOKEN_S = st.floats(1e-5, 0.01)


@given(st.lists(st.integers(1, CHUNK), min_size=1, max_size=60), FIXED_S, TOKEN_S)
def test_what_is_told_lies_between_what_was_shown_and_what_a_chunk_would_show(
    sizes: list[int], fixed_s: float, token_s: float
) -> None:
    def shows(tokens: float) -> float:
        return tokens / (fixed_s + token_s * tokens)

    rate = after(sizes, fixed_s=fixed_s, token_s=token_s)
    least = MEASURES_FROM * CHUNK if rate.measured else min(sizes)
    most = shows(CHUNK) if rate.measured else math.sqrt(CHUNK) * shows(max(sizes))
    assert shows(least) * (1 - 1e-9) <= rate.tokens_per_s <= most * (1 + 1e-9)


@given(st.lists(st.integers(1, 31), max_size=200), FIXED_S, TOKEN_S)
def test_no_number_of_small_prompts_lowers_a_measured_rate(
    small: list[int], fixed_s: float, token_s: float
) -> None:
    before = after([CHUNK, 40], fixed_s=fixed_s, token_s=token_s)
    told = after(small, rate=before, fixed_s=fixed_s, token_s=token_s).tokens_per_s
    assert told >= before.tokens_per_s * (1 - 1e-9)


@given(st.floats(0.1, 10.0), st.integers(32, CHUNK))
def test_another_speed_is_learned_within_a_few_windows(factor: float, tokens: int) -> None:
    slow = after([tokens] * 50, token_s=0.002)
    steps = math.ceil(6 * WINDOW_S / (0.002 * factor * tokens))
    told = after([tokens] * steps, token_s=0.002 * factor, rate=slow).tokens_per_s
    assert told == pytest.approx(500 / factor, rel=0.03)


def test_steps_are_compared_with_what_was_expected_before_them() -> None:
    times = StepTimes(prefill=NEW)
    for tokens, seconds, decoded in (
        (CHUNK, 0.5, False),  # the first of each kind: nothing was expected
        (0, 0.02, True),
        (64, 0.3, False),
        (5, 0.2, True),  # too few tokens to be a measure
        (0, 0.03, True),
        (0, 9.9, False),  # a stage of somebody's pipeline
    ):
        times = times.after(tokens=tokens, seconds=seconds, decoded=decoded)
    assert times.compared == {
        "prefill": Compared(count=1, predicted_s=0.25, actual_s=0.3),
        "decode": Compared(count=1, predicted_s=0.02, actual_s=0.03),
    }
    assert times.decode.seconds == pytest.approx(0.025)


@given(st.lists(st.floats(0.001, 10.0), min_size=2, max_size=100))
def test_a_mean_is_within_what_was_seen(seen: list[float]) -> None:
    mean = Mean()
    for seconds in seen:
        mean = mean.after(seconds)
    assert min(seen) * (1 - 1e-9) <= mean.seconds <= max(seen) * (1 + 1e-9)


def test_a_step_is_expected_to_take_what_its_prompts_take_and_never_less_than_one_without() -> None:
    times = StepTimes(prefill=NEW)
    assert times.expected_s(CHUNK) == 0.0, "nothing is known yet"
    times = times.after(tokens=CHUNK, seconds=1.0).after(tokens=0, seconds=0.2, decoded=True)
    assert times.expected_s(CHUNK / 2) == pytest.approx(0.5)
    assert times.expected_s(0) == times.expected_s(CHUNK / 100) == pytest.approx(0.2)
