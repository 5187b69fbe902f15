"""`layercast explain`: why a ModelService is as it is, in sentences with the numbers that decided."""

from __future__ import annotations

import time

from layercast_cli import words
from layercast_cli.errors import CliError
from layercast_cli.modelfile import read_service
from layercast_cli.state import StateDir
from layercast_cli.status import (
    Condition,
    Decision,
    HostCopy,
    ReplicaStatus,
    Scale,
    ScaleReplica,
    ServiceStatus,
    read_status,
)


def explain(state: StateDir, *, name: str) -> str:
    """The text of `layercast explain`. CliError for an unknown name or one without a status."""
    read_service(state.services, name)
    status = read_status(state.status, name)
    if status is None:
        raise CliError(f"the operator has not reported on {name} yet; its log is in {state.logs}")
    return explanation(status, now=time.time())


def explanation(status: ServiceStatus, *, now: float) -> str:
    """All that the status file says, for a reader; `now` in unix seconds."""
    parts = [headline(status), *_conditions(status, now)]
    parts += _now(status.decision)
    parts += _decision(status.last_scale, now)
    if status.recommendation:
        parts += ["", f"Recommendation: {status.recommendation}"]
    parts += _replicas(status)
    parts += _host_copies(status)
    return "\n".join(parts)


def headline(status: ServiceStatus) -> str:
    """`smollm2: 2 of 3 replicas serve, 1 is loading.`"""
    parts = [f"{status.serving} of {words.count(status.desired, 'wanted replica')} {_serve(status.serving)}"]
    if status.loading:
        parts.append(f"{status.loading} {_be(status.loading)} loading")
    if status.draining:
        parts.append(f"{status.draining} {_be(status.draining)} draining")
    return f"{status.name}: {', '.join(parts)}."


def _conditions(status: ServiceStatus, now: float) -> list[str]:
    if not status.conditions:
        return []
    rows = [_condition(each, now) for each in status.conditions]
    return ["", "Conditions", _indent(words.table(["TYPE", "STATUS", "FOR", "REASON", "MESSAGE"], rows))]


def _condition(condition: Condition, now: float) -> list[str]:
    since = now - condition.since if condition.since is not None else None
    return [condition.type, condition.status, words.age(since), condition.reason, condition.message]


def _now(decision: Decision | None) -> list[str]:
    """The numbers that decide at this moment, and what would be otherwise."""
    if decision is None:
        return []
    lines = ["", f"Now: {words.count(decision.replicas, 'replica')}, rule {decision.rule}: {decision.reason}"]
    numbers = [f"{name} {value:g}" for name, value in sorted(decision.numbers.items())]
    lines += [f"  Numbers: {', '.join(numbers)}"] if numbers else []
    return lines + [f"  Or {each}" for each in decision.alternatives]


def _decision(scale: Scale | None, now: float) -> list[str]:
    if scale is None:
        return ["", "The number of replicas has not been changed yet."]
    ago = words.age(now - scale.decided_at)
    policy = f", policy {scale.policy}" if scale.policy else ""
    change = f"{scale.replicas_from} → {scale.replicas_to}"
    lines = ["", f"Last decision: {change} replicas at {words.clock(scale.decided_at)}, {ago} ago{policy}"]
    lines += [f"  Why:  {scale.reason}"] if scale.reason else []
    lines += [f"  Rule: {scale.rule}"] if scale.rule else []
    for each in scale.replicas:
        lines.append(f"  {story(each, decided_at=scale.decided_at)}")
        lines += [f"    Expected: {foretold(each)}"] if each.predictions else []
    return lines


def story(replica: ScaleReplica, *, decided_at: float) -> str:
    """What became of one new replica, as one sentence; times count from the decision."""
    steps = (
        ("assigned", replica.assigned_at),
        ("first segment there", replica.first_segment_at),
        ("first layer executed", replica.first_layer_at),
        ("first token", replica.first_token_at),
        ("complete", replica.complete_at),
    )
    reached = [f"{step} after {words.duration(at - decided_at)}" for step, at in steps if at is not None]
    source = f" from {replica.source}" if replica.source else ""
    rate = f" at {words.gigabytes_per_s(replica.bytes_per_s)}" if replica.bytes_per_s else ""
    return f"{replica.replica_id} on {replica.node}{source}: {', '.join(reached) or 'nothing yet'}{rate}."


def foretold(replica: ScaleReplica) -> str:
    """`load 2.4 s, took 2.5 s; transfer 1.9 s, under way`."""
    return "; ".join(
        f"{each.what} {words.duration(each.predicted_s)}, "
        + ("under way" if each.actual_s is None else f"took {words.duration(each.actual_s)}")
        for each in replica.predictions
    )


def _replicas(status: ServiceStatus) -> list[str]:
    if not status.replicas:
        return []
    return ["", "Replicas", *(f"  {_replica(each)}" for each in status.replicas)]


def _host_copies(status: ServiceStatus) -> list[str]:
    if not status.host_copies:
        return []
    return ["", "Copies in host memory", *(f"  {host_copy(each)}" for each in status.host_copies)]


def host_copy(copy: HostCopy) -> str:
    """`node-1: complete, 134 MB`, or how far it is and from whom."""
    size = f"{copy.total_bytes / 1e6:.0f} MB"
    if copy.error:
        return f"{copy.node}: {copy.state.lower()}, {size}, error: {copy.error}"
    if copy.complete:
        return f"{copy.node}: complete, {size}"
    share = 100 * copy.done_bytes // max(copy.total_bytes, 1)
    source = (
        f" from {copy.source} at {words.gigabytes_per_s(copy.bytes_per_s)}" if copy.source else ", at rest"
    )
    return f"{copy.node}: {copy.state.lower()}, {share} % of {size}{source}"


def _replica(replica: ReplicaStatus) -> str:
    layers = f"{replica.layers_resident} of {replica.layers_total} layers"
    if replica.arriving:
        layers += f", {replica.share} % of its parameters"
    work = f"{replica.requests_running} running, {replica.requests_waiting} waiting"
    role = f", {replica.role.lower()} only" if replica.role in ("Prefill", "Decode") else ""
    state = f"{replica.state}{role}"
    parts = [f"{replica.replica_id} on {replica.node} {replica.device}: {state}", layers, work]
    if replica.handoffs_given or replica.handoffs_taken:
        parts.append(f"handed over {replica.handoffs_given}, took over {replica.handoffs_taken}")
    if replica.requests_moved:
        parts.append(f"{replica.requests_moved} moved on with their KV")
    if replica.prefill_tokens_per_s:
        parts.append(f"{replica.prefill_tokens_per_s:.0f} prompt tokens/s")
    if replica.engine:
        parts.append(f"engine {replica.engine}")
    if replica.error:
        parts.append(f"error: {replica.error}")
    return ", ".join(parts)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _serve(number: int) -> str:
    return "serves" if number == 1 else "serve"


def _be(number: int) -> str:
    return "is" if number == 1 else "are"
