"""What is told about a ModelService: conditions, replicas, the last decisions. Pure: values to a JSON mapping.

Conditions describe what is observed, never a transition, and each carries the generation of the specification
that it was judged against. There is no phase. Every condition is set from the first pass on; Unknown is an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from layercast_operator.explanation import explanation
from layercast_operator.feeding import holders_of
from layercast_operator.history import rfc3339, scale_json
from layercast_operator.lastcopies import disk_will_do
from layercast_operator.listing import host_copies, listed_replica
from layercast_operator.modelservice import ModelService
from layercast_operator.multicast import HolderKind
from layercast_operator.policy import Rule, counted
from layercast_operator.snapshot import (
    CheckpointState,
    Rdma,
    Replica,
    ReplicaState,
    Snapshot,
)
from layercast_operator.state import ConditionMemory, ModelMemory
from layercast_operator.turn import Turn

# How many replicas are listed: the rest is counted.
REPLICAS_LISTED_MAX = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One statement: is it so, why in one word for machines, why in words for people."""

    type: str
    status: str
    """True, False or Unknown."""
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The status of one ModelService and the memory that knows when its conditions changed."""

    status: Mapping[str, Any]
    memory: ModelMemory
    message: str
    """Why no replica serves, in words; empty when one does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counts:
    desired: int
    serving: int
    loading: int
    draining: int


def report(model: ModelService, snapshot: Snapshot, turn: Turn, *, endpoint: str) -> Report:
    """The status after a turn."""
    replicas = snapshot.replicas(model.name)
    memory = turn.memory
    counts = _counts(replicas, memory, turn)
    conditions = _conditions(model, snapshot, turn, counts)
    memory = replace(memory, conditions=_changed(conditions, memory.conditions, snapshot.at))
    scales = [scale_json(record) for record in memory.scales]
    sources = {r.replica_id: r.source for record in memory.scales for r in record.replicas}
    advice = turn.recommendation
    status: dict[str, Any] = {
        "name": model.name,
        "observedGeneration": model.generation,
        "observedReplicas": memory.spec_replicas,
        "ready": f"{counts.serving}/{counts.desired}",
        "counts": {
            "desired": counts.desired,
            "serving": counts.serving,
            "loading": counts.loading,
            "draining": counts.draining,
            "active": counts.serving + counts.loading,
        },
        "selector": selector(model.name),
        "conditions": _condition_list(conditions, memory.conditions, model.generation),
        "replicas": [listed_replica(r, sources) for r in replicas[:REPLICAS_LISTED_MAX]],
        "hostCopies": host_copies(snapshot, memory),
        "lastScale": scales[-1] if scales else None,
        "scales": scales,
        "recommendation": None
        if advice is None
        else {"replicas": advice.replicas, "rule": advice.rule.value, "reason": advice.reason},
        "latency": _latency(snapshot.ttft_p99_s.get(model.name)),
        "decision": explanation(model.scaling, turn.given, turn.decision, turn.division),
        "endpoint": endpoint,
    }
    message = "" if counts.serving else next(c.message for c in conditions if c.type == "Ready")
    return Report(status=status, memory=memory, message=message)


def selector(name: str) -> str:
    """The label selector of the scale subresource. Replicas are no pods: it names the model and finds none."""
    return f"layercast.dev/model={name}"


def _latency(ttft_p99_s: float | None) -> dict[str, Any] | None:
    return None if ttft_p99_s is None else {"ttftP99": f"{ttft_p99_s:.2g} s"}


def report_invalid(
    name: str, problem: str, *, before: Mapping[str, ConditionMemory], now: float
) -> tuple[dict[str, Any], dict[str, ConditionMemory]]:
    """The status of a file that never held a usable ModelService."""
    conditions = [Condition(type="Ready", status="False", reason="InvalidSpec", message=problem)]
    changed = _changed(conditions, before, now)
    status = {
        "name": name,
        "observedGeneration": 0,
        "observedReplicas": None,
        "ready": "0/0",
        "counts": {"desired": 0, "serving": 0, "loading": 0, "draining": 0, "active": 0},
        "selector": selector(name),
        "conditions": _condition_list(conditions, changed, 0),
        "replicas": [],
        "hostCopies": [],
        "lastScale": None,
        "scales": [],
        "recommendation": None,
        "latency": None,
        "decision": None,
        "endpoint": "",
    }
    return status, changed


def _counts(replicas: Sequence[Replica], memory: ModelMemory, turn: Turn) -> _Counts:
    leaving = {ReplicaState.DRAINING, ReplicaState.DRAINED}
    return _Counts(
        desired=memory.target if memory.target is not None else turn.decision.replicas,
        serving=sum(1 for r in replicas if r.state is ReplicaState.SERVING),
        loading=sum(1 for r in replicas if r.arriving),
        draining=sum(1 for r in replicas if r.state in leaving),
    )


def _conditions(model: ModelService, snapshot: Snapshot, turn: Turn, counts: _Counts) -> list[Condition]:
    resolved = _model_resolved(model, snapshot, turn)
    weights = _weights_loaded(model, snapshot, turn, counts)
    progressing = _progressing(model, turn, counts)
    return [
        _ready(model, counts, resolved, weights, turn),
        _available(model, counts, weights),
        progressing,
        weights,
        resolved,
        _metrics_available(model, snapshot),
        _gpu_available(turn, counts),
        _host_copy(snapshot, turn),
        _rdma_ready(model, snapshot),
        _scaling_limited(turn),
    ]


def _ready(
    model: ModelService, counts: _Counts, resolved: Condition, weights: Condition, turn: Turn
) -> Condition:
    if model.problem:
        return Condition(type="Ready", status="False", reason="InvalidSpec", message=model.problem)
    if resolved.status != "True":
        return replace(resolved, type="Ready")
    if counts.serving:
        verb = "serves" if counts.serving == 1 else "serve"
        message = f"{counts.serving} of {counted(counts.desired, 'replica')} {verb}"
        return Condition(type="Ready", status="True", reason="Serving", message=message)
    if counts.desired == 0:
        message = "scaled to zero; the first request starts a replica"
        return Condition(type="Ready", status="True", reason="ScaledToZero", message=message)
    message = turn.plan.blocked or weights.message
    return Condition(type="Ready", status="False", reason="NoReplicaServes", message=message)


def _available(model: ModelService, counts: _Counts, weights: Condition) -> Condition:
    scaling = model.scaling
    needed = min(scaling.replicas_min, counts.desired) if scaling is not None else min(1, counts.desired)
    message = f"{counts.serving} serve, at least {needed} must"
    if counts.serving >= needed:
        return Condition(type="Available", status="True", reason="MinimumServing", message=message)
    return Condition(
        type="Available", status="False", reason="TooFewServing", message=f"{message}; {weights.message}"
    )


def _progressing(model: ModelService, turn: Turn, counts: _Counts) -> Condition:
    if counts.serving == counts.desired and not counts.loading and not counts.draining:
        message = f"{counted(counts.desired, 'replica')}, as wanted"
        return Condition(type="Progressing", status="False", reason="Settled", message=message)
    errors = turn.memory.errors
    if turn.plan.blocked and not counts.loading and not counts.draining:
        last = f"; last error: {errors[-1].text}" if errors else ""
        return Condition(
            type="Progressing", status="False", reason="Blocked", message=f"{turn.plan.blocked}{last}"
        )
    message = (
        f"{counts.serving} serve, {counts.loading} load, {counts.draining} drain; {counts.desired} wanted"
    )
    if errors:
        message = f"{message}; last error: {errors[-1].text}"
    reason = "Loading" if counts.loading else "Draining" if counts.draining else "Scaling"
    return Condition(type="Progressing", status="True", reason=reason, message=message)


def _weights_loaded(model: ModelService, snapshot: Snapshot, turn: Turn, counts: _Counts) -> Condition:
    loading = [r for r in snapshot.replicas(model.name) if r.arriving]
    if not loading and counts.serving:
        message = f"all parameters are on {counted(counts.serving, 'replica')}"
        return Condition(type="WeightsLoaded", status="True", reason="Loaded", message=message)
    if not loading:
        message = turn.plan.blocked or "no replica has been started"
        return Condition(type="WeightsLoaded", status="False", reason="NoReplica", message=message)
    parts = [f"{r.replica_id} {_share(r)} %" for r in loading[:8]]
    message = f"parameters arrive: {', '.join(parts)}"
    return Condition(type="WeightsLoaded", status="False", reason="Loading", message=message)


def _share(replica: Replica) -> int:
    transfer = replica.transfer
    if transfer is None or not transfer.total_bytes:
        return 0
    return int(100 * transfer.done_bytes / transfer.total_bytes)


def _model_resolved(model: ModelService, snapshot: Snapshot, turn: Turn) -> Condition:
    refused = [e for e in turn.memory.errors if e.refused]
    if refused:
        return Condition(type="ModelResolved", status="False", reason="Refused", message=refused[-1].text)
    resolved = turn.memory.resolved
    if resolved is not None:
        message = (
            f"checkpoint {resolved.digest[:12]}, {resolved.nbytes / 1e6:.0f} MB, {resolved.layers} layers"
        )
        return Condition(type="ModelResolved", status="True", reason="Resolved", message=message)
    failed = ""
    for node in snapshot.present:
        for checkpoint in node.checkpoints:
            if checkpoint.key != model.model.key:
                continue
            if checkpoint.state is CheckpointState.FAILED:
                failed = f"{node.name}: {checkpoint.error}"
                continue
            total = checkpoint.total_bytes
            share = f" {100 * checkpoint.done_bytes // total} %" if total else ""
            message = f"{node.name}: {checkpoint.state.value.lower()}{share}"
            return Condition(type="ModelResolved", status="Unknown", reason="Preparing", message=message)
    if failed:
        return Condition(type="ModelResolved", status="False", reason="PrepareFailed", message=failed)
    message = turn.plan.blocked or "not looked at yet"
    return Condition(type="ModelResolved", status="Unknown", reason="Waiting", message=message)


def _metrics_available(model: ModelService, snapshot: Snapshot) -> Condition:
    demand = snapshot.demand.get(model.name)
    if demand is None:
        message = snapshot.demand_problem or "no gateway tells the demand; nothing is scaled down"
        return Condition(type="MetricsAvailable", status="Unknown", reason="NoMetrics", message=message)
    if not demand.complete:
        message = f"{demand.problem or 'a gateway is silent'}; nothing is scaled down"
        status = "Unknown" if demand.reason == "SeriesAwaited" else "False"
        return Condition(
            type="MetricsAvailable", status=status, reason=demand.reason or "Partial", message=message
        )
    message = "all gateways tell their demand"
    return Condition(type="MetricsAvailable", status="True", reason="Fresh", message=message)


def _gpu_available(turn: Turn, counts: _Counts) -> Condition:
    """Whether there are devices for what is wanted, those that are in use for it included."""
    room = turn.given.capacity
    if room is None:
        message = "not every node has answered yet"
        return Condition(type="GPUAvailable", status="Unknown", reason="NodesUnseen", message=message)
    message = f"{counted(counts.desired, 'replica')} wanted, {counted(room, 'device')} can hold one each"
    if room >= counts.desired:
        return Condition(type="GPUAvailable", status="True", reason="EnoughDevices", message=message)
    return Condition(type="GPUAvailable", status="False", reason="TooFewDevices", message=message)


def _host_copy(snapshot: Snapshot, turn: Turn) -> Condition:
    resolved = turn.memory.resolved
    if resolved is None:
        return Condition(
            type="HostCopyAvailable", status="Unknown", reason="NotResolved", message="no checkpoint yet"
        )
    places = {
        kind: sorted({h.node for h in holders_of(snapshot, resolved.digest) if h.kind is kind})
        for kind in HolderKind
    }
    if places[HolderKind.HOST]:
        message = f"in host memory of {', '.join(places[HolderKind.HOST])}"
        return Condition(type="HostCopyAvailable", status="True", reason="InHostMemory", message=message)
    filling = [
        f"{copy['node']} ({100 * copy['doneBytes'] // max(copy['totalBytes'], 1)} %)"
        for copy in host_copies(snapshot, turn.memory)
    ]
    last_resort = disk_will_do(turn.policy, turn.memory, resolved, snapshot)
    why = f"on its way to {', '.join(filling)}" if filling else last_resort or turn.memory.host_crowded_out
    told = [f"on {kind.value} of {', '.join(nodes)}" for kind, nodes in places.items() if nodes]
    where = "; ".join(told) if told else "nobody holds a complete copy"
    message = f"none in host memory: {why}; {where}" if why else f"none in host memory; {where}"
    only_disk = last_resort and told and not places[HolderKind.DEVICE]
    reason = (
        "Filling" if filling else "DiskIsLastResort" if only_disk else "ElsewhereOnly" if told else "NoCopy"
    )
    return Condition(type="HostCopyAvailable", status="False", reason=reason, message=message)


def _rdma_ready(model: ModelService, snapshot: Snapshot) -> Condition:
    """Whether this model's replicas read their peers by RDMA; no fault where nobody demanded it."""
    told: list[tuple[str, Rdma]] = [
        (f"{node.name} {device.device_id}", device.rdma)
        for node in snapshot.present
        for device in node.devices
        if device.rdma.reason
        and any(r.replica_id == device.replica_id for r in node.replicas if r.model == model.name)
    ]
    if not told:
        message = "no replica has told how it reads"
        return Condition(type="RDMAReady", status="Unknown", reason="NoReplica", message=message)
    without = [(place, rdma) for place, rdma in told if not rdma.used]
    if not without:
        message = f"{told[0][0]}: {told[0][1].reason}; {counted(len(told), 'device')} in all"
        return Condition(type="RDMAReady", status="True", reason="InUse", message=message)
    worst, rdma = next((pair for pair in without if pair[1].missed), without[0])
    message = f"{len(without)} of {counted(len(told), 'device')} without; {worst}: {rdma.reason}"
    reason = "Missed" if rdma.missed else "NotUsed"
    return Condition(type="RDMAReady", status="False", reason=reason, message=message)


def _scaling_limited(turn: Turn) -> Condition:
    if turn.decision.limited:
        reason = "TooFewDevices" if "devices" in turn.decision.limited else "OutOfBounds"
        return Condition(type="ScalingLimited", status="True", reason=reason, message=turn.decision.limited)
    if turn.decision.rule is Rule.UNKNOWN:
        return Condition(
            type="ScalingLimited", status="Unknown", reason="DemandUnknown", message=turn.decision.reason
        )
    return Condition(
        type="ScalingLimited", status="False", reason="WithinLimits", message=turn.decision.reason
    )


def _changed(
    conditions: Sequence[Condition], before: Mapping[str, ConditionMemory], now: float
) -> dict[str, ConditionMemory]:
    """Since when each condition has its status."""
    return {
        c.type: before[c.type]
        if c.type in before and before[c.type].status == c.status
        else ConditionMemory(status=c.status, since=now)
        for c in conditions
    }


def _condition_list(
    conditions: Sequence[Condition], since: Mapping[str, ConditionMemory], generation: int
) -> list[dict[str, Any]]:
    return [
        {
            "type": c.type,
            "status": c.status,
            "reason": c.reason,
            "message": c.message,
            "observedGeneration": generation,
            "lastTransitionTime": rfc3339(since[c.type].since),
        }
        for c in conditions
    ]
