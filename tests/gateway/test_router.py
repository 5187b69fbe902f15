"""The router's rule: least loaded within the window, and a reason for every answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from layercast_gateway.router import Candidate, availability, choose, gives_up_at, window_of
from layercast_gateway.routes import EndpointRole, EndpointState

NOW = 100.0


def candidate(name: str, state: EndpointState = EndpointState.SERVING, **fields: Any) -> Candidate:
    values: dict[str, Any] = {"connected": True, "unstarted": 0, "in_flight": 0, **fields}
    return Candidate(replica_id=name, address=f"{name}:1", state=state, **values)


def chosen(*candidates: Candidate, window: int = 4) -> str | None:
    choice = choose(candidates, window=window, now=NOW)
    assert choice.reason
    return choice.candidate.replica_id if choice.candidate else None


def test_fewest_without_a_token_then_fewest_then_name() -> None:
    assert chosen(candidate("a", unstarted=1), candidate("b", in_flight=9)) == "b"
    assert chosen(candidate("a", in_flight=2), candidate("b", in_flight=1)) == "b"
    assert chosen(candidate("b"), candidate("a")) == "a"


def test_only_serving_and_connected_ones_are_given_requests() -> None:
    others = [candidate(s.value, s) for s in EndpointState if s is not EndpointState.SERVING]
    assert chosen(*others) is None
    assert chosen(candidate("a", connected=False)) is None
    assert chosen(*others, candidate("a", unstarted=3)) == "a"


def test_window_grows_with_live_targets() -> None:
    live = EndpointState.LIVE
    assert window_of([candidate("a")], window=4) == 4
    assert window_of([candidate("a"), candidate("t", live)], window=4) == 8
    assert window_of([candidate("a"), candidate("b"), candidate("t", live)], window=4) == 6
    assert window_of([candidate("t", live)], window=4) == 0
    assert chosen(candidate("a", unstarted=4)) is None
    assert chosen(candidate("a", unstarted=7), candidate("t", live)) == "a"
    assert chosen(candidate("a", unstarted=8), candidate("t", live)) is None


def test_a_lost_replica_is_used_only_when_no_other_serves() -> None:
    lost = candidate("a", avoid_until=NOW + 1)
    assert chosen(lost, candidate("b", unstarted=3)) == "b"
    full = choose([lost, candidate("b", unstarted=4)], window=4, now=NOW)
    assert full.candidate is None and full.retry_at == NOW + 1
    assert chosen(lost) == "a"
    assert chosen(candidate("a", avoid_until=NOW)) == "a"


def test_a_replica_that_gave_back_rests() -> None:
    held = candidate("a", hold_until=NOW + 2)
    choice = choose([held], window=4, now=NOW)
    assert choice.candidate is None and choice.retry_at == NOW + 2
    assert chosen(held, candidate("b")) == "b"


def test_availability_counts_those_that_come() -> None:
    states = [candidate("a"), candidate("b", connected=False), candidate("c", EndpointState.LOADING)]
    found = availability([*states, candidate("d", EndpointState.DRAINING)])
    assert (found.serving, found.coming) == (1, 2)
    assert gives_up_at(arrived_at=5, unavailable_since=None, wait_s=3) is None
    assert gives_up_at(arrived_at=5, unavailable_since=1, wait_s=3) == 8
    assert gives_up_at(arrived_at=5, unavailable_since=7, wait_s=3) == 10


def test_prompts_go_to_those_who_compute_them_and_name_who_decodes() -> None:
    prefill, decode = EndpointRole.PREFILL, EndpointRole.DECODE
    busy = candidate("p", role=prefill, unstarted=2, in_flight=9)
    places = [candidate("d", role=decode, in_flight=4), candidate("e", role=decode, in_flight=3)]
    choice = choose([busy, *places], window=4, now=NOW)
    assert choice.candidate is busy and choice.decode == places[1]
    full = choose([candidate("p", role=prefill, unstarted=4), *places], window=4, now=NOW)
    assert full.candidate is None, "those that decode are no room for prompts"
    resting = [candidate("d", role=decode, hold_until=NOW + 1), candidate("e", role=decode, connected=False)]
    alone = choose([busy, *resting], window=4, now=NOW)
    assert alone.candidate is busy and alone.decode is None and "nobody else decodes" in alone.reason


def test_without_one_role_the_other_takes_whole_requests() -> None:
    decode = candidate("d", role=EndpointRole.DECODE)
    gone = candidate("p", role=EndpointRole.PREFILL, connected=False)
    choice = choose([gone, decode], window=4, now=NOW)
    assert choice.candidate is not None and choice.candidate.replica_id == "d" and choice.decode is None
    both = choose([candidate("b"), decode], window=4, now=NOW)
    assert both.candidate is not None and both.candidate.replica_id == "b" and both.decode is None


def candidates() -> st.SearchStrategy[list[Candidate]]:
    times = st.sampled_from([0.0, NOW - 1, NOW + 1])
    one = st.builds(
        candidate,
        st.sampled_from("abcdef"),
        st.sampled_from(EndpointState),
        role=st.sampled_from(EndpointRole),
        connected=st.booleans(),
        unstarted=st.integers(0, 10),
        in_flight=st.integers(0, 20),
        avoid_until=times,
        hold_until=times,
    )
    return st.lists(one, max_size=6, unique_by=lambda c: c.replica_id)


@given(candidates(), st.integers(1, 5), st.randoms(use_true_random=False))
def test_choice_is_allowed_and_does_not_depend_on_order(
    found: list[Candidate], window: int, random: Any
) -> None:
    choice = choose(found, window=window, now=NOW)
    shuffled = list(found)
    random.shuffle(shuffled)
    assert choose(shuffled, window=window, now=NOW) == choice
    serving = [c for c in found if c.state is EndpointState.SERVING and c.connected]
    only_decode = all(c.role is EndpointRole.DECODE for c in serving)
    taking = [replace(c, role=EndpointRole.BOTH) for c in found] if only_decode else found
    allowed = [
        c
        for c in taking
        if c.state is EndpointState.SERVING
        and c.role is not EndpointRole.DECODE
        and c.connected
        and c.hold_until <= NOW
        and c.unstarted < window_of(taking, window=window)
    ]
    if choice.decode is not None:
        assert choice.decode in serving and choice.decode.role is EndpointRole.DECODE
        assert choice.candidate is not None and choice.candidate.role is EndpointRole.PREFILL
    if choice.candidate is None:
        trusted_are_full = not [c for c in allowed if c.avoid_until <= NOW]
        assert trusted_are_full
        assert choice.retry_at is None or choice.retry_at > NOW
    else:
        assert choice.candidate in allowed
        assert choice.candidate.avoid_until <= NOW or all(c.avoid_until > NOW for c in allowed)
