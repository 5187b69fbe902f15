"""The binomial schedule: tick counts of λScale, and that everybody gets everything without doing two things at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercast_operator.binomial import best_blocks, binomial_schedule, predicted_s, ticks_needed


@pytest.mark.parametrize(("nodes", "ticks"), [(2, 16), (4, 17), (8, 18), (12, 19), (16, 19), (32, 20)])
def test_sixteen_blocks_take_as_many_ticks_as_the_paper_says(nodes: int, ticks: int) -> None:
    assert len(binomial_schedule(nodes, 16)) == ticks == ticks_needed(nodes, 16)


@pytest.mark.parametrize("blocks", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("depth", range(1, 6))
def test_powers_of_two_take_b_plus_log2_n_minus_one(depth: int, blocks: int) -> None:
    assert len(binomial_schedule(1 << depth, blocks)) == blocks + depth - 1


@given(st.integers(1, 40), st.integers(1, 40))
def test_every_schedule(nodes: int, blocks: int) -> None:
    ticks = binomial_schedule(nodes, blocks)
    assert len(ticks) == ticks_needed(nodes, blocks)
    owned = [set(range(blocks)), *(set[int]() for _ in range(nodes - 1))]
    for tick in ticks:
        # Full duplex: everybody sends at most one block and receives at most one.
        assert len({s.sender for s in tick}) == len({s.receiver for s in tick}) == len(tick)
        for send in tick:
            assert send.block in owned[send.sender], "sent before it was there"
            assert send.block not in owned[send.receiver], "sent for nothing"
        for send in tick:
            owned[send.receiver].add(send.block)
    assert all(has == set(range(blocks)) for has in owned)


@given(st.integers(2, 300), st.sampled_from([10**7, 10**9, 10**11]))
def test_no_other_number_of_blocks_is_better(nodes: int, nbytes: int) -> None:
    chosen = best_blocks(nodes, checkpoint_bytes=nbytes, bytes_per_s=1e9)

    def seconds(blocks: int) -> float:
        return predicted_s(nodes, blocks, checkpoint_bytes=nbytes, bytes_per_s=1e9)

    assert seconds(chosen) <= min(seconds(b) for b in (1, 2, 4, 8, 16, 32, 64, 128, 256)) * (1 + 1e-9)


def test_nobody_to_feed_takes_no_tick() -> None:
    assert binomial_schedule(1, 16) == () and ticks_needed(1, 16) == 0
