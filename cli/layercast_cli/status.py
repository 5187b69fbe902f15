"""The operator's status files as values, and the few words that every view of them shares.

A status file is written by another process, maybe of another version: what is missing here becomes empty or
None and never an exception."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

# States of a replica that is on its way, as the operator names them in any case.
ARRIVING_STATES = ("loading", "live", "leading")


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One condition of a ModelService; `since` in unix seconds."""

    type: str
    status: str
    reason: str
    message: str
    since: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """One replica as the operator last saw it."""

    replica_id: str
    node: str
    device: str
    state: str
    layers_resident: int
    layers_total: int
    source: str
    bytes_per_s: float
    done_bytes: int
    total_bytes: int
    requests_waiting: int
    requests_running: int
    prefill_tokens_per_s: float
    handoffs_given: int
    handoffs_taken: int
    engine: str
    error: str
    role: str = ""
    """Prefill, Decode or Both; empty where the operator does not tell."""
    requests_moved: int = 0

    @property
    def arriving(self) -> bool:
        """Its parameters are on their way. The head comes after the last layer: layers alone do not tell."""
        return self.state.lower().endswith(ARRIVING_STATES)

    @property
    def share(self) -> int:
        """Per cent of its parameters that are there; 100 only when all are."""
        return 100 * self.done_bytes // self.total_bytes if self.total_bytes else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCopy:
    """One copy of the checkpoint in the host memory of a node."""

    node: str
    state: str
    source: str
    bytes_per_s: float
    done_bytes: int
    total_bytes: int
    error: str

    @property
    def complete(self) -> bool:
        """All of it can be read."""
        return self.state.lower() == "complete"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """How long something was expected to take, and what it took; None while it lasts."""

    what: str
    predicted_s: float
    actual_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleReplica:
    """One new replica of a scale-up; times in unix seconds, None when not reached."""

    replica_id: str
    node: str
    source: str
    assigned_at: float | None
    first_segment_at: float | None
    first_layer_at: float | None
    first_token_at: float | None
    complete_at: float | None
    bytes_per_s: float
    predictions: tuple[Prediction, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """One decision that changed the number of replicas, and what came of it."""

    decided_at: float
    replicas_from: int
    replicas_to: int
    reason: str
    rule: str
    policy: str
    replicas: tuple[ScaleReplica, ...] = ()

    @property
    def up(self) -> bool:
        """Whether replicas were added."""
        return self.replicas_to > self.replicas_from


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the policy says now: the outcome, the numbers, and what other outcomes would mean."""

    replicas: int
    rule: str
    reason: str
    numbers: Mapping[str, float]
    alternatives: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceStatus:
    """What the operator last wrote about one ModelService; `raw` is the file's content."""

    name: str
    desired: int = 0
    serving: int = 0
    loading: int = 0
    draining: int = 0
    conditions: tuple[Condition, ...] = ()
    replicas: tuple[ReplicaStatus, ...] = ()
    host_copies: tuple[HostCopy, ...] = ()
    last_scale: Scale | None = None
    scales: tuple[Scale, ...] = ()
    recommendation: str = ""
    endpoint: str = ""
    decision: Decision | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)

    def condition(self, name: str) -> Condition | None:
        """The condition of that type."""
        return next((each for each in self.conditions if each.type == name), None)


def read_status(folder: Path, name: str) -> ServiceStatus | None:
    """The status of `name` in a state folder's `status/`; None when there is none yet."""
    try:
        content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return parse_status(name, content) if isinstance(content, dict) else None


def parse_status(name: str, raw: Mapping[str, Any]) -> ServiceStatus:
    """The values of one status file."""
    counts = _mapping(raw.get("counts"))
    last = raw.get("lastScale")
    scales = tuple(parse_scale(each) for each in _sequence(raw.get("scales")))
    recommendation = raw.get("recommendation")
    return ServiceStatus(
        name=str(raw.get("name") or name),
        desired=_int(counts, "desired"),
        serving=_int(counts, "serving"),
        loading=_int(counts, "loading"),
        draining=_int(counts, "draining"),
        conditions=tuple(_condition(each) for each in _sequence(raw.get("conditions"))),
        replicas=tuple(_replica(each) for each in _sequence(raw.get("replicas"))),
        host_copies=tuple(_host_copy(each) for each in _sequence(raw.get("hostCopies"))),
        last_scale=parse_scale(last) if isinstance(last, dict) and last else None,
        scales=scales,
        recommendation="" if recommendation is None else _words(recommendation),
        endpoint=str(raw.get("endpoint") or ""),
        decision=_decision(_mapping(raw.get("decision"))),
        raw=raw,
    )


def _decision(raw: Mapping[str, Any]) -> Decision | None:
    if not raw:
        return None
    told = raw.get("alternatives")
    numbers = _mapping(raw.get("numbers"))
    return Decision(
        replicas=_int(raw, "replicas"),
        rule=str(raw.get("rule") or ""),
        reason=str(raw.get("reason") or ""),
        numbers={name: _float(numbers, name) for name in numbers},
        alternatives=tuple(str(each) for each in told) if isinstance(told, list) else (),
    )


def parse_scale(raw: Mapping[str, Any]) -> Scale:
    """One entry of `scales`."""
    return Scale(
        decided_at=time_of(raw.get("decidedAt")) or 0.0,
        replicas_from=_int(raw, "from"),
        replicas_to=_int(raw, "to"),
        reason=str(raw.get("reason") or ""),
        rule=str(raw.get("rule") or ""),
        policy=str(raw.get("policy") or ""),
        replicas=tuple(_scale_replica(each) for each in _sequence(raw.get("replicas"))),
    )


def time_of(value: object) -> float | None:
    """Unix seconds of a number or an RFC 3339 text; None for absent, zero and unreadable ones."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) or None
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).timestamp()
        except ValueError:
            return None
    return None


def _scale_replica(raw: Mapping[str, Any]) -> ScaleReplica:
    return ScaleReplica(
        replica_id=str(raw.get("replicaId") or ""),
        node=str(raw.get("node") or ""),
        source=str(raw.get("source") or ""),
        assigned_at=time_of(raw.get("assignedAt")),
        first_segment_at=time_of(raw.get("firstSegmentAt")),
        first_layer_at=time_of(raw.get("firstLayerAt")),
        first_token_at=time_of(raw.get("firstTokenAt")),
        complete_at=time_of(raw.get("completeAt")),
        bytes_per_s=_float(raw, "bytesPerSecond"),
        predictions=tuple(_prediction(each) for each in _sequence(raw.get("predictions"))),
    )


def _prediction(raw: Mapping[str, Any]) -> Prediction:
    return Prediction(
        what=str(raw.get("what") or ""),
        predicted_s=_float(raw, "predictedSeconds"),
        actual_s=_float(raw, "actualSeconds") or None,
    )


def _replica(raw: Mapping[str, Any]) -> ReplicaStatus:
    return ReplicaStatus(
        replica_id=str(raw.get("replicaId") or ""),
        node=str(raw.get("node") or ""),
        device=str(raw.get("device") or ""),
        state=str(raw.get("state") or ""),
        layers_resident=_int(raw, "layersResident"),
        layers_total=_int(raw, "layersTotal"),
        source=str(raw.get("source") or ""),
        bytes_per_s=_float(raw, "bytesPerSecond"),
        done_bytes=_int(raw, "doneBytes"),
        total_bytes=_int(raw, "totalBytes"),
        requests_waiting=_int(raw, "requestsWaiting"),
        requests_running=_int(raw, "requestsRunning"),
        prefill_tokens_per_s=_float(raw, "prefillTokensPerSecond"),
        handoffs_given=_int(raw, "handoffsGiven"),
        handoffs_taken=_int(raw, "handoffsTaken"),
        engine=str(raw.get("engine") or ""),
        error=str(raw.get("error") or ""),
        role=str(raw.get("role") or ""),
        requests_moved=_int(raw, "requestsMoved"),
    )


def _host_copy(raw: Mapping[str, Any]) -> HostCopy:
    return HostCopy(
        node=str(raw.get("node") or ""),
        state=str(raw.get("state") or ""),
        source=str(raw.get("source") or ""),
        bytes_per_s=_float(raw, "bytesPerSecond"),
        done_bytes=_int(raw, "doneBytes"),
        total_bytes=_int(raw, "totalBytes"),
        error=str(raw.get("error") or ""),
    )


def _condition(raw: Mapping[str, Any]) -> Condition:
    return Condition(
        type=str(raw.get("type") or ""),
        status=str(raw.get("status") or ""),
        reason=str(raw.get("reason") or ""),
        message=str(raw.get("message") or ""),
        since=time_of(raw.get("lastTransitionTime")),
    )


def _words(value: object) -> str:
    """A recommendation as a sentence."""
    if not isinstance(value, dict):
        return str(value)
    rule = f" (rule {value['rule']})" if value.get("rule") else ""
    return f"{value.get('replicas', '?')} replicas: {value.get('reason') or 'no reason given'}{rule}"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _sequence(value: object) -> list[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _int(raw: Mapping[str, Any], key: str) -> int:
    return int(_float(raw, key))


def _float(raw: Mapping[str, Any], key: str) -> float:
    value = raw.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0
