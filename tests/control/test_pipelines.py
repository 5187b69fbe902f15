"""Who loads what first when nobody is complete: every part once, the largest as small as can be."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercast_operator.actions import StartTransfer
from layercast_operator.pipelines import complements, covered_bytes, late_order, orders, split
from layercast_operator.snapshot import ReplicaState

sizes = st.lists(st.integers(1, 40), min_size=3, max_size=10)


@given(sizes, st.integers(1, 5))
def test_each_order_has_every_segment_once(segment_bytes: list[int], ways: int) -> None:
    """And the parts that come first are disjoint and cover all layers."""
    found = orders(segment_bytes, ways)
    assert len(found) == ways
    for order in found:
        assert sorted(order) == list(range(len(segment_bytes)))
    layers = [segment for part in split(segment_bytes, ways) for segment in part]
    assert layers == list(range(1, len(segment_bytes) - 1))
    assert found[0][:2] == (0, len(segment_bytes) - 1)


@given(sizes, st.integers(2, 4))
def test_no_split_in_runs_has_a_smaller_largest_part(segment_bytes: list[int], ways: int) -> None:
    """Against every way to cut the layers."""
    layers, ends = segment_bytes[1:-1], segment_bytes[0] + segment_bytes[-1]
    best = ends + sum(layers)
    for cuts in combinations(range(len(layers) + 1), min(ways - 1, len(layers) + 1)):
        bounds = [0, *cuts, len(layers)]
        parts = [sum(layers[a:b]) for a, b in pairwise(bounds)]
        best = min(best, max(parts[0] + ends, *parts[1:]))
    assert covered_bytes(segment_bytes, ways) <= best


def arrived(order: tuple[int, ...], segment_bytes: list[int], nbytes: float) -> set[int]:
    """Whole segments after so many bytes."""
    found = set()
    for segment in order:
        nbytes -= segment_bytes[segment]
        if nbytes < -1e-9:
            break
        found.add(segment)
    return found


def covered_at(
    orders_: list[tuple[int, ...]], segment_bytes: list[int], *, late: tuple[int, ...] = (), since: float = 0
) -> float:
    """Bytes that each of the first has when all together have everything, and the first of them both ends."""
    moments: list[float] = [sum(segment_bytes[s] for s in o[: n + 1]) for o in orders_ for n in range(len(o))]
    moments += [since + sum(segment_bytes[s] for s in late[: n + 1]) for n in range(len(late))]
    for moment in sorted(moments):
        held = [arrived(order, segment_bytes, moment) for order in orders_]
        leads = {0, len(segment_bytes) - 1} <= held[0]
        if leads and set().union(*held, arrived(late, segment_bytes, moment - since)) >= set(
            range(len(segment_bytes))
        ):
            return float(moment)
    raise AssertionError("never")


@given(sizes, st.integers(1, 4), st.floats(0.0, 1.0))
def test_who_comes_late_complements_those_that_load(
    segment_bytes: list[int], ways: int, fraction: float
) -> None:
    """Every segment once, and the model is never there later than without it."""
    late = late_order(segment_bytes, ways)
    assert sorted(late) == list(range(len(segment_bytes)))
    first = orders(segment_bytes, ways)
    alone = covered_at(first, segment_bytes)
    assert covered_at(first, segment_bytes, late=late, since=fraction * alone) <= alone


def test_half_of_what_is_left_when_one_loaded_alone() -> None:
    """Thirty equal layers: one that comes at 20 % of the load makes 60 % of it enough."""
    equal = [1, *[10] * 30, 1]
    (alone,) = orders(equal, 1)
    late = covered_at([alone], equal, late=late_order(equal, 1), since=0.2 * sum(equal))
    assert late / sum(equal) == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize(
    ("fraction", "ways", "worth_it"),
    [(0.0, 1, True), (0.3, 1, True), (0.34, 1, False), (0.1, 2, True), (0.2, 2, False), (0.5, 2, False)],
)
def test_complementing_is_for_who_comes_early(fraction: float, ways: int, worth_it: bool) -> None:
    assert complements(fraction, ways) is worth_it


def test_a_model_with_a_large_embedding() -> None:
    """SmolLM2's sizes in fp32: two and three ways cover the model after half and a good third of the bytes."""
    segment_bytes = [113_246_208, *[14_157_824] * 30, 2_304]
    total = sum(segment_bytes)
    assert covered_bytes(segment_bytes, 2) / total < 0.51
    assert covered_bytes(segment_bytes, 3) / total < 0.35


def scaled_from_zero(worlds: Any, replicas: int, *, slow_start: bool = False) -> Any:
    """A service that nobody serves; every node's disk has its checkpoint. `slow_start`: the last one never comes."""
    world = worlds.World(nodes=replicas)
    model = worlds.service(replicas=replicas)
    for node in world.nodes.values():
        node.ready_at[world.digest(model.model.key)] = 0.0
    world.silent_starts = {f"node-{replicas - 1}"} if slow_start else set()
    p = worlds.Pilot(world, model)
    p.world.demand["m"] = worlds.demand()
    return p


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_scaled_from_zero_one_leads_and_each_loads_another_part_first(worlds: Any, replicas: int) -> None:
    """Every node reads its own disk: k sources, so that the model is there after a k-th of the time."""
    p = scaled_from_zero(worlds, replicas)
    transfers = [a for a in p.run(1) if isinstance(a, StartTransfer)]
    assert len(transfers) == replicas
    assert all(transfer.upstreams[0] is None for transfer in transfers)
    leaders = [t for t in transfers if t.lead is not None]
    (leader,) = leaders
    others = {t.replica_id for t in transfers} - {leader.replica_id}
    assert {peer.peer_id for peer in leader.lead or ()} == others
    firsts = {t.segment_order for t in transfers}
    assert len(firsts) == replicas
    if replicas > 1:
        assert leader.segment_order[:2] == (0, len(leader.segment_order) - 1), (
            "whoever leads embeds and chooses"
        )


def test_a_leader_waits_for_its_company_but_not_for_long(worlds: Any) -> None:
    """One of three replicas is asked for and never comes: the others go on after a moment."""
    p = scaled_from_zero(worlds, 3, slow_start=True)
    early = p.run(1)
    assert not [a for a in early if isinstance(a, StartTransfer)]
    assert "to load different parts" in p.turns["m"].plan.blocked
    late = [a for a in p.run(4) if isinstance(a, StartTransfer)]
    assert len([t for t in late if t.lead is not None]) == 1
    assert {len(t.lead) for t in late if t.lead is not None} == {1}


def test_another_leads_when_the_leader_is_lost(worlds: Any) -> None:
    p = scaled_from_zero(worlds, 3)
    (leader,) = [a for a in p.run(0.6) if isinstance(a, StartTransfer) and a.lead is not None]
    assert not p.world.replicas(ReplicaState.SERVING)
    p.world.kill(leader.node)
    again = [a for a in p.run(2) if isinstance(a, StartTransfer) and a.lead is not None]
    assert again and again[0].replica_id != leader.replica_id
    p.run(6)
    assert len(p.world.replicas(ReplicaState.SERVING)) == 2


def test_who_still_loads_when_another_is_complete_shares_its_queue(worlds: Any) -> None:
    """The leader had the copy beside it, say: the others need not be idle until they are complete too."""
    p = scaled_from_zero(worlds, 3)
    p.run(0.6)
    (leader,) = p.world.replicas(ReplicaState.LEADING)
    leader.done = worlds.NBYTES
    late = [a for a in p.run(1.4) if isinstance(a, StartTransfer)]
    assert {t.live_source.peer_id for t in late if t.live_source is not None} == {leader.replica_id}
    loading = p.world.replicas(ReplicaState.LIVE)
    # Each is asked once, and keeps what it has.
    assert sorted(t.replica_id for t in late) == sorted(replica.replica_id for replica in loading)
    assert len(loading) == 2 and all(t.lead is None for t in late)


def test_who_comes_late_joins_the_pipeline_and_loads_what_is_missing(worlds: Any) -> None:
    """A further target while the first replica still leads: it reads its own disk, from the other end."""
    p = scaled_from_zero(worlds, 2)
    p.models["m"] = worlds.service(replicas=1)
    p.run(0.6)
    (leader,) = p.world.replicas(ReplicaState.LEADING)
    p.models["m"] = worlds.service(replicas=2, generation=2)
    transfers = [a for a in p.run(0.6) if isinstance(a, StartTransfer)]
    (joins,) = transfers
    assert joins.replica_id != leader.replica_id and joins.lead is None
    assert joins.live_source is not None and joins.live_source.peer_id == leader.replica_id
    assert joins.upstreams[0] is None
    layers = len(joins.segment_order) - 2
    assert joins.segment_order[:layers] == tuple(range(layers, 0, -1))
    p.run(4)
    assert len(p.world.replicas(ReplicaState.SERVING)) == 2
    assert not [a for a in p.run(2) if isinstance(a, StartTransfer)]


def test_who_comes_very_late_joins_and_loads_in_order(worlds: Any) -> None:
    """It will be a live target for longer than it could have been missed as a stage."""
    p = scaled_from_zero(worlds, 2)
    p.models["m"] = worlds.service(replicas=1)
    p.run(1.6)
    (leader,) = p.world.replicas(ReplicaState.LEADING)
    assert leader.done > worlds.NBYTES / 2
    p.models["m"] = worlds.service(replicas=2, generation=2)
    (joins,) = [a for a in p.run(0.6) if isinstance(a, StartTransfer)]
    assert joins.live_source is not None and joins.live_source.peer_id == leader.replica_id
    assert joins.segment_order == (1, 2, 3, 0, 4)


def test_a_late_member_succeeds_a_leader_that_is_lost(worlds: Any) -> None:
    p = scaled_from_zero(worlds, 2)
    p.models["m"] = worlds.service(replicas=1)
    p.run(0.6)
    (leader,) = p.world.replicas(ReplicaState.LEADING)
    p.models["m"] = worlds.service(replicas=2, generation=2)
    (joins,) = [a for a in p.run(0.6) if isinstance(a, StartTransfer)]
    node = next(n for n in p.world.nodes.values() if leader.replica_id in n.replicas)
    p.world.kill(node.name)
    again = [a for a in p.run(2.5) if isinstance(a, StartTransfer) and a.replica_id == joins.replica_id]
    assert again and again[-1].lead is not None
