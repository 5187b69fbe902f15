"""From whom a host copy is filled, and whether it should have the network now. Pure.

A host copy is a target of the ordinary transfer on the agent instead of a worker, so its sources are chosen by the
multicast planner like those of a replica. What differs is its patience: a copy that nobody waits for rests while the
node that would send to it sends to replicas.
"""

from __future__ import annotations

from collections.abc import Sequence

from layercast_operator.actions import StartHostCopy
from layercast_operator.feeding import holders_of
from layercast_operator.multicast import Holder, HolderKind, Target, plan_multicast
from layercast_operator.placement import nic_bytes_per_s
from layercast_operator.snapshot import Node, NodeHealth, PeerRef, ReplicaState, Snapshot

Upstreams = tuple[PeerRef | None, ...]
"""Best first; None is the node's own disk."""


def upstreams_for(
    snapshot: Snapshot, digest: str, nbytes: int, node: Node, *, own_disk_only: bool
) -> tuple[Upstreams, str]:
    """Whom a copy on `node` reads from and why: the cheapest holders. Nobody when none can be read."""
    holders = [h for h in holders_of(snapshot, digest) if not _is_own(h, node, HolderKind.HOST)]
    if own_disk_only and any(_is_own(h, node, HolderKind.DISK) for h in holders):
        return (None,), "from its own disk"
    me = PeerRef(peer_id=f"memory of {node.name}", address="", data_address="")
    target = Target(peer=me, node=node.name, leaf=node.leaf, nic_bytes_per_s=nic_bytes_per_s(node))
    plan = plan_multicast(holders=holders, targets=[target], checkpoint_bytes=nbytes, serving=False)
    if not plan.hops:
        return (), "nobody can be read"
    hop = plan.hops[0]
    return (hop.upstream, *hop.alternatives), hop.why


def start_command(
    snapshot: Snapshot,
    *,
    model: str,
    digest: str,
    nbytes: int,
    node: Node,
    upstreams: Upstreams,
    why: str,
) -> StartHostCopy:
    """The command, of a generation above that of the copy that is there."""
    holders = [h for h in holders_of(snapshot, digest) if not _is_own(h, node, HolderKind.HOST)]
    own = any(_is_own(h, node, HolderKind.DISK) for h in holders)
    kinds = list(HolderKind)
    best = min(holders, key=lambda h: (kinds.index(h.kind), h.leaving, h.peer.peer_id), default=None)
    copy = node.host_copy(digest)
    before = copy.transfer.generation if copy is not None and copy.transfer is not None else 0
    return StartHostCopy(
        node=node.name,
        model=model,
        digest=digest,
        generation=max(int(snapshot.at * 1000), before + 1),
        upstreams=upstreams,
        manifest_peer=None if own or best is None else best.peer,
        nbytes=nbytes,
        why=why,
    )


def feeders(snapshot: Snapshot) -> frozenset[str]:
    """Nodes that send parameters to replicas of other nodes now, or will in a moment."""
    found: set[str] = set()
    for replica in snapshot.replicas():
        if not replica.arriving:
            continue
        if replica.transfer is None:
            found |= {h.node for h in holders_of(snapshot, replica.digest) if h.kind is HolderKind.DEVICE}
        else:
            found |= {node_of(replica.transfer.upstream, snapshot)} - {replica.node, ""}
    return frozenset(found)


def node_of(peer_id: str, snapshot: Snapshot) -> str:
    """The node of a replica or an agent; empty when it is neither."""
    if snapshot.node(peer_id) is not None:
        return peer_id
    return next((r.node for r in snapshot.replicas() if r.replica_id == peer_id), "")


def is_gone(upstream: str, snapshot: Snapshot) -> bool:
    """Whether the upstream of a copy is known not to exist any more; a node's own disk has another name."""
    node = snapshot.node(upstream)
    if node is not None:
        return node.health is NodeHealth.LOST
    found = [r for r in snapshot.replicas() if r.replica_id == upstream]
    return upstream != "disk" and all(r.state is ReplicaState.FAILED for r in found)


def sends_elsewhere(upstreams: Sequence[PeerRef | None], busy: frozenset[str], snapshot: Snapshot) -> bool:
    """Whether the node that would send to a copy is among those that feed replicas."""
    first = upstreams[0] if upstreams else None
    return first is not None and node_of(first.peer_id, snapshot) in busy


def _is_own(holder: Holder, node: Node, kind: HolderKind) -> bool:
    return holder.node == node.name and holder.kind is kind
