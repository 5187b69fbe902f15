"""Who feeds whom: serial chains from holders to targets, planned in one pass over plain values.

The plan follows BlitzScale (OSDI'25, section 5.1; digest 3.1 to 3.6): `sources` leaves out copies whose sending
direction carries KV, `chains` grows one chain from each of the rest, `flows` predicts them. A member forwards what
has arrived while the rest arrives, so a chain takes hardly longer than one hop.

Copies on disk and in host memory are second choice: they start a chain when no device copy may, or is as fast.
Every target also gets its alternatives, so that it survives the death of its upstream without asking: other
complete holders, then its own ancestors, nearest first. Ancestors only, because two targets that wait for each
other's chunks would wait for ever.

Chains that start together while nobody complete can serve send different parts first (`shifted`). Where agents can
follow a schedule in ticks (λScale's, `binomial`), it is chosen when it is predicted to end sooner.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import islice

from layercast_operator.binomial import best_blocks, ticks_needed
from layercast_operator.binomial import predicted_s as binomial_s
from layercast_operator.chains import grow_chains
from layercast_operator.flows import Member, predicted_s
from layercast_operator.shifted import IN_ORDER, Shift, covered_after
from layercast_operator.snapshot import PeerRef
from layercast_operator.sources import choose_sources, rank_of
from layercast_operator.star import grow_star
from layercast_operator.topology import (
    ASSUMED_DISK_BYTES_PER_S,
    ASSUMED_NIC_BYTES_PER_S,
    FORWARD_BYTES,
    INSIDE_NODE_BYTES_PER_S,
    Holder,
    HolderKind,
    Running,
    Target,
)

__all__ = [
    "ALTERNATIVES_MAX",
    "ASSUMED_DISK_BYTES_PER_S",
    "ASSUMED_NIC_BYTES_PER_S",
    "FORWARD_BYTES",
    "INSIDE_NODE_BYTES_PER_S",
    "Group",
    "Holder",
    "HolderKind",
    "Hop",
    "Method",
    "MulticastPlan",
    "Running",
    "Target",
    "plan_multicast",
]

# A target that has outlived so many upstreams is better served by a new plan.
ALTERNATIVES_MAX = 8


class Method(Enum):
    """How parameters travel from a source to its targets."""

    CHAIN = "chain"
    BINOMIAL = "binomial"
    STAR = "star"
    """Nobody forwards: the baseline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """How one target is fed. A `None` among upstreams is the target node's own disk."""

    target: str
    upstream: PeerRef | None
    alternatives: tuple[PeerRef | None, ...]
    bytes_per_s: float
    predicted_s: float
    live: bool
    live_reason: str
    why: str
    shard: int = 0
    """Which of `shards` equal parts comes from `upstream`; the others are gathered inside the logical node."""
    shards: int = 1
    shift: Shift = IN_ORDER
    """Which parts the chain sends first."""
    kind: HolderKind = HolderKind.DEVICE
    """Of the copy at the top of the chain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A source and the targets that follow a binomial schedule with it: nodes 0, 1, ... of the schedule."""

    source: str
    targets: tuple[str, ...]
    blocks: int
    predicted_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MulticastPlan:
    """A hop for every target that can be fed, in the order of planning; reasons for the rest."""

    hops: tuple[Hop, ...]
    unfed: tuple[str, ...]
    notes: tuple[str, ...]
    predicted_s: float = 0.0
    """Until every target has everything."""
    covered_s: float = 0.0
    """Until the targets together have everything."""
    method: Method = Method.CHAIN
    method_reason: str = ""
    groups: tuple[Group, ...] = ()
    """Schedules that replace the chains when the method is binomial."""


def plan_multicast(
    *,
    holders: Sequence[Holder],
    targets: Sequence[Target],
    running: Sequence[Running] = (),
    checkpoint_bytes: int,
    serving: bool,
    methods: Collection[Method] = (Method.CHAIN,),
    star: bool = False,
) -> MulticastPlan:
    """Chains for `targets`; the same values give the same plan, in whatever order they are listed.

    `serving` says whether a complete replica takes requests: only then is there anybody to share them with.
    `methods` are those that the agents can carry out. With `star` nobody forwards, which is there to compare.
    """
    wanted = {target.peer.peer_id: target for target in targets}
    sources = choose_sources(holders)
    others = [r for r in running if r.target.peer.peer_id not in wanted]
    if star:
        chains = grow_star(sources=sources, targets=targets, running=others)
    else:
        chains = grow_chains(sources=sources, holders=holders, targets=targets, running=others)
    shifts = {} if serving else _shifts(chains.planned)
    alternatives = _Alternatives(holders)
    hops = [
        _hop(member, alternatives, checkpoint_bytes, shifts.get(member.chain, IN_ORDER))
        for member in chains.planned
    ]
    forwarding = _forwarding(chains.members)
    hops = [
        _with_eligibility(hop, wanted[hop.target], member, forwarding, serving=serving)
        for hop, member in zip(hops, chains.planned, strict=True)
    ]
    plan = MulticastPlan(
        hops=tuple(hops),
        unfed=tuple(chains.unfed),
        notes=_busy_senders(chains.planned, holders),
        predicted_s=max((hop.predicted_s for hop in hops), default=0.0),
        covered_s=_covered_s(chains.planned, checkpoint_bytes, len(shifts)),
        method=Method.STAR if star else Method.CHAIN,
        method_reason="asked for" if star else "chains are what the agents can carry out",
    )
    if star or Method.BINOMIAL not in methods:
        return plan
    return _choose_method(plan, chains.planned, wanted, checkpoint_bytes)


def _busy_senders(planned: Sequence[Member], holders: Sequence[Holder]) -> tuple[str, ...]:
    """What must be said when a NIC that carries KV sends parameters too."""
    busy = {h.peer.peer_id: h.busy for h in holders if h.busy}
    by_node = {h.node: h.busy for h in holders if h.busy and h.nics == 1}
    senders = {m.up.peer.peer_id: m.up for m in planned if m.up is not None and m.outside}
    return tuple(
        f"{name} sends parameters although {why}: nobody else has them"
        for name, sender in sorted(senders.items())
        if (why := busy.get(name) or by_node.get(sender.node))
    )


def _shifts(planned: Sequence[Member]) -> dict[int, Shift]:
    """A shifted order for each chain that starts at a copy; those that run already keep theirs."""
    starts = sorted({m.chain for m in planned if m.chain >= 0})
    return {chain: Shift(index=i, of=len(starts)) for i, chain in enumerate(starts)}


def _covered_s(planned: Sequence[Member], checkpoint_bytes: int, chains: int) -> float:
    """When the heads of all chains have their first parts; one chain covers everything when its head has it."""
    heads = [m for m in planned if m.hops == 1]
    if not heads:
        return min((predicted_s(m, checkpoint_bytes) for m in planned), default=0.0)
    if chains < 2:
        return min(predicted_s(m, checkpoint_bytes) for m in heads)
    return max(predicted_s(m, checkpoint_bytes // chains) for m in heads)


def _hop(member: Member, alternatives: _Alternatives, checkpoint_bytes: int, shift: Shift) -> Hop:
    up = member.up
    assert up is not None  # planned members are fed by somebody
    from_own = not up.hops and up.rank == _RANK_OF_DISK and up.node == member.node
    upstream = None if from_own else up.peer
    seconds = predicted_s(member, checkpoint_bytes)
    where = "same node" if up.node == member.node else ("same leaf" if up.leaf == member.leaf else "")
    where = "NVLink" if up.logical == member.logical and up.node != member.node else where
    why = (
        "fed by its own disk" if from_own else f"fed by {up.peer.peer_id}" + (f" ({where})" if where else "")
    )
    if member.shards > 1:
        why += f", shard {member.shard + 1} of {member.shards}, the rest gathered inside"
    return Hop(
        target=member.peer.peer_id,
        upstream=upstream,
        alternatives=alternatives.of(member, upstream),
        bytes_per_s=member.rate,
        predicted_s=seconds,
        live=False,
        live_reason="",
        why=f"{why}, hop {member.hops}, about {seconds:.1f} s at {member.rate / 1e6:.0f} MB/s",
        shard=member.shard,
        shards=member.shards,
        shift=shift,
        kind=list(HolderKind)[member.rank],
    )


_RANK_OF_DISK = list(HolderKind).index(HolderKind.DISK)


class _Alternatives:
    """Complete device copies, then own ancestors from the nearest, then own disk, then other copies."""

    def __init__(self, holders: Sequence[Holder]) -> None:
        self._holders = holders
        self._complete = {h.peer.peer_id for h in holders}
        self._own = {h.node for h in holders if h.kind is HolderKind.DISK}
        # Neighbours rank alike, so each leaf is ranked once.
        self._ranked: dict[str, tuple[list[Holder], list[Holder]]] = {}

    def of(self, member: Member, upstream: PeerRef | None) -> tuple[PeerRef | None, ...]:
        half = ALTERNATIVES_MAX // 2
        devices, others = self._of_leaf(member.leaf)
        found: list[PeerRef | None] = [h.peer for h in devices[:half]]
        found += islice(self._ancestors(member), half)
        if member.node in self._own:
            found.append(None)
        mine = (HolderKind.DISK, member.node)
        found += islice((h.peer for h in others if (h.kind, h.node) != mine), ALTERNATIVES_MAX)
        return tuple(a for a in dict.fromkeys(found) if a != upstream)[:ALTERNATIVES_MAX]

    def _ancestors(self, member: Member) -> list[PeerRef]:
        """The nearest few, without copies: those are named anyway."""
        found: list[PeerRef] = []
        at = member.up
        while at is not None and len(found) < ALTERNATIVES_MAX:
            if at.peer.peer_id not in self._complete:
                found.append(at.peer)
            at = at.up
        return found

    def _of_leaf(self, leaf: str) -> tuple[list[Holder], list[Holder]]:
        def order(h: Holder) -> tuple[int, bool, bool, bool, float, str]:
            return (rank_of(h), bool(h.busy), h.leaving, h.leaf != leaf, -h.nic_bytes_per_s, h.peer.peer_id)

        if leaf not in self._ranked:
            ranked = sorted(self._holders, key=order)
            devices = [h for h in ranked if h.kind is HolderKind.DEVICE]
            self._ranked[leaf] = devices, [h for h in ranked if h.kind is not HolderKind.DEVICE]
        return self._ranked[leaf]


def _forwarding(members: Sequence[Member]) -> frozenset[str]:
    """Names of members and of nodes with one NIC that send parameters over it."""
    senders = [m.up for m in members if m.up is not None and m.outside]
    return frozenset({m.peer.peer_id for m in senders} | {f"node {m.node}" for m in senders if m.nics == 1})


def _with_eligibility(
    hop: Hop, target: Target, member: Member, forwarding: Collection[str], *, serving: bool
) -> Hop:
    """Whether a target may take requests while it is fed (BlitzScale, section 5.2, table of digest 3.5)."""
    if not serving:
        return replace(hop, live_reason="no complete replica serves")
    if target.receives_kv:
        reason = "parameters arrive, and KV would arrive in the same direction"
        return replace(hop, live_reason=reason)
    if target.sends_kv and (hop.target in forwarding or f"node {member.node}" in forwarding):
        reason = "it forwards parameters, and its KV leaves in the same direction"
        return replace(hop, live_reason=reason)
    return replace(hop, live=True, live_reason="shares the queue of a serving replica")


def _choose_method(
    plan: MulticastPlan, planned: Sequence[Member], wanted: dict[str, Target], checkpoint_bytes: int
) -> MulticastPlan:
    """The binomial schedule where it is predicted to end sooner than the chains."""
    hindrance, groups = _binomial_groups(planned, checkpoint_bytes)
    if hindrance:
        return replace(plan, method_reason=f"chains, because {hindrance}")
    seconds = max(group.predicted_s for group in groups)
    compared = f"binomial schedule {seconds:.2f} s, chains {plan.predicted_s:.2f} s"
    if seconds >= plan.predicted_s:
        return replace(plan, method_reason=f"chains are no slower: {compared}")
    times = {target: group.predicted_s for group in groups for target in group.targets}
    reason = "it forwards parameters in every tick, and its KV leaves in the same direction"
    hops = [replace(hop, predicted_s=times[hop.target]) for hop in plan.hops]
    hops = [
        replace(h, live=False, live_reason=reason) if h.live and wanted[h.target].sends_kv else h
        for h in hops
    ]
    return replace(
        plan,
        hops=tuple(hops),
        predicted_s=seconds,
        covered_s=_covered_by_schedule_s(groups, shifted=plan.hops[0].shift.of == len(groups)),
        method=Method.BINOMIAL,
        method_reason=f"the schedule ends sooner: {compared}",
        groups=groups,
    )


def _binomial_groups(planned: Sequence[Member], checkpoint_bytes: int) -> tuple[str, tuple[Group, ...]]:
    """One group a chain, paced by its slowest; or why a schedule does not fit."""
    by_chain: dict[int, list[Member]] = {}
    for member in planned:
        by_chain.setdefault(member.chain, []).append(member)
    if not planned:
        return "there is nobody to feed", ()
    if -1 in by_chain:
        return "chains run already", ()
    if any(not m.outside or m.shards > 1 for m in planned):
        return "some are fed inside their nodes", ()
    paced: list[tuple[list[Member], Member, float]] = []
    for members in by_chain.values():
        source = members[0].up
        assert source is not None  # a chain starts below a copy
        paced.append((members, source, min(source.rate, source.nic, *(m.nic for m in members))))
    # One cut for all, so that shifted orders of the groups complement each other.
    blocks = max(
        best_blocks(len(members) + 1, checkpoint_bytes=checkpoint_bytes, bytes_per_s=rate)
        for members, _, rate in paced
    )
    return "", tuple(
        Group(
            source=source.peer.peer_id,
            targets=tuple(m.peer.peer_id for m in members),
            blocks=blocks,
            predicted_s=binomial_s(
                len(members) + 1, blocks, checkpoint_bytes=checkpoint_bytes, bytes_per_s=rate
            ),
        )
        for members, source, rate in paced
    )


def _covered_by_schedule_s(groups: Sequence[Group], *, shifted: bool) -> float:
    """A group has one block more after every tick; shifted groups complement each other."""

    def after(group: Group, of: int) -> float:
        ticks = ticks_needed(len(group.targets) + 1, group.blocks)
        return group.predicted_s * covered_after(group.blocks, of) / ticks

    return max(after(g, len(groups)) for g in groups) if shifted else min(after(g, 1) for g in groups)
