"""A gateway's page to demand: a value, zero and unknown are three answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercast_operator.demand import Reading, demand_of, parse_reading

PAGE = """# HELP layercast_gateway_prompt_tokens_waiting Prompt tokens.
# TYPE layercast_gateway_prompt_tokens_waiting gauge
layercast_gateway_prompt_tokens_waiting{model="m"} 1200.0
# TYPE layercast_gateway_requests_waiting gauge
layercast_gateway_requests_waiting{model="m"} 4.0
# TYPE layercast_gateway_requests_in_flight gauge
layercast_gateway_requests_in_flight{model="m"} 6.0
# TYPE layercast_gateway_ttft_seconds histogram
layercast_gateway_ttft_seconds_bucket{le="0.1",model="m"} 3.0
layercast_gateway_ttft_seconds_count{model="m"} nonsense
"""


def reading(at: float = 100.0) -> Reading:
    return parse_reading(PAGE, at=at)


def test_values_and_zero() -> None:
    demand, problem = demand_of({"g": reading()}, models=["m", "quiet"], now=101.0, age_max_s=2.0)
    m, quiet = demand["m"], demand["quiet"]
    assert (m.prompt_tokens_waiting, m.requests_waiting, m.requests_in_flight) == (1200, 4, 6)
    assert m.complete and quiet.complete and problem == ""
    assert (quiet.prompt_tokens_waiting, quiet.requests_in_flight) == (0, 0)


def test_more_that_waits_is_worth_a_pass_and_less_is_not() -> None:
    some, more = (
        reading(),
        parse_reading(PAGE.replace('waiting{model="m"} 4.0', 'waiting{model="m"} 5.0'), at=1),
    )
    new = parse_reading(PAGE.replace('"m"', '"new"'), at=1)
    running = parse_reading(PAGE.replace('in_flight{model="m"} 6.0', 'in_flight{model="m"} 9.0'), at=1)
    assert more.calls_for_more(some) and new.calls_for_more(some)
    assert (
        not some.calls_for_more(more) and not some.calls_for_more(some) and not running.calls_for_more(some)
    )


def test_gateways_are_summed_and_a_silent_one_is_said() -> None:
    both, _ = demand_of({"g": reading(), "h": reading()}, models=["m"], now=101.0, age_max_s=2.0)
    assert both["m"].prompt_tokens_waiting == 2400 and both["m"].complete
    for silent in (None, reading(at=90.0)):
        partly, problem = demand_of({"g": reading(), "h": silent}, models=["m"], now=101.0, age_max_s=2.0)
        assert partly["m"].prompt_tokens_waiting == 1200 and not partly["m"].complete
        assert problem == "silent: h"


@pytest.mark.parametrize(
    ("readings", "words"),
    [({}, "no gateway is known"), ({"g": None}, "for 2 s: g"), ({"g": reading(at=90.0)}, "for 2 s: g")],
)
def test_unknown(readings: dict[str, Reading | None], words: str) -> None:
    demand, problem = demand_of(readings, models=["m"], now=101.0, age_max_s=2.0)
    assert demand == {} and words in problem


@pytest.mark.parametrize(
    "text", ["", "# TYPE other gauge\nother 1\n", PAGE.replace("_in_flight", "_inflight")]
)
def test_a_page_without_our_names_is_unknown_and_not_zero(text: str) -> None:
    with pytest.raises(ValueError, match="requests_in_flight"):
        parse_reading(text, at=0.0)


def test_a_gateway_that_has_seen_nothing_yet_tells_zero() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("# TYPE")]
    got = parse_reading("\n".join(lines), at=0.0)
    assert set(got.values) == {
        "layercast_gateway_prompt_tokens_waiting",
        "layercast_gateway_requests_waiting",
        "layercast_gateway_requests_in_flight",
    }


@given(
    st.lists(st.sampled_from([*PAGE.splitlines(), "# ", "#", "# TYPE", "x{", PAGE[40:90], 'a{b="'])).map(
        "\n".join
    )
)
def test_any_page_is_a_reading_or_a_problem(text: str) -> None:
    try:
        assert parse_reading(text, at=0.0).values
    except ValueError as error:
        assert str(error)


def test_nonsense_values_count_for_nothing() -> None:
    got = parse_reading(PAGE.replace("1200.0", "NaN").replace("4.0", "-3"), at=0.0)
    assert got.values["layercast_gateway_prompt_tokens_waiting"] == {"m": 0.0}
    assert got.values["layercast_gateway_requests_waiting"] == {"m": 0.0}
