"""Why this many replicas: the numbers of a decision, and what other numbers of replicas would mean. Pure."""

from __future__ import annotations

from typing import Any

from layercast_operator.modelservice import Scaling
from layercast_operator.policy import Decision, PolicyInput, counted
from layercast_operator.roles import UNDIVIDED, Division


def explanation(
    scaling: Scaling | None, given: PolicyInput | None, decision: Decision, division: Division = UNDIVIDED
) -> dict[str, Any]:
    """`status.decision`. Without `scaling` nothing but the specification decides, and there are no alternatives."""
    told: dict[str, Any] = {
        "replicas": decision.replicas,
        "rule": decision.rule.value,
        "reason": decision.reason,
        "numbers": {} if given is None else _numbers(scaling, given),
        "alternatives": [],
    }
    if division.total:
        told["numbers"] |= {"prefillReplicas": division.prefill, "decodeReplicas": division.decode}
    if scaling is not None and given is not None:
        around = range(max(decision.replicas - 1, 0), decision.replicas + 2)
        told["alternatives"] = [_alternative(scaling, given, replicas) for replicas in around]
    return told


def _numbers(scaling: Scaling | None, given: PolicyInput) -> dict[str, float]:
    demand, kv = given.demand, given.kv
    known: dict[str, float | None] = {
        "promptTokensWaiting": demand.prompt_tokens_waiting if demand is not None else None,
        "requestsWaiting": demand.requests_waiting if demand is not None else None,
        "requestsInFlight": demand.requests_in_flight if demand is not None else None,
        "prefillTokensPerSecond": given.prefill_tokens_per_s,
        "kvPagesUsed": kv.used if kv is not None else None,
        "kvPagesPerReplica": kv.pages_per_replica if kv is not None and kv.pages_per_replica > 1 else None,
        "devices": given.capacity,
        "loadSeconds": given.load_time_s,
        "windowSeconds": max(scaling.scale_down_s, given.load_time_s or 0.0) if scaling is not None else None,
    }
    return {name: round(float(value), 3) for name, value in known.items() if value is not None}


def _alternative(scaling: Scaling, given: PolicyInput, replicas: int) -> str:
    """What so many replicas would mean, against the targets."""
    parts = []
    demand, rate = given.demand, given.prefill_tokens_per_s
    band = scaling.queue_s
    if replicas and demand is not None and rate:
        each_s = demand.prompt_tokens_waiting / (replicas * rate)
        parts.append(f"{each_s:.2g} s of prompts wait for each (wanted {band.low:g} to {band.high:g} s)")
    if replicas and given.kv is not None and given.kv.pages_per_replica > 1:
        use = 100 * given.kv.used / (replicas * given.kv.pages_per_replica)
        pages = scaling.kv_utilization
        parts.append(f"{use:.0f} % of KV pages in use (wanted {100 * pages.low:g} to {100 * pages.high:g} %)")
    if not replicas:
        waiting = demand.requests_in_flight if demand is not None else 0
        parts.append(f"{waiting:.0f} requests would wait for a replica to start")
    if replicas < scaling.replicas_min:
        parts.append(f"below min, which is {scaling.replicas_min}")
    if replicas > scaling.replicas_max:
        parts.append(f"above max, which is {scaling.replicas_max}")
    if given.capacity is not None and replicas > given.capacity:
        parts.append(f"more than {counted(given.capacity, 'device')} can hold")
    return f"{counted(replicas, 'replica')}: {'; '.join(parts) or 'nothing is known to say'}"
