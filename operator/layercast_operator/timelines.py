"""What came of a decision: each replica that it brought, when what happened to it, and what was predicted. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from layercast_operator.estimators import Prediction, What
from layercast_operator.snapshot import Replica


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledReplica:
    """One replica that a decision brought, and when what happened to it."""

    replica_id: str
    node: str
    source: str = ""
    assigned_at: float | None = None
    first_segment_at: float | None = None
    first_layer_at: float | None = None
    first_token_at: float | None = None
    complete_at: float | None = None
    bytes_per_s: int = 0
    predictions: tuple[Prediction, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRecord:
    """One change of the number of replicas, with its reason and what came of it."""

    decided_at: float
    replicas_from: int
    replicas_to: int
    reason: str
    rule: str
    policy: str
    replicas: tuple[ScaledReplica, ...] = ()

    def replica(self, replica_id: str) -> ScaledReplica | None:
        """The replica of that name, when this decision brought it."""
        return next((r for r in self.replicas if r.replica_id == replica_id), None)


def refreshed(record: ScaleRecord, replicas: Iterable[Replica]) -> ScaleRecord:
    """The record with what is seen now."""
    by_id = {replica.replica_id: replica for replica in replicas if not replica.pending}
    scaled = tuple(
        _refreshed_replica(entry, by_id[entry.replica_id]) if entry.replica_id in by_id else entry
        for entry in record.replicas
    )
    return record if scaled == record.replicas else replace(record, replicas=scaled)


def _refreshed_replica(entry: ScaledReplica, replica: Replica) -> ScaledReplica:
    seen = replica.timeline
    transfer = replica.transfer
    ends = {What.FIRST_SEGMENT: seen.first_segment_at}
    return replace(
        entry,
        source=(transfer.upstream if transfer is not None else "") or entry.source,
        assigned_at=seen.assigned_at or entry.assigned_at,
        first_segment_at=seen.first_segment_at or entry.first_segment_at,
        first_layer_at=seen.first_layer_at or entry.first_layer_at,
        first_token_at=seen.first_token_at or entry.first_token_at,
        complete_at=seen.complete_at or entry.complete_at,
        bytes_per_s=(transfer.bytes_per_s if transfer is not None else 0) or entry.bytes_per_s,
        predictions=tuple(p.ended(ends.get(p.what, seen.complete_at)) for p in entry.predictions),
    )


def with_replica(record: ScaleRecord, changed: ScaledReplica) -> ScaleRecord:
    """The record with one of its replicas changed."""
    replicas = tuple(changed if r.replica_id == changed.replica_id else r for r in record.replicas)
    return replace(record, replicas=replicas)


def came_true(before: Iterable[ScaleRecord], after: Iterable[ScaleRecord]) -> tuple[Prediction, ...]:
    """Predictions that are known to have ended now, and were not before."""

    def ended(records: Iterable[ScaleRecord]) -> dict[tuple[str, What], Prediction]:
        return {
            (replica.replica_id, prediction.what): prediction
            for record in records
            for replica in record.replicas
            for prediction in replica.predictions
            if prediction.actual_s is not None
        }

    known = ended(before)
    return tuple(prediction for key, prediction in ended(after).items() if key not in known)
