"""Which Kubernetes events a new status deserves: two statuses in, events out. Pure, with its limits.

Events are for people who look at one object: what was decided, what failed, what came back. One change gives one
event; an object that changes too often is cut off for a while instead of filling the event store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

BURST = 10
ONE_EVERY_S = 15.0

NORMAL, WARNING = "Normal", "Warning"

# Condition, status that is bad, reason of the event when it becomes so, and when it is well again.
_CONDITIONS = (
    ("Ready", "False", "NotReady", "Ready"),
    ("ModelResolved", "False", "ModelNotResolved", "ModelResolved"),
    ("MetricsAvailable", "False", "MetricsUnavailable", "MetricsAvailable"),
    ("ScalingLimited", "True", "ScalingLimited", "ScalingUnlimited"),
    ("Available", "False", "Unavailable", "Available"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """One event to post."""

    type: str
    reason: str
    message: str


def happenings(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[Happening]:
    """What happened between two statuses; `before` None is the first of all."""
    before = before or {}
    return [*_scaled(before, after), *_conditions(before, after), *_failed(before, after)]


def _scaled(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Happening]:
    known = {scale["decidedAt"] for scale in before.get("scales") or ()}
    for scale in after.get("scales") or ():
        if scale["decidedAt"] in known:
            continue
        old, new = scale["from"], scale["to"]
        message = f"{old} to {new} replicas (rule {scale['rule']}): {scale['reason']}"
        if scale["rule"] == "repair":
            yield Happening(type=WARNING, reason="ReplicaReplaced", message=scale["reason"])
        elif new == 0:
            yield Happening(type=NORMAL, reason="ScaledToZero", message=message)
        else:
            reason = "ScaledUp" if new > old else "ScaledDown"
            yield Happening(type=NORMAL, reason=reason, message=message)


def _conditions(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Happening]:
    old = {c["type"]: c for c in before.get("conditions") or ()}
    new = {c["type"]: c for c in after.get("conditions") or ()}
    for name, bad, worse, better in _CONDITIONS:
        condition = new.get(name)
        if condition is None:
            continue
        was, now = old.get(name, {}).get("status", "Unknown"), condition["status"]
        message = f"{condition['reason']}: {condition['message']}"
        if now == bad and was != bad:
            yield Happening(type=WARNING, reason=worse, message=message)
        elif was == bad and now not in {bad, "Unknown"}:
            yield Happening(type=NORMAL, reason=better, message=message)


def _failed(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Happening]:
    known = {r["replicaId"] for r in before.get("replicas") or () if r["state"] == "Failed"}
    for replica in after.get("replicas") or ():
        if replica["state"] == "Failed" and replica["replicaId"] not in known:
            message = f"{replica['replicaId']} on {replica['node']}: {replica['error'] or 'no reason given'}"
            yield Happening(type=WARNING, reason="ReplicaFailed", message=message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """How many events an object may still have."""

    left: float = BURST
    at: float = 0.0


def spend(allowance: Allowance, *, now: float) -> tuple[bool, Allowance]:
    """Whether one more may be posted now, and what is left then."""
    left = min(BURST, allowance.left + max(now - allowance.at, 0.0) / ONE_EVERY_S)
    if left < 1:
        return False, Allowance(left=left, at=now)
    return True, Allowance(left=left - 1, at=now)
