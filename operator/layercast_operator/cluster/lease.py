"""Who may act: one operator at a time, by a Lease that it renews. Pure: records in, the next step out.

The rules are client-go's. A holder that is not sure of its Lease stops acting *before* others may take it: it counts
`RENEW_WITHIN_S` from the moment it *sent* the last renewal that succeeded, others wait `DURATION_S` from the moment
they *saw* the record change last, each by its own clock that never steps back. Clocks of different machines are
never compared. A holder that ends gives the Lease up, and then nobody waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any

DURATION_S = 10.0
RENEW_WITHIN_S = 7.0
RENEW_EVERY_S = 2.0
CALL_DEADLINE_S = 3.0


class Step(Enum):
    """What to do about the Lease now."""

    CREATE = "create"
    TAKE = "take"
    RENEW = "renew"
    WAIT = "wait"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The record as it was seen last, and since when it is unchanged (seconds of our own clock)."""

    holder: str
    renewed: str
    version: str
    transitions: int
    since: float


def seen(lease: Mapping[str, Any], before: Seen | None, *, now: float) -> Seen:
    """Take in what the API server told."""
    spec = lease.get("spec") or {}
    holder, renewed = str(spec.get("holderIdentity") or ""), str(spec.get("renewTime") or "")
    same = before is not None and (before.holder, before.renewed) == (holder, renewed)
    return Seen(
        holder=holder,
        renewed=renewed,
        version=str((lease.get("metadata") or {}).get("resourceVersion") or ""),
        transitions=int(spec.get("leaseTransitions") or 0),
        since=before.since if same and before is not None else now,
    )


def next_step(record: Seen | None, *, me: str, now: float) -> Step:
    """What `me` does now; None when there is no Lease yet."""
    if record is None:
        return Step.CREATE
    if record.holder == me:
        return Step.RENEW
    if not record.holder or now - record.since >= DURATION_S:
        return Step.TAKE
    return Step.WAIT


def may_act(renewed_at: float | None, *, now: float) -> bool:
    """Whether the last renewal, sent at `renewed_at`, still keeps everybody else from acting."""
    return renewed_at is not None and now - renewed_at < RENEW_WITHIN_S


def lease_body(
    record: Seen | None, *, me: str, name: str, namespace: str, wall: float, release: bool = False
) -> dict[str, Any]:
    """The Lease to write: with the version that was seen, so that of two writers one fails."""
    stamp = datetime.fromtimestamp(wall, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    holder = "" if release else me
    taken = record is None or record.holder != me
    spec: dict[str, Any] = {
        "holderIdentity": holder,
        "leaseDurationSeconds": int(DURATION_S),
        "renewTime": stamp,
        "leaseTransitions": 0 if record is None else record.transitions + int(taken),
    }
    if taken:
        spec["acquireTime"] = stamp
    metadata: dict[str, Any] = {"name": name, "namespace": namespace}
    if record is not None:
        metadata["resourceVersion"] = record.version
    return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
