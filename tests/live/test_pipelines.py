"""Which replicas run which layers: the fewest stages, and none where a layer is missing."""

from __future__ import annotations

from itertools import pairwise, product

from hypothesis import given
from hypothesis import strategies as st

from layercast_agent.pipelines import SwitchCosts, fetch_is_shorter, missing, plan_pipeline

LAYERS = 6
residency = st.dictionaries(
    st.sampled_from(["a", "b", "c"]), st.sets(st.integers(0, LAYERS - 1)), min_size=1, max_size=3
)


@given(residency)
def test_stages_cover_the_layers_in_order_and_are_the_fewest(resident: dict[str, set[int]]) -> None:
    """Against every assignment of layers to replicas."""
    stages = plan_pipeline(resident, layers=LAYERS, leader="a")
    best = None
    for who in product(resident, repeat=LAYERS):
        if all(layer in resident[peer] for layer, peer in enumerate(who)):
            changes = 1 + sum(a != b for a, b in pairwise(who))
            best = changes if best is None else min(best, changes)
    if stages is None:
        assert best is None
        assert missing(resident, layers=LAYERS)
        return
    assert [layer for stage in stages for layer in range(stage.first, stage.last)] == list(range(LAYERS))
    assert all(resident[s.peer_id].issuperset(range(s.first, s.last)) for s in stages)
    assert len(stages) == best


def test_a_complete_leader_is_its_own_pipeline() -> None:
    """Nobody else is asked."""
    everything = set(range(LAYERS))
    (stage,) = plan_pipeline({"z": everything, "a": everything}, layers=LAYERS, leader="z") or ()
    assert (stage.peer_id, stage.first, stage.last) == ("z", 0, LAYERS)


def test_the_shorter_switch_is_taken() -> None:
    """Half a gigabyte over a slow link, or a hundred tokens computed again."""
    costs = SwitchCosts(positions=100, remote_bytes=500_000_000, prefill_tokens_per_s=500, bytes_per_s=1e9)
    assert not fetch_is_shorter(costs)
    quick = SwitchCosts(positions=4000, remote_bytes=50_000_000, prefill_tokens_per_s=500, bytes_per_s=1e9)
    assert fetch_is_shorter(quick)
    unknown = SwitchCosts(positions=4000, remote_bytes=1, prefill_tokens_per_s=500, bytes_per_s=0)
    assert not fetch_is_shorter(unknown)
