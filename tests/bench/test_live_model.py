"""The yardstick of bench.live: the model's golden values, and that the arrivals are what their names say."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from bench.live import arrivals, predict
from bench.live.prompts import length_class

LENGTHS = arrivals.Lengths(
    prompt_tokens=64, prompt_tokens_min=16, prompt_tokens_max=384, output_tokens=8, output_tokens_max=32
)


PROMPT = 8


def alone(at_s: float) -> arrivals.Arrival:
    """A request that fills a step and wants one token: the paper's."""
    return arrivals.Arrival(at_s=at_s, prompt_tokens=PROMPT, output_tokens=1)


def one_at_a_time(service_s: float) -> predict.Steps:
    """Steps of one such request each."""
    return predict.Steps(
        tokens_max=PROMPT, requests_max=1, seconds=lambda tokens: service_s * tokens / PROMPT
    )


def world(*, layers: int, layer_load_s: float) -> predict.World:
    """One layer of one request is a second; the first layer is there at 0."""
    return predict.World(
        layers=layers,
        steps=one_at_a_time(layers),
        decided_at_s=0.0,
        first_layer_s=0.0,
        layer_load_s=layer_load_s,
    )


@pytest.mark.parametrize(
    ("setting", "mean", "last", "stopped"),
    [
        ((32, 3, 12), 115.0, 204, 253),
        ((32, 6, 12), 124.5, 199, 288),
        ((40, 6, 16), 192.0, 329, 440),
        ((80, 6, 24), 536.1, 975, 1200),
    ],
)
def test_golden_values(setting: tuple[int, int, int], mean: float, last: int, stopped: int) -> None:
    """All at once: the table of the design, by the event-driven model too."""
    layers, load, requests = setting
    waits = predict.live([alone(0.0)] * requests, world(layers=layers, layer_load_s=load))
    assert sum(waits) / requests == pytest.approx(mean, abs=0.5)
    assert max(waits) == last
    assert (
        max(predict.stop_the_world([alone(0.0)] * requests, world(layers=layers, layer_load_s=load)))
        == stopped
    )


def test_steps_take_what_was_measured() -> None:
    """Straight between the three measurements; a full batch ends as many requests a second as it did."""
    steps = predict.steps_of(
        tokens_max=128,
        requests_max=16,
        prompt_tokens=33,
        output_tokens=4,
        alone_s=0.17,
        between_s=0.09,
        capacity=4.8,
    )
    assert steps.seconds(1) == 0.09
    assert steps.seconds(33) == pytest.approx(0.17)
    assert steps.seconds(17) == pytest.approx(0.13)
    asked = [arrivals.Arrival(at_s=0.0, prompt_tokens=33, output_tokens=4) for _ in range(200)]
    never = predict.World(
        layers=30, steps=steps, decided_at_s=1e9, first_layer_s=1.0, layer_load_s=1.0, targets=1
    )
    assert max(predict.live(asked, never)) == pytest.approx(200 / 4.8, rel=0.03)


@pytest.mark.parametrize("seed", range(20))
def test_live_is_never_worse_than_waiting(seed: int) -> None:
    """In the model, whatever the arrivals: the mean is no worse than stop-the-world's."""
    chance = random.Random(seed)
    layers = chance.randint(2, 40)
    place = predict.World(
        layers=layers,
        steps=one_at_a_time(1.0),
        decided_at_s=chance.uniform(0, 5),
        first_layer_s=chance.uniform(0.01, 1),
        layer_load_s=chance.uniform(0.5, 12) / layers,
        targets=chance.randint(1, 3),
    )
    times, at = [], 0.0
    for _ in range(60):
        at += chance.expovariate(chance.choice([0.5, 1.8]))
        times.append(at)
    asked = [alone(time) for time in times]
    lively, stopped = predict.live(asked, place), predict.stop_the_world(asked, place)
    assert sum(lively) <= sum(stopped) * 1.02


def test_a_step_has_both_rates() -> None:
    """Half of the capacity before, 1.8 times after."""
    shape = arrivals.step(capacity=4.0, low=0.5, high=1.8, low_s=50, high_s=100, lengths=LENGTHS, seed=1)
    before = [each for each in shape.arrivals if each.at_s < 50]
    assert len(before) == pytest.approx(100, abs=3)
    assert len(shape.arrivals) - len(before) == pytest.approx(720, abs=5)
    assert shape.overload_at_s == 50


@pytest.mark.parametrize("make", [arrivals.burst, arrivals.azure_like])
def test_shapes_have_the_mean_that_was_asked_for(make: object) -> None:
    """Bursts and waves change when, not how many."""
    assert callable(make)
    shape = make(capacity=5.0, mean=1.2, seconds=400, lengths=LENGTHS, seed=3)
    assert len(shape.arrivals) == pytest.approx(5.0 * 1.2 * 400, rel=0.1)
    assert all(16 <= each.prompt_tokens <= 384 for each in shape.arrivals)
    assert all(1 <= each.output_tokens <= 32 for each in shape.arrivals)


def test_a_trace_keeps_its_pattern(tmp_path: Path) -> None:
    """A minute with nine tenths of the requests stays a tenth of the time with nine tenths of them."""
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for index in range(1000):
        second = 60 + index % 60 if index % 10 else index * 600 // 1000
        lines.append(
            f"2023-11-16 18:{second // 60:02d}:{second % 60:02d}.1234560,{1000 + index},{10 + index % 5}"
        )
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(lines) + "\n")
    shape = arrivals.from_csv(path, capacity=4.0, mean=1.0, seconds=100, lengths=LENGTHS, seed=1)
    assert len(shape.arrivals) == 400
    inside = sum(1 for each in shape.arrivals if 10 <= each.at_s <= 20.2)
    assert inside > 0.85 * len(shape.arrivals)
    assert max(each.prompt_tokens for each in shape.arrivals) <= 384


def test_a_wrong_trace_names_its_line(tmp_path: Path) -> None:
    """Whoever brings another format is told where it stops being ours."""
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00.0,many,3\n")
    with pytest.raises(ValueError, match="line 2"):
        arrivals.read_trace(path)


def test_few_classes_of_lengths() -> None:
    """A trace with many lengths needs few reference answers, and no prompt is longer than asked."""
    classes = {length_class(tokens) for tokens in range(16, 385)}
    assert len(classes) <= 9
    assert all(length_class(tokens) <= tokens for tokens in range(16, 385))
    assert all(length_class(each) == each for each in classes)
