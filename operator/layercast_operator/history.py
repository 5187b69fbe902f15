"""The part of status that outlives a restart: past scales and the times of conditions, to JSON and back.

Read back for display only: nothing is ever decided from it, so a damaged file costs history and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from layercast_operator.state import ConditionMemory, ModelMemory, ScaledReplica, ScaleRecord


def rfc3339(at: float) -> str:
    """Seconds since the epoch as Kubernetes writes times, in UTC with milliseconds."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def scale_json(record: ScaleRecord) -> dict[str, Any]:
    """One entry of `scales`; times in seconds since the epoch, null when not reached."""
    return {
        "decidedAt": record.decided_at,
        "from": record.replicas_from,
        "to": record.replicas_to,
        "reason": record.reason,
        "rule": record.rule,
        "policy": record.policy,
        "replicas": [
            {
                "replicaId": r.replica_id,
                "node": r.node,
                "source": r.source,
                "assignedAt": r.assigned_at,
                "firstSegmentAt": r.first_segment_at,
                "firstLayerAt": r.first_layer_at,
                "firstTokenAt": r.first_token_at,
                "completeAt": r.complete_at,
                "bytesPerSecond": r.bytes_per_s,
            }
            for r in record.replicas
        ],
    }


def memory_of(status: Mapping[str, Any]) -> ModelMemory:
    """What an earlier process reported, as memory: for display only, nothing is decided from it.

    Keeps the history of scales and the times of conditions over a restart. What cannot be read is left out.
    """
    scales: list[ScaleRecord] = []
    for entry in status.get("scales") or ():
        try:
            scales.append(_scale_of(entry))
        except (KeyError, TypeError, AttributeError):
            continue
    conditions: dict[str, ConditionMemory] = {}
    for entry in status.get("conditions") or ():
        try:
            since = datetime.fromisoformat(entry["lastTransitionTime"]).timestamp()
            conditions[str(entry["type"])] = ConditionMemory(status=str(entry["status"]), since=since)
        except (KeyError, TypeError, ValueError):
            continue
    return ModelMemory(scales=tuple(scales), conditions=conditions)


def _scale_of(entry: Mapping[str, Any]) -> ScaleRecord:
    replicas = tuple(
        ScaledReplica(
            replica_id=r["replicaId"],
            node=r["node"],
            source=r["source"],
            assigned_at=r["assignedAt"],
            first_segment_at=r["firstSegmentAt"],
            first_layer_at=r["firstLayerAt"],
            first_token_at=r["firstTokenAt"],
            complete_at=r["completeAt"],
            bytes_per_s=r["bytesPerSecond"],
        )
        for r in entry["replicas"]
    )
    return ScaleRecord(
        decided_at=entry["decidedAt"],
        replicas_from=entry["from"],
        replicas_to=entry["to"],
        reason=entry["reason"],
        rule=entry["rule"],
        policy=entry["policy"],
        replicas=replicas,
    )
