"""Which transfers to start or improve: joins the replicas that were seen with the multicast plan. Pure.

There is one transfer per (target, checkpoint). A target survives the death of its upstream by itself; a new
generation is planned when it has no upstream left, or still names one that no longer exists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from layercast_operator.actions import Action, StartTransfer
from layercast_operator.leading import (
    MEMBERS_WAIT_S,
    awaited,
    fed_late,
    has_leader,
    leader_of,
    leading,
    members_of,
    order_of,
    successor,
)
from layercast_operator.modelservice import CACHE_POLICIES, ModelService, ScalePolicy
from layercast_operator.multicast import (
    ASSUMED_DISK_BYTES_PER_S,
    INSIDE_NODE_BYTES_PER_S,
    Holder,
    HolderKind,
    Hop,
    Running,
    Target,
    plan_multicast,
)
from layercast_operator.placement import disk_bytes_per_s, nic_bytes_per_s
from layercast_operator.snapshot import Node, NodeHealth, PeerRef, Replica, ReplicaState, Role, Snapshot
from layercast_operator.state import Feed, ModelMemory, Resolved

# The generation is the time of the plan, so it also says when to try again: the target gets this long to move on.
REPLACE_AFTER_MS = 1000
ALONE = "somebody complete serves now, whose queue it can share"
"""Why a replica that loads is asked again when others were complete before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feeding:
    """Transfers to begin now, and what stands in the way of others."""

    actions: tuple[Action, ...] = ()
    unfed: str = ""
    """Who cannot be fed now and why, in words; empty when all are."""
    waits_for_members: bool = False
    """Nobody complete serves, and a replica that would lead has company that is not there yet."""


def holders_of(snapshot: Snapshot, digest: str) -> list[Holder]:
    """Complete copies of a checkpoint that answer now: devices, host memory, disks."""
    found: list[Holder] = []
    for node in snapshot.holding(digest):
        if not node.fresh:
            continue
        for replica in node.replicas:
            if replica.digest == digest and replica.complete and replica.peer.address:
                found.append(_device_holder(node, replica))
        copy = node.host_copy(digest)
        if copy is not None and copy.complete:
            found.append(_agent_holder(node, HolderKind.HOST, INSIDE_NODE_BYTES_PER_S))
        for checkpoint in node.checkpoints:
            if checkpoint.digest != digest:
                continue
            if checkpoint.on_disk:
                found.append(_agent_holder(node, HolderKind.DISK, disk_bytes_per_s(node)))
    # Two keys may name one checkpoint; a node then still has one copy.
    return list({(h.peer.peer_id, h.kind): h for h in found}.values())


def _device_holder(node: Node, replica: Replica) -> Holder:
    return Holder(
        peer=replica.peer,
        node=node.name,
        leaf=node.leaf,
        kind=HolderKind.DEVICE,
        nic_bytes_per_s=nic_bytes_per_s(node),
        read_bytes_per_s=INSIDE_NODE_BYTES_PER_S,
        leaving=replica.state is not ReplicaState.SERVING,
    )


def _agent_holder(node: Node, kind: HolderKind, read_bytes_per_s: float) -> Holder:
    return Holder(
        peer=node.peer,
        node=node.name,
        leaf=node.leaf,
        kind=kind,
        nic_bytes_per_s=nic_bytes_per_s(node),
        read_bytes_per_s=read_bytes_per_s or ASSUMED_DISK_BYTES_PER_S,
    )


def feed(
    *,
    model: ModelService,
    policy: ScalePolicy,
    snapshot: Snapshot,
    resolved: Resolved,
    replicas: Sequence[Replica],
    memory: ModelMemory,
    starting: int = 0,
    divided: bool = False,
) -> Feeding:
    """Transfers for those that need one. `starting` more are asked for; `divided`: KV of prompts goes to others."""
    feeds = memory.feeds
    hungry = {r.replica_id: why for r in replicas if (why := _need(r, snapshot, model.name, feeds))}
    sources = _live_sources(replicas, snapshot) if policy is ScalePolicy.LIVE else []
    if sources and not has_leader(replicas):
        hungry = _alone(replicas, snapshot, feeds, divided=divided) | hungry
    leaderless = policy is ScalePolicy.LIVE and not sources and not has_leader(replicas)
    if leaderless and not hungry:
        hungry = _led_again(replicas, snapshot)
    if not hungry:
        return Feeding()
    by_id = {replica.replica_id: replica for replica in replicas}
    if policy in CACHE_POLICIES:
        return _feed_locally({by_id[i]: why for i, why in hungry.items()}, snapshot, resolved)
    absent = awaited(replicas)
    if leaderless and (absent or starting):
        since = snapshot.at if memory.members_awaited_since is None else memory.members_awaited_since
        if snapshot.at - since < MEMBERS_WAIT_S:
            names = ", ".join(absent) or "replicas that are being started"
            return Feeding(unfed=f"waits for {names}, to load different parts", waits_for_members=True)
    running = _running([r for r in replicas if r.replica_id not in hungry], snapshot, feeds, divided=divided)
    holders = _sending(holders_of(snapshot, resolved.digest), replicas if divided else ())
    plan = plan_multicast(
        holders=holders,
        targets=[t for i in hungry if (t := _target(by_id[i], snapshot, divided=divided)) is not None],
        running=running,
        checkpoint_bytes=resolved.nbytes,
        serving=bool(sources),
        star=policy is ScalePolicy.NETWORK,
    )
    actions = _actions(
        plan.hops,
        hungry,
        policy=policy,
        sources=sources,
        resolved=resolved,
        memory=memory,
        by_id=by_id,
        leader=leader_of(plan.hops) if leaderless else "",
        joined=leading(replicas) if policy is ScalePolicy.LIVE and not sources else None,
        holders=holders,
        at=snapshot.at,
    )
    unfed = f"nobody can feed {', '.join(plan.unfed)}" if plan.unfed else ""
    return Feeding(actions=tuple(actions), unfed=unfed)


def _actions(
    hops: Sequence[Hop],
    hungry: Mapping[str, str],
    *,
    policy: ScalePolicy,
    sources: Sequence[Replica],
    resolved: Resolved,
    memory: ModelMemory,
    by_id: Mapping[str, Replica],
    leader: str,
    joined: Replica | None,
    holders: Sequence[Holder],
    at: float,
) -> list[Action]:
    """One transfer a hop: with whom it shares a queue, leads, or joins who leads, and what it loads first."""
    shared = {t: s for t, s in memory.live_sources.items() if t in by_id and by_id[t].arriving}
    actions: list[Action] = []
    for hop in hops:
        joins = joined is not None and joined.replica_id != hop.target
        source = joined if joins else _choose_live_source(hop, sources, shared)
        if source is not None:
            shared[hop.target] = source.replica_id
        elif hungry[hop.target] == ALONE:
            continue
        upstreams = (hop.upstream, *hop.alternatives)
        if joins:
            upstreams, order = fed_late(hop, by_id[hop.target], resolved, list(by_id.values()), holders)
        elif policy is ScalePolicy.LIVE and not sources:
            order = order_of(hop, resolved)
        else:
            order = segment_order(resolved.layers, live=source is not None)
        lead = members_of(leader, list(by_id.values())) if hop.target == leader else None
        reason = (
            f"joins the pipeline of {joined.replica_id}" if joined is not None and joins else hop.live_reason
        )
        why = f"{hungry[hop.target]}; {hop.why}; {reason}"
        if lead is not None:
            why += f", so it leads a pipeline of {len(lead) + 1}"
        sent = _transfer(by_id[hop.target], upstreams, source, order, at=at, why=why, lead=lead)
        actions.append(replace(sent, way=hop.kind.value, parameters_s=hop.predicted_s))
    return actions


def _alone(
    replicas: Sequence[Replica], snapshot: Snapshot, feeds: Mapping[str, Feed], *, divided: bool
) -> dict[str, str]:
    """Replicas that load since nobody was complete, and execute nothing: whoever is complete can share with them.

    Not those from which others read while the KV of prompts would leave them in the same direction.
    """
    forwarding = {_upstream(r, feeds) for r in replicas if r.arriving} if divided else set()
    return {
        r.replica_id: ALONE
        for r in replicas
        if r.state is ReplicaState.LOADING
        and r.replica_id not in forwarding
        and r.peer.address
        and r.transfer is not None
        and not _young(r, snapshot)
        and (node := snapshot.node(r.node)) is not None
        and node.fresh
    }


def _running(
    replicas: Sequence[Replica], snapshot: Snapshot, feeds: Mapping[str, Feed], *, divided: bool
) -> list[Running]:
    """Those that are being fed."""
    return [
        Running(target=target, upstream=_upstream(r, feeds))
        for r in replicas
        if r.arriving
        if (target := _target(r, snapshot, divided=divided)) is not None
    ]


def _young(replica: Replica, snapshot: Snapshot) -> bool:
    """Its transfer has only just begun, or has new upstreams."""
    return (
        replica.transfer is not None and snapshot.at * 1000 - replica.transfer.generation < REPLACE_AFTER_MS
    )


def _led_again(replicas: Sequence[Replica], snapshot: Snapshot) -> dict[str, str]:
    """Whom to ask to lead when all are fed and nobody does; nobody while a transfer has only just begun."""
    chosen = successor(replicas)
    if chosen is None or chosen.transfer is None:
        return {}
    node = snapshot.node(chosen.node)
    young = any(_young(r, snapshot) for r in replicas if r.arriving)
    return {} if young or node is None or not node.fresh else {chosen.replica_id: "nobody leads"}


def _feed_locally(hungry: Mapping[Replica, str], snapshot: Snapshot, resolved: Resolved) -> Feeding:
    """Each from its own node: a copy in host memory, also one that is still filling, else the disk."""
    actions: list[Action] = []
    unfed: list[str] = []
    for replica, need in hungry.items():
        node = snapshot.node(replica.node)
        assert node is not None  # nobody is hungry on a node that is not fresh
        copy = node.host_copy(resolved.digest)
        in_memory = copy is not None and copy.there and not copy.pending
        on_disk = any(c.digest == resolved.digest and c.on_disk for c in node.checkpoints)
        upstreams = (*((node.peer,) if in_memory else ()), *((None,) if on_disk else ()))
        if not upstreams:
            unfed.append(replica.replica_id)
            continue
        why = f"{need}; fed by its own {'host memory' if in_memory else 'disk'}"
        order = segment_order(resolved.layers, live=False)
        kind = HolderKind.HOST if in_memory else HolderKind.DISK
        rate = INSIDE_NODE_BYTES_PER_S if in_memory else disk_bytes_per_s(node)
        sent = _transfer(replica, upstreams, None, order, at=snapshot.at, why=why)
        actions.append(replace(sent, way=kind.value, parameters_s=resolved.nbytes / rate))
    missing = f"no copy on the node of {', '.join(unfed)}" if unfed else ""
    return Feeding(actions=tuple(actions), unfed=missing)


def _upstream(replica: Replica, feeds: Mapping[str, Feed]) -> str:
    """Whom a replica reads from, or was told to a moment ago; empty when neither is known."""
    shown = replica.transfer.upstream if replica.transfer is not None else ""
    told = feeds.get(replica.replica_id)
    return shown or (told.upstream if told is not None else "")


def _need(replica: Replica, snapshot: Snapshot, model: str, feeds: Mapping[str, Feed]) -> str:
    """Why a replica wants a (new) transfer; empty when it does not."""
    node = snapshot.node(replica.node)
    # Without an address it could not be anybody's upstream: it is planned for when it has one, a moment later.
    if not replica.arriving or not replica.peer.address or node is None or not node.fresh:
        return ""
    transfer = replica.transfer
    if transfer is None:
        told = feeds.get(replica.replica_id)
        under_way = told is not None and snapshot.at - told.at < REPLACE_AFTER_MS / 1000
        return "" if under_way else "nothing feeds it yet"
    if _young(replica, snapshot):
        return ""
    if transfer.stalled:
        reason = transfer.failures[-1] if transfer.failures else "no upstream is left"
        return f"it is stalled: {reason}"
    if _is_gone(transfer.upstream, snapshot, model):
        return f"its upstream {transfer.upstream} is gone"
    return ""


def _is_gone(upstream: str, snapshot: Snapshot, model: str) -> bool:
    """Whether an upstream is known not to exist; names of unknown form are left alone (a node's own disk)."""
    node = snapshot.node(upstream)
    if node is not None:
        return node.health is NodeHealth.LOST
    if re.fullmatch(re.escape(model) + r"-[0-9a-z]{6}", upstream) is None:
        return False
    return all(r.replica_id != upstream or r.state is ReplicaState.FAILED for r in snapshot.replicas(model))


def _sending(holders: Sequence[Holder], replicas: Sequence[Replica]) -> list[Holder]:
    """The same; of replicas that compute prompts it is said that KV leaves them."""
    prefill = {r.replica_id for r in replicas if r.role is not Role.DECODE}
    busy = "its NIC sends KV to replicas that decode"
    return [replace(h, busy=busy) if h.peer.peer_id in prefill else h for h in holders]


def _target(replica: Replica, snapshot: Snapshot, *, divided: bool) -> Target | None:
    node = snapshot.node(replica.node)
    if node is None or not node.fresh or not replica.peer.address:
        return None
    return Target(
        peer=replica.peer,
        node=node.name,
        leaf=node.leaf,
        nic_bytes_per_s=nic_bytes_per_s(node),
        sends_kv=divided and replica.role is not Role.DECODE,
        receives_kv=replica.role is Role.DECODE,
    )


def _live_sources(replicas: Sequence[Replica], snapshot: Snapshot) -> list[Replica]:
    """Complete replicas that take requests and answer now: they can share their queue.

    Those that decode have one only while nobody else takes prompts.
    """
    able = [
        r
        for r in replicas
        if r.state is ReplicaState.SERVING
        and r.peer.address
        and (node := snapshot.node(r.node)) is not None
        and node.fresh
    ]
    return [r for r in able if r.role is not Role.DECODE] or able


def _choose_live_source(hop: Hop, sources: Sequence[Replica], shared: Mapping[str, str]) -> Replica | None:
    """Who shares its queue with a target: the one it has, else the one with fewest targets and most waiting."""
    if not hop.live:
        return None
    users = [source for target, source in shared.items() if target != hop.target]
    mine = shared.get(hop.target, "")

    def order(source: Replica) -> tuple[bool, int, int, str]:
        return (
            source.replica_id != mine,
            users.count(source.replica_id),
            -source.requests_waiting,
            source.replica_id,
        )

    return min(sources, key=order, default=None)


def segment_order(layers: int, *, live: bool) -> tuple[int, ...]:
    """Layers first for a live target: its source hands over hidden states after the embedding. Else in order."""
    if live:
        return (*range(1, layers + 1), 0, layers + 1)
    return tuple(range(layers + 2))


def _transfer(
    replica: Replica,
    upstreams: tuple[PeerRef | None, ...],
    source: Replica | None,
    order: tuple[int, ...],
    *,
    at: float,
    why: str,
    lead: tuple[PeerRef, ...] | None = None,
) -> StartTransfer:
    before = replica.transfer.generation if replica.transfer is not None else 0
    return StartTransfer(
        node=replica.node,
        model=replica.model,
        replica_id=replica.replica_id,
        transfer_id=f"{replica.replica_id}-t",
        generation=max(int(at * 1000), before + 1),
        upstreams=upstreams,
        segment_order=order,
        live_source=source.peer if source is not None else None,
        why=why,
        lead=lead,
    )
