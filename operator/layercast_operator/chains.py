"""Grows the chains of a multicast: one group of targets after the other, each where it is fed best.

BlitzScale (OSDI'25, section 5.1; digest 3.3): targets that NVLink joins are one logical node; groups are taken in
descending bandwidth, so that the fast are useful first and delay nobody; each is appended to a chain of its own leaf
if one is fast enough, else to the shortest of the fast. A group that has a copy inside, or on its own disk, takes
that if no chain is faster. When every NIC sends already, or a group may not forward, the best flow is split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from layercast_operator.exits import RATE_TOLERANCE, Exit, Exits
from layercast_operator.flows import Member, copy_member, settle, target_member
from layercast_operator.sources import Sources, rank_of
from layercast_operator.topology import Holder, HolderKind, Running, Target

_DISK = list(HolderKind).index(HolderKind.DISK)


@dataclass(slots=True)
class Chains:
    """Chains under construction."""

    closed: Mapping[str, str]
    """Nodes that should not send, and why."""
    below: Mapping[str, frozenset[str]]
    """Who is fed by whom already: nobody is fed by those who wait for it."""
    exits: Exits
    copies: list[Member] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)
    """Everybody who is fed, upstreams first."""
    planned: list[Member] = field(default_factory=list)
    unfed: list[str] = field(default_factory=list)
    readers: Counter[int] = field(default_factory=Counter)
    inside: dict[str, list[Member]] = field(default_factory=dict)
    """By logical node or node: complete copies in memory, and the newest member."""
    disks: dict[str, Member] = field(default_factory=dict)
    disk_exits: dict[str, Exit] = field(default_factory=dict)
    beside: dict[str, list[Target]] = field(default_factory=dict)
    """Groups that wait for their turn, by the node that they are all on."""
    placed: set[str] = field(default_factory=set)
    started: int = 0


def grow_chains(
    *, sources: Sources, holders: Sequence[Holder], targets: Sequence[Target], running: Sequence[Running]
) -> Chains:
    """Chains for `targets` from the roots of `sources`, below those that are `running`."""
    chains = Chains(closed=sources.closed, below=_descendants(running), exits=Exits(closed=sources.closed))
    _add_running(chains, _add_copies(chains, sources, holders), running)
    groups = _groups(targets, chains.below)
    chains.beside = {
        g[0].node: g
        for g in groups
        if g[0].peer.peer_id not in chains.below and len({t.node for t in g}) == 1
    }
    waiting: list[list[Target]] = []
    for group in groups:
        chains.beside.pop(group[0].node, None)
        if group[0].peer.peer_id in chains.placed:
            continue
        if not _may_forward(chains, group):
            waiting.append(group)  # fed last: a chain ends with them
        else:
            _place(chains, group)
    # Those that can do with their own disk come last: they see what the others left of the network.
    for group in sorted(waiting, key=lambda g: _own_disk(chains, g)[0] is not None):
        _place(chains, group)
    settle(chains.members)
    return chains


def _add_copies(chains: Chains, sources: Sources, holders: Sequence[Holder]) -> dict[str, Member]:
    """Open an exit at every root; remember what each node can read without a NIC."""
    together: dict[tuple[str, int], list[Member]] = {}
    by_id: dict[str, Member] = {}
    roots = {(h.peer.peer_id, h.kind) for h in sources.roots}
    # Roots in their order; then those that only their own logical node may read.
    others = sorted(holders, key=lambda h: (rank_of(h), h.peer.peer_id))
    for holder in [*sources.roots, *(h for h in others if (h.peer.peer_id, h.kind) not in roots)]:
        is_root = (holder.peer.peer_id, holder.kind) in roots
        copy = copy_member(holder, rank_of(holder))
        if is_root:
            together.setdefault((copy.logical, copy.rank), []).append(copy)
            chains.copies.append(copy)
        by_id.setdefault(copy.peer.peer_id, copy)
        if is_root or not holder.leaving:
            if holder.kind is HolderKind.DISK:
                chains.disks.setdefault(copy.node, copy)
            else:
                chains.inside.setdefault(copy.logical, []).append(copy)
    for members in together.values():
        found = chains.exits.add(members)
        if found is not None and members[0].rank == _DISK:
            chains.disk_exits[members[0].node] = found
    return by_id


def _add_running(chains: Chains, by_id: Mapping[str, Member], running: Sequence[Running]) -> None:
    """Those that are being fed, each below its upstream; tails are exits."""
    children: dict[str, list[Running]] = {}
    known = {r.target.peer.peer_id for r in running} | set(by_id)
    for entry in sorted(running, key=lambda r: r.target.peer.peer_id):
        children.setdefault(entry.upstream if entry.upstream in known else "", []).append(entry)
    front: list[Member] = [copy for name, copy in by_id.items() if name in children]
    for orphan in children.get("", []):
        own = chains.disks.get(orphan.target.node)
        rate = own.rate if own is not None else orphan.target.nic_bytes_per_s
        front.append(target_member(orphan.target, None, rate))
    # Everybody has one upstream, so what is reached from a root is a tree and this ends.
    for member in front:
        if member.hops:
            chains.members.append(member)
        for child in children.get(member.peer.peer_id, []):
            front.append(_fed(chains, child.target, member))
    settle(chains.members)
    for member in chains.members:
        if member.peer.peer_id not in children:
            chains.exits.add([member])
        chains.inside.setdefault(member.logical, []).append(member)


def _fed(chains: Chains, target: Target, up: Member) -> Member:
    """A member below `up`, with the flow that feeds it counted."""
    member = target_member(target, up, up.rate)
    if member.outside:
        chains.exits.sending[up.node] += 1
    if not up.hops:
        chains.readers[id(up)] += 1
    return member


def _descendants(running: Sequence[Running]) -> Mapping[str, frozenset[str]]:
    """For each upstream, everybody who is fed by it, directly or not."""
    children: dict[str, set[str]] = {}
    for entry in running:
        children.setdefault(entry.upstream, set()).add(entry.target.peer.peer_id)
    closed: dict[str, frozenset[str]] = {}
    for upstream in children:
        seen: set[str] = set()
        front = {upstream}
        while front:
            front = {child for peer in front for child in children.get(peer, ())} - seen
            seen |= front
        closed[upstream] = frozenset(seen)
    return closed


def _groups(targets: Sequence[Target], below: Mapping[str, frozenset[str]]) -> list[list[Target]]:
    """Targets of one logical node together, in descending order of the bandwidth that they can use.

    A target that feeds somebody already is alone: it may not be fed by those, its neighbours may.
    """
    groups: dict[tuple[str, str], list[Target]] = {}
    for target in sorted(targets, key=lambda t: (t.node, t.peer.peer_id)):
        alone = target.peer.peer_id if target.peer.peer_id in below else ""
        groups.setdefault((target.logical, alone), []).append(target)

    def order(group: list[Target]) -> tuple[float, str, str, str]:
        first = group[0]
        return (-_bandwidth(group), first.leaf, first.logical, first.peer.peer_id)

    return sorted(groups.values(), key=order)


def _bandwidth(group: Sequence[Target]) -> float:
    """What a group can receive: one NIC a target, as far as its nodes have so many."""
    nics = sum({t.node: t.nics for t in group}.values())
    return min(t.nic_bytes_per_s for t in group) * min(len(group), nics)


def _place(chains: Chains, group: list[Target]) -> None:
    """Feed a group: from inside, from its own disk, or by a chain, whichever brings most."""
    first = group[0]
    waits = chains.below.get(first.peer.peer_id, frozenset())
    found = None if waits else _exit_for(chains, group)
    fork = _fork(chains, first, waits) if found is None else None
    chained = 0.0
    if found is not None:
        chained = min(found.rate, _bandwidth(group))
    elif fork is not None:
        chained = fork[0]
    own, own_rate = _own_disk(chains, group)
    inside, inside_rate = _inside(chains, first, waits)
    if inside is not None and inside_rate >= RATE_TOLERANCE * max(chained, own_rate):
        entered = [_enter(chains, first, inside, inside_rate)]
    elif own is not None and (own_rate > chained or _is_exit_of(chains, own, found)):
        group, entered = _read_own(chains, group, own, own_rate)
    elif found is not None:
        entered = _enter_shards(chains, group, found)
    elif fork is not None:
        entered = [_enter(chains, first, fork[1], fork[0])]
    else:
        chains.unfed += [t.peer.peer_id for t in group]
        return
    _spread(chains, group, entered)


def _exit_for(chains: Chains, group: list[Target]) -> Exit | None:
    """The best exit. Targets beside a disk read it first: the chain then goes on from them over the same NIC."""
    while _may_forward(chains, group):
        found = chains.exits.best(group[0].leaf, _bandwidth(group))
        if found is None:
            return None
        disk = found.members[0]
        beside = chains.beside.pop(disk.node, None) if _is_exit_of(chains, disk, found) else None
        if beside is None or beside is group:
            return found
        _spread(chains, *_read_own(chains, beside, disk, disk.rate))
    return None


def _read_own(
    chains: Chains, group: list[Target], disk: Member, rate: float
) -> tuple[list[Target], list[Member]]:
    """Feed a group from the disk under one of it."""
    group = sorted(group, key=lambda t: t.node != disk.node)
    if disk.node in chains.disk_exits:
        chains.disk_exits[disk.node].open = False  # what it sends goes on from the device
    return group, [_enter(chains, group[0], disk, rate)]


def _is_exit_of(chains: Chains, disk: Member, found: Exit | None) -> bool:
    return found is not None and chains.disk_exits.get(disk.node) is found


def _enter(chains: Chains, target: Target, up: Member, rate: float) -> Member:
    member = _fed(chains, target, up)
    member.rate = rate
    if not up.hops:
        member.chain = chains.started
        chains.started += 1
    _add(chains, member)
    return member


def _add(chains: Chains, member: Member) -> None:
    chains.members.append(member)
    chains.planned.append(member)
    chains.placed.add(member.peer.peer_id)


def _enter_shards(chains: Chains, group: list[Target], found: Exit) -> list[Member]:
    """Join a chain over as many NICs as both sides have and need, where NVLink is faster than a NIC."""
    lanes = chains.exits.free_lanes(found.members)
    head, first = found.members[0], group[0]
    entries = _one_a_nic(group)
    count = min(len(lanes), len(entries)) if first.nvlink_bytes_per_s > first.nic_bytes_per_s else 1
    lane = min(head.nic, first.nic_bytes_per_s)
    while count > 1 and (count - 1) * lane >= found.supply:
        count -= 1
    lanes = lanes[:count]
    rate = min(found.supply, count * lane)
    chain = chains.started if not head.hops else head.chain
    chains.started += 0 if head.hops else 1
    entered: list[Member] = []
    for shard, (target, up) in enumerate(zip(entries, lanes, strict=False)):
        member = target_member(target, up, rate)
        member.shard, member.shards, member.chain = shard, count, chain
        chains.readers[id(up)] += 0 if up.hops else 1
        _add(chains, member)
        entered.append(member)
    chains.exits.use(found, lanes)
    return entered


def _one_a_nic(group: Sequence[Target]) -> list[Target]:
    taken: Counter[str] = Counter()
    entries: list[Target] = []
    for target in group:
        if taken[target.node] < target.nics:
            taken[target.node] += 1
            entries.append(target)
    return entries


def _spread(chains: Chains, group: list[Target], entered: list[Member]) -> None:
    """Feed the rest of a group inside it, and let the chain go on from it."""
    done = {member.peer.peer_id for member in entered}
    members = list(entered)
    for number, target in enumerate(t for t in group if t.peer.peer_id not in done):
        up = members[-1] if len(entered) == 1 else entered[number % len(entered)]
        members.append(_enter(chains, target, up, min(up.rate, target.nvlink_bytes_per_s)))
    chains.inside.setdefault(members[-1].logical, []).append(members[-1])
    # The newest goes on, unless NVLink made it slower than the first.
    ends = [m for m in reversed(members) if m.rate >= entered[0].rate]
    chains.exits.add(ends if len(entered) == 1 else members)


def _may_forward(chains: Chains, group: Sequence[Target]) -> bool:
    """Whether a NIC of the group may send and does not yet."""
    return any(chains.exits.has_lane(target.node, target.nics) for target in group)


def _own_disk(chains: Chains, group: Sequence[Target]) -> tuple[Member | None, float]:
    """The fastest disk under a group with what it would give; a disk that feeds others is not slowed down."""
    best: tuple[Member | None, float] = (None, 0.0)
    for target in group:
        disk = chains.disks.get(target.node)
        if disk is None:
            continue
        rate = disk.rate / (chains.readers[id(disk)] + 1)
        if rate > best[1] and (not chains.readers[id(disk)] or rate >= disk.nic):
            best = (disk, rate)
    return best


def _inside(chains: Chains, target: Target, waits: Collection[str]) -> tuple[Member | None, float]:
    """A copy in memory of the same logical node, or a member there."""
    names = dict.fromkeys((target.logical, target.node))
    found = [m for name in names for m in chains.inside.get(name, []) if not _waits_for(m, target, waits)]

    def rate_of(member: Member) -> float:
        rate = member.rate if member.hops else member.rate / (chains.readers[id(member)] + 1)
        return min(rate, member.nvlink, target.nvlink_bytes_per_s)

    best = max(found, key=lambda m: (rate_of(m), -m.hops), default=None)
    return best, rate_of(best) if best is not None else 0.0


def _fork(chains: Chains, target: Target, waits: Collection[str]) -> tuple[float, Member] | None:
    """The member, or copy, whose flow is best split for `target`; those that should not send come last."""
    options = []
    for member in [*chains.copies, *chains.members]:
        if _waits_for(member, target, waits):
            continue
        flows = chains.exits.sending[member.node] + 1
        rate = member.rate if member.hops else member.rate / (chains.readers[id(member)] + 1)
        rate = min(rate, member.nic, member.nic * member.nics / flows, target.nic_bytes_per_s)
        shut = member.node in chains.closed
        far = member.leaf != target.leaf
        slow = bool(member.hops) and member.nic < target.nic_bytes_per_s
        key = (shut, -rate, slow, member.rank, flows, far, member.hops, member.peer.peer_id)
        options.append((key, rate, member))
    best = min(options, key=lambda option: option[0], default=None)
    return None if best is None else (best[1], best[2])


def _waits_for(member: Member, target: Target, waits: Collection[str]) -> bool:
    """Whether what `member` gets comes through `target` or those below it."""
    at: Member | None = member if waits else None
    while at is not None:
        if at.peer.peer_id in waits or at.peer.peer_id == target.peer.peer_id:
            return True
        at = at.up
    return False
