"""Who leads when nobody complete serves: the first of those that load, with the others as members. Pure.

Scale from zero, or the loss of every replica (design section 4, pipelines; digest B5, B7): the replicas that arrive
load different parts first, and one of them leads an execution pipeline until it is complete. The parts can only be
dealt among those that are there, so the decision's other replicas are waited for, but not for long.
"""

from __future__ import annotations

from collections.abc import Sequence

from layercast_operator.multicast import Hop
from layercast_operator.pipelines import orders
from layercast_operator.snapshot import PeerRef, Replica, ReplicaState
from layercast_operator.state import Resolved

# A replica that is asked for has its address when its memory is allocated: moments, unless its node is in trouble.
MEMBERS_WAIT_S = 2.0


def has_leader(replicas: Sequence[Replica]) -> bool:
    """Somebody leads already."""
    return any(r.state is ReplicaState.LEADING for r in replicas)


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

    A single chain has nobody to complement: in order, every layer is executed while the next ones arrive.
    """
    if hop.shift.of < 2:
        return tuple(range(len(resolved.segment_bytes)))
    return orders(resolved.segment_bytes, hop.shift.of)[hop.shift.index]


def _done(replica: Replica) -> int:
    return replica.transfer.done_bytes if replica.transfer is not None else 0
