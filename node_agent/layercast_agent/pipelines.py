"""Which replicas run which layers of a request while none of them is complete.

An execution pipeline (λScale, arXiv 2502.09922, section 4.3 and algorithm 2; digest B5) is an ordered list of stages
that together cover all layers. Each stage is a replica that still loads; the one that owns the request, the leader,
has the embedding and the head besides. Every hop between stages costs an activation's way over the network, so the
fewest stages win: from each layer on, the replica that can go farthest takes it (greedy interval covering, which is
optimal). λScale instead fixes the lengths of pipelines up front and searches nodes that fit them; here whoever holds
a layer may serve it in any number of pipelines, so there is nothing to search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One replica's range: layers [first, last)."""

    peer_id: str
    first: int
    last: int


def plan_pipeline(resident: Mapping[str, Set[int]], *, layers: int, leader: str) -> tuple[Stage, ...] | None:
    """The pipeline with the fewest stages, or None when some layer is nowhere.

    `resident` has the executable layers of each replica. Among those that reach equally far the leader is taken (no
    way over the network), then the one that serves fewest layers so far, then the first by name.
    """
    stages: list[Stage] = []
    served = dict.fromkeys(resident, 0)
    at = 0
    while at < layers:
        reach = {peer: _reach(held, at, layers) for peer, held in resident.items() if at in held}
        if not reach:
            return None
        farthest = max(reach.values())
        able = [peer for peer, end in reach.items() if end == farthest]
        chosen = min(able, key=lambda peer: (peer != leader, served[peer], peer))
        stages.append(Stage(peer_id=chosen, first=at, last=farthest))
        served[chosen] += farthest - at
        at = farthest
    return tuple(stages)


def missing(resident: Mapping[str, Set[int]], *, layers: int) -> Sequence[int]:
    """Layers that nobody can execute yet."""
    return [layer for layer in range(layers) if all(layer not in held for held in resident.values())]


def _reach(held: Set[int], at: int, layers: int) -> int:
    """The first layer from `at` on that is not held."""
    while at < layers and at in held:
        at += 1
    return at


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchCosts:
    """What is known when a leader has become complete and a request's KV lies in several places."""

    positions: int
    """Tokens whose KV the request has."""
    remote_bytes: int
    """Bytes of that KV that lie at other replicas."""
    prefill_tokens_per_s: float
    """How fast this replica computes a prefix; 0 is unknown."""
    bytes_per_s: float
    """How fast those bytes come here; 0 is unknown."""


def fetch_s(costs: SwitchCosts) -> float:
    """Seconds until the missing KV is here; 0 when that is unknown."""
    return costs.remote_bytes / costs.bytes_per_s if costs.bytes_per_s > 0 else 0.0


def fetch_is_shorter(costs: SwitchCosts) -> bool:
    """Mode switch: whether to read the missing KV rather than to compute the prefix again.

    Both are estimates of the pause of that request; what is not known yet speaks for recomputation, which needs
    nobody else.
    """
    if costs.bytes_per_s <= 0:
        return False
    if costs.prefill_tokens_per_s <= 0:
        return True
    return fetch_s(costs) < costs.positions / costs.prefill_tokens_per_s
