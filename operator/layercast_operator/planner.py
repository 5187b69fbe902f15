"""One pass for one model: from what is seen to what to do next, with reasons. Pure.

A plan is never stored. Each pass looks at everything and plans only what is still missing, so a command that was
lost, or a crash at any line, costs one more pass; a plan that took effect is not planned again.

Order matters only for reading: free what is broken, find the checkpoint, shrink, grow, feed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from layercast_operator.actions import (
    Action,
    DrainReplica,
    PrepareCheckpoint,
    SetReplicaRole,
    StartReplica,
    StopReplica,
)
from layercast_operator.feeding import feed, holders_of
from layercast_operator.lastcopies import disk_will_do, suffice
from layercast_operator.modelservice import CACHE_POLICIES, ModelService, ScalePolicy
from layercast_operator.multicast import Holder, HolderKind
from layercast_operator.placement import choose_preparer, place_replicas
from layercast_operator.policy import counted
from layercast_operator.replacing import (
    PlanInput,
    current_of,
    destinations_of,
    misplaced,
    replaced,
    victims_of,
)
from layercast_operator.roles import assign, with_roles
from layercast_operator.snapshot import CheckpointState, Node, PeerRef, Replica, ReplicaState, Snapshot
from layercast_operator.state import Resolved, resting

# For replicas whose ModelService is gone, and with it its grace.
ORPHAN_GRACE_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do now, and what stands in the way of more."""

    actions: tuple[Action, ...] = ()
    blocked: str = ""
    """Why the wanted replicas cannot be started, in words; empty when nothing hinders."""
    waits_for_copy: bool = False
    """A device would be freed now if its checkpoint were in host memory."""
    waits_for_members: bool = False
    """A replica would lead now if the others of its pipeline were there."""


def plan(given: PlanInput) -> Plan:
    """The next step of one model."""
    replicas = given.snapshot.replicas(given.model.name)
    actions: list[Action] = [*_stop_finished(given, replicas)]
    if given.snapshot.unseen:
        return Plan(actions=tuple(actions), blocked=f"waits for {', '.join(given.snapshot.unseen)} to answer")
    resolved = given.memory.resolved
    holders = [] if resolved is None else holders_of(given.snapshot, resolved.digest)
    if resolved is None or not holders:
        prepared, blocked = _prepare(given)
        return Plan(actions=(*actions, *prepared), blocked=blocked)
    if all(h.leaving for h in holders):  # the pool must not lose its last copy with them
        actions += _pool_copy(given, resolved, holders)
    if given.policy in CACHE_POLICIES or _rests(given, replicas):
        actions += _prepare_everywhere(given, resolved)
    leaving, blocked, waits = _shrink(given, resolved, replicas, holders)
    actions += leaving
    gone = {action.subject for action in leaving}
    stays = [r for r in current_of(given, resolved, replicas) if r.replica_id not in gone]
    started, missing = _grow(given, resolved, stays, holders)
    actions += started
    roles = _roles(given, stays)
    actions += roles
    stays = with_roles(stays, roles)  # or the next pass, which sees them, would plan another way
    fed = feed(
        model=given.model,
        policy=given.policy,
        snapshot=given.snapshot,
        resolved=resolved,
        replicas=stays,
        memory=given.memory,
        starting=len(started),
        divided=given.division.total > 0,
    )
    actions += fed.actions
    staying = [h for h in holders if not h.leaving and h.peer.peer_id not in gone]
    waits = waits or (len(staying) < len(holders) and not suffice(staying, ""))
    return Plan(
        actions=tuple(actions),
        blocked="; ".join(filter(None, (blocked, missing, fed.unfed))),
        waits_for_copy=waits,
        waits_for_members=fed.waits_for_members,
    )


def plan_orphans(snapshot: Snapshot, models: Collection[str]) -> Plan:
    """Drain and stop replicas whose ModelService is gone."""
    if snapshot.unseen:
        return Plan()
    actions: list[Action] = []
    for replica in snapshot.replicas():
        if replica.model in models or replica.pending or not _fresh(snapshot, replica):
            continue
        why = f"ModelService {replica.model} is gone"
        if replica.executes:
            actions.append(_drain(replica, ORPHAN_GRACE_S, why))
        elif replica.state is not ReplicaState.DRAINING:
            actions.append(_stop(replica, why))
    return Plan(actions=tuple(actions))


def _fresh(snapshot: Snapshot, replica: Replica) -> bool:
    node = snapshot.node(replica.node)
    return node is not None and node.fresh


def _stop(replica: Replica, why: str, *, failed: bool = False) -> StopReplica:
    return StopReplica(
        node=replica.node, model=replica.model, replica_id=replica.replica_id, failed=failed, why=why
    )


def _drain(
    replica: Replica, grace_s: float, why: str, destinations: tuple[PeerRef, ...] = ()
) -> DrainReplica:
    return DrainReplica(
        node=replica.node,
        model=replica.model,
        replica_id=replica.replica_id,
        grace_s=grace_s,
        why=why,
        destinations=destinations,
    )


def _stop_finished(given: PlanInput, replicas: Sequence[Replica]) -> list[Action]:
    """Free the devices of replicas that failed or are drained."""
    actions: list[Action] = []
    for replica in replicas:
        if replica.pending or not _fresh(given.snapshot, replica):
            continue
        gone = {action.subject for action in actions}
        if replica.state is ReplicaState.FAILED:
            actions.append(_stop(replica, f"it failed: {replica.error or 'no reason given'}", failed=True))
        elif replica.state is ReplicaState.DRAINED and not _still_needed(replica, given, gone):
            actions.append(_stop(replica, "it is drained"))
    return actions


def _still_needed(replica: Replica, given: PlanInput, gone: Collection[str]) -> bool:
    """It is the last complete copy of what is deployed, or of what others still load from it."""
    if not replica.complete:
        return False
    holders = holders_of(given.snapshot, replica.digest)
    others = [h for h in holders if h.peer.peer_id not in {replica.replica_id, *gone}]
    resolved = given.memory.resolved
    if resolved is not None and resolved.digest == replica.digest:
        return not suffice(others, _disk(given, resolved))
    if others:
        return False
    return any(
        r.arriving and r.digest == replica.digest and not r.pending
        for r in given.snapshot.replicas(replica.model)
    )


def _disk(given: PlanInput, resolved: Resolved) -> str:
    return disk_will_do(given.policy, given.memory, resolved, given.snapshot)


def _rests(given: PlanInput, replicas: Sequence[Replica]) -> bool:
    """It is at zero, and every node can pack it without a network: then k nodes wake it up k times as fast."""
    local = given.model.model.source.startswith(("file://", "pvc://"))
    return local and given.policy is ScalePolicy.LIVE and given.target == 0 and not replicas


def _prepare_everywhere(given: PlanInput, resolved: Resolved) -> list[Action]:
    """Every disk has the checkpoint, unless host memory always does: replicas load from their own node with caches,
    and from as many disks as there are of them when they start from zero.
    """
    actions: list[Action] = []
    avoid = resting(given.memory.prepare_backoffs, given.snapshot.at)
    for node in given.snapshot.nodes:
        known = any(
            c.key == given.model.model.key and c.state is not CheckpointState.FAILED for c in node.checkpoints
        )
        kept = given.policy is ScalePolicy.HOST_CACHE and node.host_pool_bytes >= resolved.nbytes
        if node.fresh and not known and not kept and node.name not in avoid:
            actions.append(_prepare_on(given, node.name, "replicas load from their own node"))
    return actions


def _prepare(given: PlanInput) -> tuple[list[Action], str]:
    """Have one node fetch and pack the checkpoint, unless one is at it."""
    model, memory, now = given.model, given.memory, given.snapshot.at
    if now < memory.refused_until:
        return [], "the source was refused; it is tried again after a rest or an edit"
    for node in given.snapshot.present:
        if not node.fresh and _holds(node, memory.resolved):
            return [], f"waits for {node.name} to answer"
        for checkpoint in node.checkpoints:
            if checkpoint.key != model.model.key:
                continue
            if checkpoint.state in {CheckpointState.FETCHING, CheckpointState.PACKING}:
                return [], f"{node.name} prepares the checkpoint"
            if checkpoint.state is CheckpointState.READY and checkpoint.on_disk:
                return [], f"waits for {node.name} to answer"
    avoid = resting(memory.prepare_backoffs, now)
    if asked := _asked(given.snapshot, avoid, model.model.key):
        return [], f"{asked} prepares the checkpoint"
    failures = {node: backoff.failures for node, backoff in memory.prepare_backoffs.items()}
    chosen = choose_preparer(given.snapshot, failures=failures, avoid=avoid, selector=model.node_selector)
    if chosen is None:
        return [], "no node can prepare the checkpoint now"
    node_name, why = chosen
    return [_prepare_on(given, node_name, why)], f"{node_name} prepares the checkpoint"


def _prepare_on(given: PlanInput, node: str, why: str) -> PrepareCheckpoint:
    model = given.model
    return PrepareCheckpoint(
        node=node,
        model=model.name,
        key=model.model.key,
        source=model.model.source,
        revision=model.model.revision,
        dtype=model.model.dtype,
        why=why,
    )


def _asked(snapshot: Snapshot, avoid: Collection[str], key: str) -> str:
    """A node that was asked a moment ago and does not show it yet; its neighbours need not begin as well."""
    for node in snapshot.nodes:
        failed = any(c.key == key and c.state is CheckpointState.FAILED for c in node.checkpoints)
        if node.name in avoid and node.fresh and not failed:
            return node.name
    return ""


def _holds(node: Node, resolved: Resolved | None) -> bool:
    return resolved is not None and any(r.complete and r.digest == resolved.digest for r in node.replicas)


def _shrink(
    given: PlanInput, resolved: Resolved, replicas: Sequence[Replica], holders: Sequence[Holder]
) -> tuple[list[Action], str, bool]:
    """Let surplus replicas go, and those of an older checkpoint once newer ones serve; why not, and for a copy."""
    current = current_of(given, resolved, replicas)
    surplus = max(len(current) - given.target, 0)
    victims = [
        (r, f"{len(current)} are there, {given.target} wanted")
        for r in victims_of(current, surplus, given.division)
    ]
    safe = suffice(holders, _disk(given, resolved))
    victims += [
        (r, misplaced(given, r) or "of an older checkpoint")
        for r in replaced(given, resolved, replicas, safe=safe)
    ]
    leaving = {victim.replica_id for victim, _ in victims}
    staying = [r for r in current if r.replica_id not in leaving]
    gone: set[str] = set()
    actions: list[Action] = []
    for replica, why in victims:
        if replica.pending or not _fresh(given.snapshot, replica):
            continue
        if replica.digest == resolved.digest and _last_copy(replica, given, current, holders, gone):
            blocked = f"{replica.replica_id} stays for now: it is the last complete copy in memory"
            prepared = _pool_copy(given, resolved, holders)
            return [*actions, *prepared], blocked, True
        gone.add(replica.replica_id)
        if replica.state is ReplicaState.LOADING:
            actions.append(_stop(replica, f"{why}; it has not begun to serve"))
        else:
            actions.append(_drain(replica, given.model.drain_grace_s, why, destinations_of(replica, staying)))
    return actions, "", not safe


def _last_copy(
    replica: Replica,
    given: PlanInput,
    current: Sequence[Replica],
    holders: Sequence[Holder],
    gone: Collection[str],
) -> bool:
    """Without it nobody would have the checkpoint, or those that still load could not finish."""
    if not replica.complete:
        return False
    others = [
        h
        for h in holders
        if not h.leaving and h.peer.peer_id not in gone and h.peer.peer_id != replica.replica_id
    ]
    loading = [r for r in current if r.arriving and r.replica_id not in gone and not r.pending]
    device_left = any(h.kind is HolderKind.DEVICE for h in others)
    if loading and given.target > 0 and not device_left:
        return True
    resolved = given.memory.resolved
    return resolved is None or not suffice(others, _disk(given, resolved))


def _pool_copy(given: PlanInput, resolved: Resolved, holders: Sequence[Holder]) -> list[Action]:
    """Where host memory will not have it, a disk must before the last device gives its own up."""
    if any(h.kind is not HolderKind.DEVICE for h in holders) or not _disk(given, resolved):
        return []
    return _prepare(given)[0]


def _roles(given: PlanInput, stays: Sequence[Replica]) -> list[SetReplicaRole]:
    """Whose role changes; whoever shares its queue with a live target keeps its own until that is complete."""
    arriving = {r.replica_id for r in stays if r.arriving}
    sharing = {source for target, source in given.memory.live_sources.items() if target in arriving}
    fresh = {node.name for node in given.snapshot.nodes if node.fresh}
    return assign(stays, given.division, sharing=sharing, fresh=fresh)


def _grow(
    given: PlanInput, resolved: Resolved, stays: Sequence[Replica], holders: Sequence[Holder]
) -> tuple[list[Action], str]:
    """Start what is missing on the devices that get their parameters soonest."""
    count = given.target - len(stays)
    if count <= 0:
        return [], ""
    if given.snapshot.at < given.memory.refused_until:
        return [], "a node refused the model; it is tried again after a rest or an edit"
    seen = given.snapshot
    if given.policy in CACHE_POLICIES:  # only a node with a copy of its own can load
        holders = [h for h in holders if h.kind is not HolderKind.DEVICE]
        own = {h.node for h in holders}
        seen = replace(seen, nodes=tuple(node for node in seen.nodes if node.name in own))
    placed = place_replicas(
        seen,
        count=count,
        checkpoint_bytes=resolved.nbytes,
        holders=holders,
        avoid=resting(given.memory.start_backoffs, given.snapshot.at),
        taken=given.taken,
        selector=given.model.node_selector,
        estimates=given.memory.estimates,
    )
    actions: list[Action] = [
        StartReplica(
            node=place.node,
            model=given.model.name,
            replica_id=f"{given.model.name}-{given.new_id()}",
            digest=resolved.digest,
            device_id=place.device_id,
            context_length_max=context_length(given.model, resolved),
            batch_size_max=given.model.batch_size,
            step_tokens_max=given.model.step_tokens,
            engine=given.model.engine,
            prefix_caching=given.model.prefix_caching,
            manifest_peer=_manifest_peer(place.node, holders),
            why=f"{len(stays)} of {counted(given.target, 'replica')} there or on the way; {place.why}",
            way=place.way,
            parameters_s=place.parameters_s,
        )
        for place in placed.places
    ]
    return actions, placed.missing


def context_length(model: ModelService, resolved: Resolved) -> int:
    """Longest sequence: what is asked for, within what the model was made for."""
    limits = [n for n in (model.context_length, resolved.context_length_max) if n > 0]
    return min(limits, default=0)


def _manifest_peer(node: str, holders: Sequence[Holder]) -> PeerRef | None:
    """Who tells the manifest: nobody when the node's disk has it, else a complete copy, devices first."""
    if any(h.node == node and h.kind is not HolderKind.DEVICE for h in holders):
        return None
    kinds = list(HolderKind)
    best = min(holders, key=lambda h: (kinds.index(h.kind), h.leaving, h.peer.peer_id), default=None)
    return best.peer if best is not None else None
