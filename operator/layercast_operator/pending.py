"""What was asked for and cannot be seen yet: it completes a snapshot, or every pass would ask again. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from layercast_operator.snapshot import (
    HostCopy,
    HostCopyState,
    Node,
    PeerRef,
    Replica,
    ReplicaState,
    Role,
    Snapshot,
    WorkerState,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingReplica:
    """A replica that was asked for and may not be visible yet."""

    replica_id: str
    model: str
    digest: str
    node: str
    device_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingRole:
    """A role that was given and may not be visible yet."""

    replica_id: str
    node: str
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingHostCopy:
    """A host copy that was asked for, or asked away, which may not be visible yet."""

    node: str
    digest: str
    total_bytes: int
    dropped: bool = False


def with_pending(
    snapshot: Snapshot,
    pending: Iterable[PendingReplica],
    copies: Iterable[PendingHostCopy] = (),
    roles: Iterable[PendingRole] = (),
) -> Snapshot:
    """The snapshot as it will look once what was asked for is there.

    Without this every pass between a question and its visible effect would ask again.
    """
    for copy in copies:
        nodes = tuple(
            _with_host_copy(node, copy) if node.name == copy.node else node for node in snapshot.nodes
        )
        snapshot = replace(snapshot, nodes=nodes)
    given = {role.replica_id: role.role for role in roles}
    if given:
        snapshot = replace(snapshot, nodes=tuple(_with_roles(node, given) for node in snapshot.nodes))
    wanted = {p.replica_id: p for p in pending}
    for replica in snapshot.replicas():
        wanted.pop(replica.replica_id, None)
    if not wanted:
        return snapshot
    nodes = tuple(
        _with_pending(node, [p for p in wanted.values() if p.node == node.name]) for node in snapshot.nodes
    )
    return replace(snapshot, nodes=nodes)


def _with_roles(node: Node, given: Mapping[str, Role]) -> Node:
    replicas = tuple(
        replace(r, role=given[r.replica_id]) if r.replica_id in given else r for r in node.replicas
    )
    return replace(node, replicas=replicas)


def _with_pending(node: Node, pending: list[PendingReplica]) -> Node:
    if not pending:
        return node
    by_device = {p.device_id: p.replica_id for p in pending}
    replicas = tuple(
        Replica(
            replica_id=p.replica_id,
            model=p.model,
            digest=p.digest,
            node=p.node,
            device_id=p.device_id,
            state=ReplicaState.LOADING,
            peer=PeerRef(peer_id=p.replica_id, address="", data_address=""),
            pending=True,
        )
        for p in pending
    )
    devices = tuple(
        replace(device, worker_state=WorkerState.ASSIGNED, replica_id=by_device[device.device_id])
        if device.device_id in by_device
        else device
        for device in node.devices
    )
    return replace(node, devices=devices, replicas=node.replicas + replicas)


def _with_host_copy(node: Node, pending: PendingHostCopy) -> Node:
    shown = node.host_copy(pending.digest)
    if pending.dropped:
        copies = tuple(
            replace(c, state=HostCopyState.DROPPING) if c is shown else c for c in node.host_copies
        )
        return replace(node, host_copies=copies)
    if shown is not None:
        return node
    copy = HostCopy(
        digest=pending.digest,
        state=HostCopyState.FILLING,
        total_bytes=pending.total_bytes,
        pending=True,
    )
    used = node.host_pool_used_bytes + pending.total_bytes
    return replace(node, host_copies=(*node.host_copies, copy), host_pool_used_bytes=used)
