"""k-way shifted order: k chains send different parts first, so that together they soon have everything.

λScale (arXiv 2502.09922, k-way transmission; digest B4): stripe j of k is the blocks j, j+k, j+2k, ...; chain i
sends stripes i, i+1, ..., i+k-1 (mod k). After b/k blocks the chains cover the checkpoint together, and a pipeline of
partial replicas could execute before any of them is complete. It costs nobody anything: each still gets b blocks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """Which of `of` shifted orders a chain uses."""

    index: int = 0
    of: int = 1


IN_ORDER = Shift()


def shifted_order(blocks: int, shift: Shift) -> tuple[int, ...]:
    """All of `blocks` in the order of one chain; in their own order when there is one chain only."""
    turns = range(shift.index, shift.index + shift.of)
    return tuple(block for turn in turns for block in range(turn % shift.of, blocks, shift.of))


def covered_after(blocks: int, of: int) -> int:
    """Blocks that each of `of` chains must have received until they cover all of them together."""
    return -(-blocks // of)
