"""Who loads what first when nobody is complete: every part once, the largest as small as can be."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercast_operator.actions import StartTransfer
from layercast_operator.pipelines import covered_bytes, orders, split
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
