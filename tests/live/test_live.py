"""The two choices of live scale-up against golden values of the scheduling model."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercast_agent.live import (
    LiveRequest,
    Strategy,
    choose_quantum,
    choose_take,
    mean_completion,
    next_quantum,
    simulate,
)


def test_worked_example_of_the_paper() -> None:
    done = simulate(layers=7, layer_load_time=6, requests=6, strategy=Strategy.LIVE)
    assert [c.at for c in done] == [7, 12, 17, 21, 24, 27]
    # The first request may as well gather its one layer at the target, (1, 6): it ends at 7 either way.
    assert [(c.target_layers, c.source_layers) for c in done[1:]] == [(2, 5), (2, 5), (3, 4), (4, 3), (4, 3)]


def test_best_effort_of_the_worked_example() -> None:
    done = simulate(layers=7, layer_load_time=6, requests=6, strategy=Strategy.BEST_EFFORT)
    assert [c.at for c in done] == [7, 13, 19, 25, 31, 37]


def test_a_seventh_request() -> None:
    live = simulate(layers=7, layer_load_time=6, requests=7, strategy=Strategy.LIVE)
    naive = simulate(layers=7, layer_load_time=6, requests=7, strategy=Strategy.BEST_EFFORT)
    assert (live[-1].at, naive[-1].at) == (29, 42)


def _row(strategy: Strategy, *, layers: int, layer_load_time: int, requests: int) -> tuple[int, int]:
    done = simulate(layers=layers, layer_load_time=layer_load_time, requests=requests, strategy=strategy)
    return (math.floor(mean_completion(done) + 0.5), max(c.at for c in done))


@pytest.mark.parametrize(
    ("layers", "layer_load_time", "requests", "rows"),
    [
        (32, 3, 12, [(208, 384), (153, 253), (190, 322), (115, 204)]),
        (32, 6, 12, [(208, 384), (183, 288), (200, 363), (125, 199)]),
        (40, 6, 16, [(340, 640), (276, 440), (326, 597), (192, 329)]),
        (80, 6, 24, [(1000, 1920), (728, 1200), (958, 1761), (536, 975)]),
    ],
)
def test_mean_and_last_completion_of_each_strategy(
    layers: int, layer_load_time: int, requests: int, rows: list[tuple[int, int]]
) -> None:
    assert [
        _row(strategy, layers=layers, layer_load_time=layer_load_time, requests=requests)
        for strategy in Strategy
    ] == rows


@given(layers=st.integers(2, 20), layer_load_time=st.integers(1, 8), requests=st.integers(1, 12))
def test_live_is_never_slower_than_no_help_and_executes_each_layer_once(
    layers: int, layer_load_time: int, requests: int
) -> None:
    live = simulate(layers=layers, layer_load_time=layer_load_time, requests=requests, strategy=Strategy.LIVE)
    alone = simulate(
        layers=layers, layer_load_time=layer_load_time, requests=requests, strategy=Strategy.NONE
    )
    assert len(live) == requests
    assert all(c.target_layers + c.source_layers == layers for c in live)
    assert max(c.at for c in live) <= max(c.at for c in alone)


REQUESTS = st.lists(
    st.builds(
        LiveRequest,
        request_id=st.uuids().map(str),
        arrived_at=st.floats(0, 100),
        layers_done=st.integers(0, 8),
        tokens=st.integers(1, 200),
    ),
    unique_by=lambda r: r.request_id,
    max_size=8,
)


@given(queue=REQUESTS, resident=st.sets(st.integers(0, 7)))
def test_a_quantum_is_always_the_earliest_that_can_run(queue: list[LiveRequest], resident: set[int]) -> None:
    chosen = choose_quantum(queue, layers=8, resident=resident.__contains__)
    able = [r for r in queue if r.layers_done < 8 and r.layers_done in resident]
    assert (chosen is None) == (not able)
    if chosen is not None:
        assert chosen in able
        assert all(chosen.arrived_at <= other.arrived_at for other in able)


@given(queue=REQUESTS, resident=st.sets(st.integers(0, 7)), tokens_max=st.integers(1, 400))
def test_who_rides_along_waits_for_the_same_layer_and_nobody_is_passed(
    queue: list[LiveRequest], resident: set[int], tokens_max: int
) -> None:
    chosen = choose_quantum(queue, layers=8, resident=resident.__contains__)
    joined = next_quantum(queue, layers=8, resident=resident.__contains__, tokens_max=tokens_max)
    assert (chosen is None) == (not joined)
    if chosen is None:
        return
    able = sorted(
        (r for r in queue if r.layers_done == chosen.layers_done), key=lambda r: (r.arrived_at, r.request_id)
    )
    assert joined == able[: len(joined)]
    assert joined[0] == chosen
    together = sum(r.tokens for r in joined)
    assert len(joined) == 1 or together <= tokens_max
    assert len(joined) == len(able) or together + able[len(joined)].tokens > tokens_max


@given(queue=REQUESTS)
def test_a_complete_giver_keeps_its_head(queue: list[LiveRequest]) -> None:
    head = choose_take(queue, giver_complete=False)
    second = choose_take(queue, giver_complete=True)
    assert (head is None) == (not queue)
    assert (second is None) == (len(queue) < 2)
    if second is not None and head is not None:
        assert second != head
        assert head.arrived_at <= second.arrived_at
