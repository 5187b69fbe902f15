"""How a status lists replicas and copies in host memory: one JSON mapping each. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layercast_operator.snapshot import Replica, Snapshot
from layercast_operator.state import ModelMemory


def host_copies(snapshot: Snapshot, memory: ModelMemory) -> list[dict[str, Any]]:
    """The copies of a model's checkpoint in host memory, one entry a node."""
    digest = memory.resolved.digest if memory.resolved is not None else ""
    listed = []
    for node in snapshot.present:
        copy = node.host_copy(digest)
        if copy is None:
            continue
        transfer = copy.transfer
        listed.append(
            {
                "node": node.name,
                "state": copy.state.value,
                "source": transfer.upstream if transfer is not None else "",
                "bytesPerSecond": transfer.bytes_per_s if transfer is not None else 0,
                "doneBytes": transfer.done_bytes if transfer is not None else 0,
                "totalBytes": copy.total_bytes,
                "followers": copy.followers,
                "error": copy.error,
            }
        )
    return listed


def listed_replica(replica: Replica, sources: Mapping[str, str]) -> dict[str, Any]:
    """One entry of `replicas`. A replica that is complete has no upstream any more: then the one it had."""
    transfer = replica.transfer
    upstream = transfer.upstream if transfer is not None else ""
    return {
        "replicaId": replica.replica_id,
        "node": replica.node,
        "device": replica.device_id,
        "role": replica.role.value,
        "state": replica.state.value,
        "layersResident": replica.layers_resident,
        "layersTotal": replica.layers_total,
        "source": upstream or sources.get(replica.replica_id, ""),
        "bytesPerSecond": transfer.bytes_per_s if transfer is not None else 0,
        "doneBytes": transfer.done_bytes if transfer is not None else 0,
        "totalBytes": transfer.total_bytes if transfer is not None else 0,
        "requestsWaiting": replica.requests_waiting,
        "requestsRunning": replica.requests_running,
        "prefillTokensPerSecond": replica.prefill_tokens_per_s,
        "handoffsGiven": replica.handoffs_given,
        "handoffsTaken": replica.handoffs_taken,
        "requestsMoved": replica.requests_moved,
        "engine": replica.engine,
        "error": replica.error,
    }
