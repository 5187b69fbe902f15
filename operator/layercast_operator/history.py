"""The part of status that outlives a restart: past scales and the times of conditions, to JSON and back.

Read back for display, and to notice that spec.replicas was changed meanwhile; a damaged file costs that, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from layercast_operator.estimators import Prediction, What
from layercast_operator.state import ConditionMemory, ModelMemory
from layercast_operator.timelines import ScaledReplica, ScaleRecord


def rfc3339(at: float) -> str:
    """Seconds since the epoch as Kubernetes writes times, in UTC with milliseconds."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def scale_json(record: ScaleRecord) -> dict[str, Any]:
    """One entry of `scales`; times are null when not reached."""
    return {
        "decidedAt": rfc3339(record.decided_at),
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
                "assignedAt": _time(r.assigned_at),
                "firstSegmentAt": _time(r.first_segment_at),
                "firstLayerAt": _time(r.first_layer_at),
                "firstTokenAt": _time(r.first_token_at),
                "completeAt": _time(r.complete_at),
                "bytesPerSecond": r.bytes_per_s,
                "predictions": [_prediction_json(prediction) for prediction in r.predictions],
            }
            for r in record.replicas
        ],
    }


def _prediction_json(prediction: Prediction) -> dict[str, Any]:
    return {
        "what": prediction.what.value,
        "way": prediction.way,
        "since": rfc3339(prediction.begun_at),
        "priorSeconds": prediction.prior_s,
        "predictedSeconds": prediction.predicted_s,
        "actualSeconds": prediction.actual_s,
    }


def _time(at: float | None) -> str | None:
    return None if at is None else rfc3339(at)


def _moment(text: str) -> float:
    """Raises ValueError or TypeError for what is no time."""
    return datetime.fromisoformat(text).timestamp()


def _seconds(text: str | None) -> float | None:
    return None if text is None else _moment(text)


def memory_of(status: Mapping[str, Any]) -> ModelMemory:
    """What an earlier process reported, as memory.

    Keeps the history of scales and the times of conditions over a restart, for display only, and which spec.replicas
    was acted on: a change that was made meanwhile must not be taken for an old wish. What cannot be read is left out.
    """
    scales: list[ScaleRecord] = []
    for entry in status.get("scales") or ():
        try:
            scales.append(_scale_of(entry))
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
    conditions: dict[str, ConditionMemory] = {}
    for entry in status.get("conditions") or ():
        try:
            since = _moment(entry["lastTransitionTime"])
            conditions[str(entry["type"])] = ConditionMemory(status=str(entry["status"]), since=since)
        except (KeyError, TypeError, ValueError):
            continue
    replicas = status.get("observedReplicas")
    told = replicas if isinstance(replicas, int) and not isinstance(replicas, bool) else None
    return ModelMemory(scales=tuple(scales), conditions=conditions, spec_replicas=told)


def _scale_of(entry: Mapping[str, Any]) -> ScaleRecord:
    replicas = tuple(
        ScaledReplica(
            replica_id=r["replicaId"],
            node=r.get("node", ""),
            source=r.get("source", ""),
            assigned_at=_seconds(r.get("assignedAt")),
            first_segment_at=_seconds(r.get("firstSegmentAt")),
            first_layer_at=_seconds(r.get("firstLayerAt")),
            first_token_at=_seconds(r.get("firstTokenAt")),
            complete_at=_seconds(r.get("completeAt")),
            bytes_per_s=r.get("bytesPerSecond", 0),
            predictions=tuple(_prediction_of(prediction) for prediction in r.get("predictions") or ()),
        )
        for r in entry.get("replicas") or ()
    )
    return ScaleRecord(
        decided_at=_moment(entry["decidedAt"]),
        replicas_from=entry["from"],
        replicas_to=entry["to"],
        reason=entry["reason"],
        rule=entry["rule"],
        policy=entry["policy"],
        replicas=replicas,
    )


def _prediction_of(entry: Mapping[str, Any]) -> Prediction:
    actual = entry.get("actualSeconds")
    return Prediction(
        what=What(entry["what"]),
        way=str(entry.get("way", "")),
        begun_at=_moment(entry["since"]),
        prior_s=float(entry["priorSeconds"]),
        predicted_s=float(entry["predictedSeconds"]),
        actual_s=None if actual is None else float(actual),
    )
