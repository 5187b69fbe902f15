"""Shifted orders: each chain sends everything once, and together they have everything after b/k blocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercast_operator.binomial import binomial_schedule
from layercast_operator.shifted import IN_ORDER, Shift, covered_after, shifted_order


@pytest.mark.parametrize(("chains", "blocks"), [(1, 16), (2, 8), (4, 4)])
def test_sixteen_blocks_are_covered_as_the_paper_says(chains: int, blocks: int) -> None:
    assert covered_after(16, chains) == blocks


@given(st.integers(0, 60), st.integers(1, 8))
def test_chains_cover_everything_together(blocks: int, chains: int) -> None:
    orders = [shifted_order(blocks, Shift(index=i, of=chains)) for i in range(chains)]
    assert all(sorted(order) == list(range(blocks)) for order in orders)
    enough = covered_after(blocks, chains)
    assert {block for order in orders for block in order[:enough]} == set(range(blocks))


def test_one_chain_keeps_the_order() -> None:
    assert shifted_order(5, IN_ORDER) == (0, 1, 2, 3, 4)
    assert shifted_order(5, Shift(index=1, of=2)) == (1, 3, 0, 2, 4)


@pytest.mark.parametrize("chains", [1, 2, 4])
def test_binomial_groups_in_shifted_order_are_covered_after_b_over_k_ticks(chains: int) -> None:
    blocks, nodes = 16, 4
    seen: set[int] = set()
    for index in range(chains):
        order = shifted_order(blocks, Shift(index=index, of=chains))
        for tick in binomial_schedule(nodes, blocks)[: blocks // chains]:
            seen |= {order[send.block] for send in tick}
    assert seen == set(range(blocks))
