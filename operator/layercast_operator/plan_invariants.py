"""What must hold for every multicast plan, whoever made it (design section 8, points 4 and 7).

Says what is wrong in words, from the values that were planned from and the hops alone, so that tests, benchmarks
and simulations can check any plan without trusting the planner.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from layercast_operator.multicast import (
    ALTERNATIVES_MAX,
    Holder,
    HolderKind,
    Hop,
    MulticastPlan,
    Running,
    Target,
)

# Rates are quotients of floats.
_ALMOST = 1 + 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What was asked, and the answer."""

    holders: Sequence[Holder]
    targets: Sequence[Target]
    running: Sequence[Running] = ()
    plan: MulticastPlan


def violations(given: Planned) -> list[str]:
    """Everything that is wrong with a plan; empty when nothing is."""
    found = [*_every_target_once(given), *_spares_kv(given), *_shards_are_whole(given)]
    parents, cycles = _parents(given)
    if cycles:
        return found + cycles
    for hop in given.plan.hops:
        path = _path(hop.target, parents)
        found += [*_starts_at_a_copy(given, hop, path), *_slows_down(given, path)]
        found += [*_alternatives_are_above(given, hop, path), *_may_be_live(given, hop)]
    return found


def _every_target_once(given: Planned) -> Iterator[str]:
    fed = Counter(hop.target for hop in given.plan.hops)
    fed.update(given.plan.unfed)
    if fed != Counter(target.peer.peer_id for target in given.targets):
        yield f"not every target once: {dict(fed)}"
    if given.plan.unfed and given.holders:
        yield f"{given.plan.unfed} get nothing although there is a copy"


def _parents(given: Planned) -> tuple[dict[str, str | None], list[str]]:
    """Who feeds whom, None for the own disk; and cycles, if there are any."""
    planned = {t.peer.peer_id for t in given.targets}
    parents: dict[str, str | None] = {
        r.target.peer.peer_id: r.upstream for r in given.running if r.target.peer.peer_id not in planned
    }
    for hop in given.plan.hops:
        parents[hop.target] = None if hop.upstream is None else hop.upstream.peer_id
    for start in parents:
        at: str | None = start
        for _ in range(len(parents) + 1):
            at = parents.get(at) if at is not None else None
        if at is not None and at in parents:
            return parents, [f"a cycle above {start}"]
    return parents, []


def _path(target: str, parents: dict[str, str | None]) -> list[str]:
    """A target, its upstream, the upstream of that, up to a copy or somebody unknown."""
    path = [target]
    while (up := parents.get(path[-1])) is not None:
        path.append(up)
    return path


def _starts_at_a_copy(given: Planned, hop: Hop, path: Sequence[str]) -> Iterator[str]:
    places = {t.peer.peer_id: t.node for t in [*given.targets, *(r.target for r in given.running)]}
    copies = {h.peer.peer_id for h in given.holders}
    if path[-1] in copies or any(r.target.peer.peer_id in path for r in given.running):
        return
    disks = {h.node for h in given.holders if h.kind is HolderKind.DISK}
    if places.get(path[-1]) not in disks:
        yield f"{hop.target} is fed by {path[-1]}, which has nothing"


def _slows_down(given: Planned, path: Sequence[str]) -> Iterator[str]:
    """Neither what arrives nor what members could take grows along a chain.

    Those whose NICs send something else anyway may hang below a slower one: they slow nobody down. And so may those
    whose chain starts at a node's own disk: they would read it over the NIC of that node otherwise.
    """
    feeders = {r.upstream for r in given.running}
    dead_ends = {h.node for h in given.holders if h.busy or h.peer.peer_id in feeders}
    dead_ends |= {r.target.node for r in given.running if r.target.peer.peer_id in feeders}
    dead_ends |= {node for _, node in _outside(given)}
    own_disk = {h.target for h in given.plan.hops if h.upstream is None}
    arrives = {hop.target: hop.bytes_per_s for hop in given.plan.hops}
    targets = {t.peer.peer_id: t for t in given.targets}
    disk_node = targets[path[-1]].node if path[-1] in own_disk else ""
    groups: dict[str, list[Target]] = {}
    for target in given.targets:
        groups.setdefault(target.logical, []).append(target)
    for below, above in pairwise(path):
        if below not in arrives or above not in arrives:
            continue
        if arrives[below] > arrives[above] * _ALMOST:
            yield f"more arrives at {below} than at {above} above it"
        if targets[below].node in dead_ends or targets[above].node == disk_node:
            continue
        # One by one, and as logical nodes: some of a logical node may be planned apart.
        alone = _takes([targets[below]]) > _takes([targets[above]]) * _ALMOST
        if alone and _takes(groups[targets[below].logical]) > _takes(groups[targets[above].logical]):
            yield f"{below} is faster than {above} above it"
    if arrives[path[0]] <= 0:
        yield f"nothing arrives at {path[0]}"


def _takes(group: Sequence[Target]) -> float:
    nics = sum({t.node: t.nics for t in group}.values())
    return min(t.nic_bytes_per_s for t in group) * min(nics, len(group))


def _alternatives_are_above(given: Planned, hop: Hop, path: Sequence[str]) -> Iterator[str]:
    """Complete copies or own ancestors: nobody waits in a circle."""
    copies = {h.peer.peer_id for h in given.holders}
    for alternative in hop.alternatives:
        if alternative is not None and alternative.peer_id not in copies | set(path[1:]):
            yield f"{hop.target} may turn to {alternative.peer_id}, which is neither a copy nor above it"
    if hop.upstream in hop.alternatives or len(set(hop.alternatives)) < len(hop.alternatives):
        yield f"{hop.target} has an alternative twice"
    if len(hop.alternatives) > ALTERNATIVES_MAX:
        yield f"{hop.target} has too many alternatives"


def _outside(given: Planned) -> Iterator[tuple[str, str]]:
    """(peer, node) of whoever sends over a NIC, for each hop that was planned."""
    nodes = {
        t.peer.peer_id: (t.node, t.logical) for t in [r.target for r in given.running] + [*given.targets]
    }
    for holder in given.holders:
        logical = holder.logical if holder.kind is HolderKind.DEVICE else holder.node
        nodes[holder.peer.peer_id] = (holder.node, logical)
    for hop in given.plan.hops:
        if hop.upstream is None or hop.upstream.peer_id not in nodes:
            continue
        node, logical = nodes[hop.upstream.peer_id]
        if nodes[hop.target][0] != node and nodes[hop.target][1] != logical:
            yield hop.upstream.peer_id, node


def _spares_kv(given: Planned) -> Iterator[str]:
    """No NIC that carries KV sends parameters, unless there is no other way, and then it says so."""
    carries = {h.node for h in given.holders if h.busy and h.nics == 1}
    busy = {h.peer.peer_id for h in given.holders if h.busy}
    other_way = any(h.peer.peer_id not in busy and h.node not in carries for h in given.holders)
    for sender, node in _outside(given):
        if sender not in busy and node not in carries:
            continue
        if other_way:
            yield f"{sender} sends parameters beside KV, and need not"
        if not any(note.startswith(f"{sender} ") for note in given.plan.notes):
            yield f"{sender} sends parameters beside KV and nothing says so"


def _may_be_live(given: Planned, hop: Hop) -> Iterator[str]:
    target = next(t for t in given.targets if t.peer.peer_id == hop.target)
    if not hop.live_reason:
        yield f"{hop.target}: no reason for being live or not"
    if hop.live and target.receives_kv:
        yield f"{hop.target} would receive parameters and KV"
    if hop.live and target.sends_kv:
        sends = {sender for sender, _ in _outside(given)}
        if hop.target in sends or (target.nics == 1 and target.node in {n for _, n in _outside(given)}):
            yield f"{hop.target} would send parameters and KV"


def _shards_are_whole(given: Planned) -> Iterator[str]:
    logical = {t.peer.peer_id: t.logical for t in given.targets}
    seen: dict[tuple[str, int], list[int]] = {}
    for hop in given.plan.hops:
        if hop.shards > 1:
            seen.setdefault((logical[hop.target], hop.shards), []).append(hop.shard)
    for (group, shards), found in seen.items():
        if sorted(found) != list(range(shards)):
            yield f"{group} gets shards {sorted(found)} of {shards}"
