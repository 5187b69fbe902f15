"""Who leads when nobody complete serves: the first of those that load, with the others as members. Pure.

Scale from zero, or the loss of every replica (design section 4, pipelines; digest B5, B7): the replicas that arrive
load different parts first, and one of them leads an execution pipeline until it is complete. The parts can only be
dealt among those that are there, so the decision's other replicas are waited for, but not for long. One that comes
later asks the leader to be admitted, as a live target asks its source; when the leader is complete it is one.
"""

from __future__ import annotations

from collections.abc import Sequence

from layercast_operator.multicast import Holder, HolderKind, Hop
from layercast_operator.pipelines import complements, late_order, orders
from layercast_operator.snapshot import PeerRef, Replica, ReplicaState
from layercast_operator.state import Resolved

# A replica that is asked for has its address when its memory is allocated: moments, unless its node is in trouble.
MEMBERS_WAIT_S = 2.0


def has_leader(replicas: Sequence[Replica]) -> bool:
    """Somebody leads already."""
    return any(r.state is ReplicaState.LEADING for r in replicas)


def leading(replicas: Sequence[Replica]) -> Replica | None:
    """Who leads and can be reached."""
    return next((r for r in replicas if r.state is ReplicaState.LEADING and r.peer.address), None)


def awaited(replicas: Sequence[Replica]) -> list[str]:
    """Replicas of the decision that have no address yet."""
    return [r.replica_id for r in replicas if r.arriving and not r.peer.address]


def successor(replicas: Sequence[Replica]) -> Replica | None:
    """Who leads after the leader was lost: the one that has most of the bytes."""
    able = [r for r in replicas if r.arriving and r.peer.address and r.transfer is not None]
    return max(able, key=lambda r: (_done(r), r.replica_id), default=None)


def leader_of(hops: Sequence[Hop]) -> str:
    """The first that loads the first part, which has the embedding and the head; empty without hops."""
    return next((hop.target for hop in hops if hop.shift.index == 0), "")


def members_of(leader: str, replicas: Sequence[Replica]) -> tuple[PeerRef, ...]:
    """Everybody else who loads and can be reached."""
    return tuple(r.peer for r in replicas if r.arriving and r.peer.address and r.replica_id != leader)


def order_of(hop: Hop, resolved: Resolved) -> tuple[int, ...]:
    """Segments in the order in which a target wants them; its chain's part of the model comes first.

    A single chain has nobody to complement: in order, every layer is executed while the next ones arrive. The head
    comes early all the same, so that whoever leads can do so as soon as a late member has the other layers; what that
    costs is that the last layer is not executed while the head arrives.
    """
    return orders(resolved.segment_bytes, hop.shift.of)[hop.shift.index]


def fed_late(
    hop: Hop, target: Replica, resolved: Resolved, replicas: Sequence[Replica], holders: Sequence[Holder]
) -> tuple[tuple[PeerRef | None, ...], tuple[int, ...]]:
    """Whom a replica that joins others reads from, and what it loads first: what they would have last.

    Its own disk, where no slower, is nobody else's. Who comes too late for that, or is fed by one of the others and has
    at most what that one has, loads layers in order, for when the leader is complete and shares its queue.
    """
    upstreams = (hop.upstream, *hop.alternatives)
    disks = [h.read_bytes_per_s for h in holders if h.kind is HolderKind.DISK and h.node == target.node]
    if None in upstreams and hop.kind is HolderKind.DISK and max(disks, default=0.0) >= hop.bytes_per_s:
        upstreams = (None, *(upstream for upstream in upstreams if upstream is not None))
    first = upstreams[0]
    behind = first is not None and all(h.peer.peer_id != first.peer_id for h in holders)
    others = [r for r in replicas if r.arriving and r.transfer is not None and r is not target]
    ways = max(len(others), 1)
    if behind or not complements(max((_done(r) for r in others), default=0) / resolved.nbytes, ways):
        return upstreams, (*range(1, resolved.layers + 1), 0, resolved.layers + 1)
    return upstreams, late_order(resolved.segment_bytes, ways)


def _done(replica: Replica) -> int:
    return replica.transfer.done_bytes if replica.transfer is not None else 0
