"""The numbers of a demo run, computed from its record and from nothing else. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layercast_cli import words
from layercast_cli.records import BURST, REFERENCE, STEADY, DemoRecord, RequestRecord
from layercast_cli.status import Scale, ScaleReplica


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Percentiles in seconds of the requests of one group; None without values."""

    requests: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tbt_p50_s: float | None
    tbt_p99_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the table, `result.json` and the report show.

    `window` is the scale-up: from its decision until its last replica was complete (unix seconds). From the decision,
    `load_s` is until `first`, the replica with the first token, was complete, and `scale_s` until all of them were.
    `before`, `during` and `after` group requests by the moment they were sent; the reference requests, sent
    at rest, are not among them.
    """

    requests: int
    failed: tuple[RequestRecord, ...]
    mismatched: tuple[RequestRecord, ...]
    replicas_max: int
    replicas_end: int
    handoffs: int
    window: tuple[float, float] | None
    all: Latency
    before: Latency
    during: Latency
    after: Latency
    scale: Scale | None
    first: ScaleReplica | None
    decision_to_first_token_s: float | None
    load_s: float | None
    scale_s: float | None
    replica_bytes_per_s: float
    total_bytes_per_s: float


def summarize(record: DemoRecord) -> Summary:
    """All numbers of a run."""
    scales = scale_ups(record)
    scale = scales[0] if scales else None
    first = earliest(scale.replicas) if scale is not None else None
    window = scale_window(record, scales)
    demand = [each for each in record.requests if each.phase != REFERENCE]
    start, end = window if window is not None else (math.inf, math.inf)
    arrived = [each for scale_up in scales for each in scale_up.replicas if each.bytes_per_s]
    return Summary(
        requests=len(record.requests),
        failed=tuple(each for each in record.requests if not each.ok),
        mismatched=tuple(each for each in demand if each.ok and mismatches(each, record)),
        replicas_max=max((each.serving for each in record.samples), default=0),
        replicas_end=record.samples[-1].serving if record.samples else 0,
        handoffs=int(max((each.handoffs or 0 for each in record.samples), default=0)),
        window=window,
        all=latency(demand),
        before=latency([each for each in demand if each.sent_at < start]),
        during=latency([each for each in demand if start <= each.sent_at < end]),
        after=latency([each for each in demand if each.sent_at >= end]),
        scale=scale,
        first=first,
        decision_to_first_token_s=_since(scale, first.first_token_at if first is not None else None),
        load_s=_since(scale, first.complete_at if first is not None else None),
        scale_s=_since(scale, _complete_at(scale.replicas) if scale is not None else None),
        replica_bytes_per_s=max((each.bytes_per_s for each in arrived), default=0.0),
        total_bytes_per_s=sum(each.bytes_per_s for each in arrived),
    )


def scale_ups(record: DemoRecord) -> list[Scale]:
    """Scale-ups under demand, oldest first: those of the burst, or if there were none all after the steady
    phase began."""
    began = record.phase_at.get(STEADY, record.started_at)
    ups = sorted(
        (each for each in record.scales if each.up and each.decided_at >= began),
        key=lambda each: each.decided_at,
    )
    burst = record.phase_at.get(BURST)
    return [each for each in ups if burst is not None and each.decided_at >= burst] or ups


def earliest(replicas: Sequence[ScaleReplica]) -> ScaleReplica | None:
    """The new replica whose first token came first; without tokens the one that was assigned first."""
    return min(replicas, key=_first_activity, default=None)


def scale_window(record: DemoRecord, scales: Sequence[Scale]) -> tuple[float, float] | None:
    """From the first decision to the last complete replica; to the run's end when one never became
    complete."""
    if not scales:
        return None
    end = _complete_at([each for scale in scales for each in scale.replicas])
    return scales[0].decided_at, record.ended_at if end is None else end


def _complete_at(replicas: Sequence[ScaleReplica]) -> float | None:
    """When the last of them was complete; None when one never was."""
    known = [each.complete_at for each in replicas if each.complete_at is not None]
    return max(known) if known and len(known) == len(replicas) else None


def mismatches(request: RequestRecord, record: DemoRecord) -> bool:
    """The greedy answer differs from the one that the single replica gave to the same prompt at rest."""
    expected = record.reference.get(request.prompt)
    return expected is not None and request.text != expected


def latency(requests: Sequence[RequestRecord]) -> Latency:
    """Percentiles over requests with an answer."""
    ttft = [each.ttft_s for each in requests if each.ok and each.ttft_s is not None]
    tbt = [gap for each in requests if each.ok for gap in each.tbt_s]
    return Latency(
        requests=len(requests),
        ttft_p50_s=percentile(ttft, 0.50),
        ttft_p99_s=percentile(ttft, 0.99),
        tbt_p50_s=percentile(tbt, 0.50),
        tbt_p99_s=percentile(tbt, 0.99),
    )


def percentile(values: Sequence[float], share: float) -> float | None:
    """Linear interpolation between the two nearest ranks; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    rank = share * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def problems(record: DemoRecord, summary: Summary) -> list[str]:
    """Why the run is not a success, one sentence each; empty when it is."""
    found = []
    if summary.failed:
        example = summary.failed[0]
        found.append(f"{words.count(len(summary.failed), 'request')} failed, the first with: {example.error}")
    if summary.mismatched:
        example = summary.mismatched[0]
        expected = record.reference[example.prompt]
        found.append(
            f"{words.count(len(summary.mismatched), 'answer')} differed from the single replica's, first that "
            f"of request {example.index}: {example.text!r} instead of {expected!r}"
        )
    if summary.scale is None:
        found.append("the scale-up did not happen: the policy decided for no new replica")
    elif summary.replicas_max < record.wanted_replicas:
        reached = f"at most {summary.replicas_max} of {record.wanted_replicas} replicas served"
        found.append(f"the scale-up did not end: {reached}")
    return found


def result(record: DemoRecord, summary: Summary) -> dict[str, Any]:
    """The content of `result.json`; durations in the unit of their name, None for what did not happen."""
    groups = {"before": summary.before, "during": summary.during, "after": summary.after}
    return {
        "requests": summary.requests,
        "failed": len(summary.failed),
        "mismatched": len(summary.mismatched),
        "replicas_max": summary.replicas_max,
        "replicas_end": summary.replicas_end,
        "ttft_p99_ms": _ms(summary.all.ttft_p99_s),
        "decision_to_first_token_ms": _ms(summary.decision_to_first_token_s),
        "load_s": _rounded(summary.load_s),
        "scale_s": _rounded(summary.scale_s),
        "handoffs": summary.handoffs,
        "latency_ms": {name: _latency_ms(each) for name, each in groups.items()},
        "requests_by_phase": _by_phase(record),
        "capacity_requests_per_s": _rounded(record.capacity),
        "gigabytes_per_s_replica": _rounded(summary.replica_bytes_per_s / 1e9, 4),
        "gigabytes_per_s_total": _rounded(summary.total_bytes_per_s / 1e9, 4),
        "duration_s": _rounded(record.ended_at - record.started_at),
        "problems": problems(record, summary),
        "settings": dict(record.settings),
    }


def _first_activity(replica: ScaleReplica) -> tuple[float, float]:
    return replica.first_token_at or math.inf, replica.assigned_at or math.inf


def _latency_ms(group: Latency) -> dict[str, Any]:
    return {
        "requests": group.requests,
        "ttft_p50": _ms(group.ttft_p50_s),
        "ttft_p99": _ms(group.ttft_p99_s),
        "tbt_p50": _ms(group.tbt_p50_s),
        "tbt_p99": _ms(group.tbt_p99_s),
    }


def _by_phase(record: DemoRecord) -> dict[str, int]:
    counts: dict[str, int] = {}
    for each in record.requests:
        counts[each.phase] = counts.get(each.phase, 0) + 1
    return counts


def _since(scale: Scale | None, at: float | None) -> float | None:
    return at - scale.decided_at if scale is not None and at is not None else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)


def _rounded(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)
