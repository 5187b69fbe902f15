"""Which copies a multicast may read from over the network: those whose NICs do not carry KV.

BlitzScale (OSDI'25, sections 4 and 5.1): KV leaves prefill replicas in the sending direction, so parameters that
leave the same NIC would slow serving. What counts is the NIC, not the copy: a host copy beside a prefill replica is
no better than the replica itself, and a target there may be fed but not forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layercast_operator.topology import Holder, HolderKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Copies that may start chains, the best kinds first, and the nodes that should not send."""

    roots: tuple[Holder, ...]
    closed: Mapping[str, str]
    """Why a node should not send parameters."""


def choose_sources(holders: Sequence[Holder]) -> Sources:
    """Copies of every kind with a free sending direction; a single busy one when there are no others."""
    closed = {h.node: h.busy for h in sorted(holders, key=_order) if h.busy and h.nics == 1}
    busy = {h.peer.peer_id for h in holders if h.busy}
    roots: list[Holder] = []
    for kind in HolderKind:
        free = [h for h in holders if h.kind is kind and h.peer.peer_id not in busy and h.node not in closed]
        staying = [h for h in free if not h.leaving]
        roots += sorted(staying or free, key=_order)
    if not roots and holders:
        # One is enough: each further one would disturb more serving and make nothing possible.
        roots = [min(holders, key=lambda h: (h.leaving, rank_of(h), *_order(h)))]
        closed = {node: why for node, why in closed.items() if node != roots[0].node}
    return Sources(roots=tuple(roots), closed=closed)


def rank_of(holder: Holder) -> int:
    """Preference of the kind of copy, the best is 0."""
    return _RANKS[holder.kind]


_RANKS = {kind: rank for rank, kind in enumerate(HolderKind)}


def _order(holder: Holder) -> tuple[float, str]:
    return (-min(holder.nic_bytes_per_s, holder.read_bytes_per_s), holder.peer.peer_id)
