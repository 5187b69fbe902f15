"""Who feeds whom: serial chains from holders to targets, planned in one pass over plain values.

The plan follows BlitzScale (OSDI'25, section 5.1; digest 3.1 to 3.6): sources whose sending direction carries KV
are left out; targets are taken in descending bandwidth, those of one node (one NVLink domain) together; one chain
grows from each source, on the same leaf first. A member forwards what has arrived while the rest arrives, so a
chain of n members takes |M|/B + (n-1) c/B for B the slowest hop and c the unit of forwarding, hardly longer than
one of a single member.

Copies on disk and in host memory are second choice: they start a chain when no device copy may, or when reading
the target's own disk is faster than the chain. Every target also gets its alternatives, so that it survives the
death of its upstream without asking: other complete holders, then its own ancestors, nearest first. Ancestors
only, because two targets that wait for each other's chunks would wait for ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from layercast_operator.snapshot import PeerRef

# Where a node does not tell: one 10 Gbit/s NIC, one SATA disk, one memory channel shared by two processes.
ASSUMED_NIC_BYTES_PER_S = 1.25e9
ASSUMED_DISK_BYTES_PER_S = 0.5e9
INSIDE_NODE_BYTES_PER_S = 10e9
# What a member must have before it can pass something on (chunk size of packed checkpoints).
FORWARD_BYTES = 4 * 1024 * 1024
# A target that has outlived so many upstreams is better served by a new plan.
ALTERNATIVES_MAX = 8


class HolderKind(Enum):
    """Where a complete copy is; the order is the order of preference."""

    DEVICE = "device"
    HOST = "host memory"
    DISK = "disk"


_KINDS = tuple(HolderKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A complete copy that can be read."""

    peer: PeerRef
    node: str
    leaf: str
    kind: HolderKind
    nic_bytes_per_s: float
    read_bytes_per_s: float
    """How fast the copy itself can be read."""
    busy: str = ""
    """Why its sending direction should not carry parameters; empty when it may."""
    leaving: bool = False
    """It is being drained: usable, and soon gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A replica that wants parameters."""

    peer: PeerRef
    node: str
    leaf: str
    nic_bytes_per_s: float
    sends_kv: bool = False
    """It sends KV to other replicas as soon as it executes (prefill role)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A target that is being fed; new ones may be appended below it."""

    target: Target
    upstream: str


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


@dataclass(frozen=True, slots=True, kw_only=True)
class MulticastPlan:
    """A hop for every target that can be fed, in the order of planning; reasons for the rest."""

    hops: tuple[Hop, ...]
    unfed: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    """A link of a chain: the root copy, or a target below it."""

    peer: PeerRef
    node: str
    leaf: str
    nic_bytes_per_s: float
    rate: float
    """What arrives here: the least of all hops above."""


@dataclass(slots=True)
class _Chains:
    """Chains under construction; each is a path from its root to its tail."""

    paths: list[list[_Member]]
    sending: dict[str, int] = field(default_factory=dict)
    """Flows that leave each node over its NIC."""

    def append(self, path: list[_Member], member: _Member) -> list[_Member]:
        """Grow a chain; returns its path up to the new tail."""
        tail = path[-1]
        if tail.node != member.node:
            self.sending[tail.node] = self.sending.get(tail.node, 0) + 1
        path.append(member)
        return path


def plan_multicast(
    *,
    holders: Sequence[Holder],
    targets: Sequence[Target],
    running: Sequence[Running] = (),
    checkpoint_bytes: int,
    serving: bool,
) -> MulticastPlan:
    """Chains for `targets`; the same values give the same plan.

    `serving` says whether a complete replica takes requests: only then is there anybody to share them with.
    """
    notes: list[str] = []
    roots = _roots(holders, notes)
    local = {h.node: h for h in holders if h.kind is HolderKind.DISK}
    wanted = {target.peer.peer_id for target in targets}
    fed = [r for r in running if r.target.peer.peer_id not in wanted]
    chains = _running_chains(roots, local, fed)
    below = _descendants(fed)
    hops: list[Hop] = []
    unfed: list[str] = []
    for target in _in_order(targets):
        path = _place(chains, target, local.get(target.node), below)
        if path is None:
            unfed.append(target.peer.peer_id)
            continue
        hops.append(_hop(path, target, holders, checkpoint_bytes, serving=serving))
    return MulticastPlan(hops=_only_tails_live(hops, targets), unfed=tuple(unfed), notes=tuple(notes))


def _roots(holders: Sequence[Holder], notes: list[str]) -> list[Holder]:
    """Holders of the best kind whose sending direction is free, or the busy ones when there are no others."""
    for kind in _KINDS:
        free = [h for h in holders if h.kind is kind and not h.busy]
        staying = [h for h in free if not h.leaving] or free
        if staying:
            return sorted(staying, key=lambda h: (-h.nic_bytes_per_s, h.peer.peer_id))
    busy = sorted(holders, key=lambda h: (-h.nic_bytes_per_s, h.peer.peer_id))
    notes.extend(f"{h.peer.peer_id} sends parameters although {h.busy}: nobody else has them" for h in busy)
    return busy


def _in_order(targets: Sequence[Target]) -> list[Target]:
    """Descending bandwidth, the targets of one node together: the fast are useful first and delay nobody."""
    return sorted(targets, key=lambda t: (-t.nic_bytes_per_s, t.leaf, t.node, t.peer.peer_id))


def _running_chains(
    roots: Sequence[Holder], local: Mapping[str, Holder], running: Sequence[Running]
) -> _Chains:
    """Chains as they are: one path from each root or unknown upstream to each tail."""
    chains = _Chains(paths=[])
    children: dict[str, list[Running]] = {}
    known = {r.target.peer.peer_id for r in running} | {h.peer.peer_id for h in roots}
    for entry in sorted(running, key=lambda r: r.target.peer.peer_id):
        children.setdefault(entry.upstream if entry.upstream in known else "", []).append(entry)

    grown: list[list[_Member]] = [[_root_member(root)] for root in roots]
    for orphan in children.get("", []):
        own = local.get(orphan.target.node)
        rate = own.read_bytes_per_s if own is not None else orphan.target.nic_bytes_per_s
        grown.append([_member(orphan.target, rate)])
    # Everybody has one upstream, so what is reached from a root is a tree and this ends.
    while grown:
        path = grown.pop(0)
        tail = path[-1]
        fed_here = children.get(tail.peer.peer_id, [])
        if not fed_here:
            chains.paths.append(path)
        for child in fed_here:
            if tail.node != child.target.node:
                chains.sending[tail.node] = chains.sending.get(tail.node, 0) + 1
            grown.append([*path, _member(child.target, _link_rate(tail, child.target, 1))])
    return chains


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


def _root_member(holder: Holder) -> _Member:
    return _Member(
        peer=holder.peer,
        node=holder.node,
        leaf=holder.leaf,
        nic_bytes_per_s=holder.nic_bytes_per_s,
        rate=holder.read_bytes_per_s,
    )


def _member(target: Target, rate: float) -> _Member:
    return _Member(
        peer=target.peer,
        node=target.node,
        leaf=target.leaf,
        nic_bytes_per_s=target.nic_bytes_per_s,
        rate=rate,
    )


def _link_rate(tail: _Member, target: Target, flows: int) -> float:
    """Bytes per second that reach `target` below `tail` when `flows` leave its node."""
    if tail.node == target.node:
        return min(tail.rate, INSIDE_NODE_BYTES_PER_S)
    return min(tail.rate, tail.nic_bytes_per_s / flows, target.nic_bytes_per_s)


def _place(
    chains: _Chains,
    target: Target,
    own: Holder | None,
    below: Mapping[str, frozenset[str]],
) -> list[_Member] | None:
    """The chain that `target` joins, ending in it; None when nobody can feed it."""
    mine = below.get(target.peer.peer_id, frozenset())
    open_paths = chains.paths
    if mine:  # its own descendants cannot feed it
        open_paths = [path for path in chains.paths if not any(m.peer.peer_id in mine for m in path)]

    def order(path: list[_Member]) -> tuple[bool, int, bool, float, int, str]:
        tail = path[-1]
        outside = tail.node != target.node
        flows = chains.sending.get(tail.node, 0) if outside else 0
        rate = _link_rate(tail, target, flows + 1)
        return (outside, flows, tail.leaf != target.leaf, -rate, len(path), tail.peer.peer_id)

    best = min(open_paths, key=order, default=None)
    rate = 0.0
    if best is not None:
        rate = _link_rate(best[-1], target, chains.sending.get(best[-1].node, 0) + 1)
    if own is not None and best is not None and _is_own(best, own):
        return list(chains.append(best, _member(target, own.read_bytes_per_s)))
    if own is not None and (best is None or own.read_bytes_per_s > rate):
        path = [_root_member(own), _member(target, own.read_bytes_per_s)]
        chains.paths.append(path)
        return list(path)
    if best is None:
        return None
    return list(chains.append(best, _member(target, rate)))


def _is_own(path: list[_Member], own: Holder) -> bool:
    return len(path) == 1 and path[0].peer.peer_id == own.peer.peer_id


def _hop(
    path: list[_Member],
    target: Target,
    holders: Sequence[Holder],
    checkpoint_bytes: int,
    *,
    serving: bool,
) -> Hop:
    parent, rate = path[-2], max(path[-1].rate, 1.0)
    from_own = any(_own_copy(h, target) and h.peer == parent.peer for h in holders)
    upstream = None if from_own else parent.peer
    alternatives = _alternatives(path, target, holders)
    hops = len(path) - 1
    predicted_s = checkpoint_bytes / rate + (hops - 1) * FORWARD_BYTES / rate
    place = "its own disk" if from_own else parent.peer.peer_id
    where = "same node" if parent.node == target.node else ("same leaf" if parent.leaf == target.leaf else "")
    why = f"fed by {place}" + (f" ({where})" if where and not from_own else "")
    return Hop(
        target=target.peer.peer_id,
        upstream=upstream,
        alternatives=tuple(a for a in alternatives if a != upstream)[:ALTERNATIVES_MAX],
        bytes_per_s=rate,
        predicted_s=predicted_s,
        live=serving,
        live_reason="shares the queue of a serving replica" if serving else "no complete replica serves",
        why=f"{why}, hop {hops}, about {predicted_s:.1f} s at {rate / 1e6:.0f} MB/s",
    )


def _own_copy(holder: Holder, target: Target) -> bool:
    return holder.kind is HolderKind.DISK and holder.node == target.node


def _alternatives(path: list[_Member], target: Target, holders: Sequence[Holder]) -> list[PeerRef | None]:
    """Complete device copies, then own ancestors from the nearest, then own disk, then other copies."""
    complete = {h.peer.peer_id for h in holders}

    def order(holder: Holder) -> tuple[int, bool, bool, bool, float, str]:
        return (
            _KINDS.index(holder.kind),
            bool(holder.busy),
            holder.leaving,
            holder.leaf != target.leaf,
            -holder.nic_bytes_per_s,
            holder.peer.peer_id,
        )

    ranked = sorted(holders, key=order)
    devices = [h.peer for h in ranked if h.kind is HolderKind.DEVICE]
    ancestors = [m.peer for m in reversed(path[:-1]) if m.peer.peer_id not in complete]
    own = [None] if any(_own_copy(h, target) for h in holders) else []
    others = [h.peer for h in ranked if h.kind is not HolderKind.DEVICE and not _own_copy(h, target)]
    half = ALTERNATIVES_MAX // 2
    return [*devices[:half], *ancestors[:half], *own, *others]


def _only_tails_live(hops: Sequence[Hop], targets: Sequence[Target]) -> tuple[Hop, ...]:
    """A member that forwards parameters and sends KV would do both in one direction: only tails go live then."""
    sends_kv = {target.peer.peer_id for target in targets if target.sends_kv}
    forwards = {hop.upstream.peer_id for hop in hops if hop.upstream is not None}
    reason = "it forwards parameters, and its KV leaves in the same direction"
    return tuple(
        replace(hop, live=False, live_reason=reason)
        if hop.live and hop.target in sends_kv & forwards
        else hop
        for hop in hops
    )
