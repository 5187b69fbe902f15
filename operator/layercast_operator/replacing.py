"""Which replicas give way to new ones: those of an older checkpoint, and those on nodes that are to be left. Pure.

New ones come first: an old replica goes when a new one serves in its place. Where the only device is its own, an
outdated one makes room; one on a node that is to be left stays, because its device helps nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from layercast_operator.modelservice import ModelService, ScalePolicy
from layercast_operator.placement import place_replicas
from layercast_operator.roles import Division
from layercast_operator.snapshot import PeerRef, Replica, ReplicaState, Role, Snapshot
from layercast_operator.state import ModelMemory, Resolved, resting

# Among so many a replica's requests are shared out evenly enough.
DESTINATIONS_MAX = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInput:
    """Everything that a plan depends on."""

    model: ModelService
    policy: ScalePolicy
    target: int
    """Replicas wanted, within what devices can hold."""
    snapshot: Snapshot
    memory: ModelMemory
    new_id: Callable[[], str]
    """Six characters of base 36, new each time."""
    taken: Collection[tuple[str, str]] = ()
    """(node, device) pairs promised to other models in this pass."""
    division: Division = field(default_factory=Division)
    """How the replicas share the work."""


def misplaced(given: PlanInput, replica: Replica) -> str:
    """Why a replica should be on another node, in words; empty when it is where it may be."""
    node = given.snapshot.node(replica.node)
    unwanted = node.facts.unwanted(given.model.node_selector) if node is not None else ""
    return f"{replica.node} is {unwanted}" if unwanted else ""


def current_of(given: PlanInput, resolved: Resolved, replicas: Sequence[Replica]) -> list[Replica]:
    """Those that are meant to stay: of the right checkpoint, on a node that they may be on."""
    return [r for r in replicas if r.active and r.digest == resolved.digest and not misplaced(given, r)]


def destinations_of(leaving: Replica, staying: Sequence[Replica]) -> tuple[PeerRef, ...]:
    """Where running requests of a replica move: to those that serve the same checkpoint, the emptiest first.

    Those that compute prompts come last: what runs has its prompt behind it.
    """
    able = [
        r
        for r in staying
        if r.state is ReplicaState.SERVING
        and r.digest == leaving.digest
        and r.replica_id != leaving.replica_id
        and r.peer.address
    ]

    def order(replica: Replica) -> tuple[bool, int, str]:
        return (replica.role is Role.PREFILL, replica.requests, replica.replica_id)

    return tuple(r.peer for r in sorted(able, key=order)[:DESTINATIONS_MAX])


def victims_of(current: Sequence[Replica], surplus: int, division: Division | None = None) -> list[Replica]:
    """Which replicas go: of a role with too many, those that do not serve yet, then the emptiest, then the newest."""

    def order(replica: Replica) -> tuple[bool, int, float, str]:
        assigned_at = replica.timeline.assigned_at
        age = -(assigned_at if assigned_at is not None else float("inf"))
        return (replica.state is ReplicaState.SERVING, replica.requests, age, replica.replica_id)

    ordered = sorted(current, key=order)
    if division is None or not division.total:
        return ordered[:surplus]
    spare = {
        Role.PREFILL: sum(r.role is Role.PREFILL for r in current) - division.prefill,
        Role.DECODE: sum(r.role is Role.DECODE for r in current) - division.decode,
    }
    chosen: list[Replica] = []
    for replica in ordered:
        if len(chosen) < surplus and spare.get(replica.role, 1) > 0:
            chosen.append(replica)
            spare[replica.role] = spare.get(replica.role, 1) - 1
    others = [r for r in ordered if r not in chosen]
    return [*chosen, *others[: surplus - len(chosen)]]


def replaced(
    given: PlanInput, resolved: Resolved, replicas: Sequence[Replica], *, safe: bool
) -> list[Replica]:
    """Those that may go now: one for each new one that serves, or one when there is no other device.

    `safe` says that the checkpoint of the new ones is kept: only then does an old one make room for the first.
    """
    new = current_of(given, resolved, replicas)
    stay = {r.replica_id for r in new}
    old = [r for r in replicas if r.active and r.replica_id not in stay]
    if not old:
        return []
    serving = sum(1 for r in new if r.state is ReplicaState.SERVING)
    not_yet = [r for r in old if r.state is ReplicaState.LOADING]
    count = max(len(old) - max(given.target - serving, 0), len(not_yet))
    leaving = any(r.state in {ReplicaState.DRAINING, ReplicaState.DRAINED} for r in replicas)
    # A new one that failed already must not cost another old one its place.
    healthy = safe and not given.memory.start_backoffs and given.snapshot.at >= given.memory.refused_until
    if healthy and count == 0 and not leaving and len(new) == serving and given.target > serving:
        in_place = [r for r in old if not misplaced(given, r)]
        return [] if _room(given, resolved) else victims_of(in_place, 1)
    return victims_of(old, count)


def _room(given: PlanInput, resolved: Resolved) -> bool:
    """Whether there is a device for one more, now or in a moment."""
    room = place_replicas(
        given.snapshot,
        count=1,
        checkpoint_bytes=resolved.nbytes,
        holders=(),
        avoid=resting(given.memory.start_backoffs, given.snapshot.at),
        taken=given.taken,
        selector=given.model.node_selector,
    )
    return bool(room.places or room.warming)
