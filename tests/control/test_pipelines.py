"""Who loads what first when nobody is complete: every part once, the largest as small as can be."""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from layercast_operator.pipelines import covered_bytes, orders, split

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
