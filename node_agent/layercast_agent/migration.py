"""How a running request moves to another replica: in rounds, while it goes on here, and with a short last pause.

ServerlessLLM (OSDI'24, live migration; digest A7): what is known so far is brought over while the source keeps
generating; meanwhile a little more becomes known, and that is brought over in the next round, which is shorter. When
the rest is small the source stops and the target computes it with the next token. Prefill/decode disaggregation is the
same move, begun with the first chunk of the prompt.

A round brings KV, or only tokens of which the target computes the KV, whichever is estimated to be shorter. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

LAST_TOKENS_MAX = 16
"""With so few positions missing the source stops: the target computes them in one step, like a token more or two."""

ROUNDS_MAX = 6
"""With a tenth left in each round a million tokens need five; more would chase a source that is faster."""


class Step(Enum):
    """What happens next to a request that moves."""

    ROUND = "round"
    WAIT = "wait"
    LAST = "last"


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """How far a move is. Positions whose KV is complete here, and at the target; rounds so far, with their size."""

    computed: int
    held: int
    prefilling: bool
    rounds: int = 0
    last_round: int = 0


def next_step(moved: Moved, *, last_tokens_max: int = LAST_TOKENS_MAX) -> Step:
    """A round while that makes the last pause shorter; the end otherwise."""
    gap = moved.computed - moved.held
    if moved.prefilling:
        return Step.ROUND if gap > 0 else Step.WAIT
    chases = moved.rounds > 0 and gap >= moved.last_round
    if gap <= last_tokens_max or moved.rounds >= ROUNDS_MAX or chases:
        return Step.LAST
    return Step.ROUND


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundCosts:
    """What is known of both ways to do a round; rates of 0 are unknown."""

    positions: int
    row_bytes: int
    """KV of one position in all layers."""
    bytes_per_s: float
    prefill_tokens_per_s: float


def by_tokens(costs: RoundCosts) -> bool:
    """Whether the target rather computes a round's KV than reads it. Reading needs no device: it wins when unknown."""
    if costs.bytes_per_s <= 0 or costs.prefill_tokens_per_s <= 0:
        return False
    return (
        costs.positions / costs.prefill_tokens_per_s < costs.positions * costs.row_bytes / costs.bytes_per_s
    )


def pause_s(moved: Moved, *, prefill_tokens_per_s: float) -> float:
    """The last pause, estimated: what the target computes before the next token. 0 when its rate is unknown."""
    if prefill_tokens_per_s <= 0:
        return 0.0
    return (moved.computed - moved.held + 1) / prefill_tokens_per_s


def share_out(requests: Sequence[str], destinations: Sequence[str]) -> dict[str, str]:
    """Who goes where: evenly, in the order given."""
    if not destinations:
        return {}
    return {request: destinations[index % len(destinations)] for index, request in enumerate(requests)}
