"""The numbers of one run and the ratios between runs. Pure: everything comes from the records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from bench.live import predict
from bench.live.arrivals import Shape
from bench.live.play import Calibration, Played
from bench.live.prompts import length_class

from layercast_cli.records import RequestRecord
from layercast_cli.summary import percentile

SLO_FACTOR = 5.0
"""A request meets its objective when it is at most this many times slower than one alone (BlitzScale, 6.2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One run. Times in seconds; `attainment` is the part of the requests that met both objectives.

    `decided_s`, `load_s` and `added` (replicas) are of the first scale-up under overload.
    """

    policy: str
    requests: int
    failed: int
    mismatched: int
    ttft: tuple[float, float, float]
    tbt: tuple[float, float, float]
    attainment: float
    replica_s: float
    replicas_max: int
    handoffs: int
    decided_s: float | None
    load_s: float | None
    added: int


def figures(played: Played, calibration: Calibration, shape: Shape) -> Figures:
    """Percentiles 50, 95 and 99 over the answered requests; the rest as the field's names say."""
    answered = [each for each in played.requests if each.ok]
    ttft = [each.ttft_s for each in answered if each.ttft_s is not None]
    gaps = [gap for each in answered for gap in each.tbt_s]
    decided, load, added = _scale(played, shape)
    met = sum(1 for each in answered if meets(each, calibration))
    return Figures(
        policy=played.policy,
        requests=len(played.requests),
        failed=len(played.requests) - len(answered),
        mismatched=sum(1 for each in answered if mismatches(each, calibration.answers)),
        ttft=_three(ttft),
        tbt=_three(gaps),
        attainment=met / max(1, len(played.requests)),
        replica_s=replica_seconds(played, shape),
        replicas_max=max((len(each.replicas) for each in played.samples), default=0),
        handoffs=round(played.handoffs),
        decided_s=decided,
        load_s=load,
        added=added,
    )


def meets(request: RequestRecord, calibration: Calibration) -> bool:
    """First token and mean time between tokens within `SLO_FACTOR` of a request that is alone."""
    if request.ttft_s is None or request.ttft_s > SLO_FACTOR * calibration.ttft_s:
        return False
    gaps = request.tbt_s
    return not gaps or sum(gaps) / len(gaps) <= SLO_FACTOR * calibration.tbt_s


def mismatches(request: RequestRecord, answers: Mapping[int, str]) -> bool:
    """The greedy answer is not a beginning of the one that a single replica gave at rest."""
    expected = answers.get(request.prompt)
    return expected is None or not expected.startswith(request.text) or not request.text


def replica_seconds(played: Played, shape: Shape) -> float:
    """Devices held, times time, from the first arrival to the end of the shape; loading and draining count."""
    start, end = played.started_at, played.started_at + shape.seconds
    total, samples = 0.0, played.samples
    for this, following in pairwise(samples):
        total += len(this.replicas) * max(0.0, min(following.at, end) - max(this.at, start))
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """What the scheduling model has to know of one, beside its calibration: seconds of a load from a peer, limits of a
    step, and the part of a step that a paced CPU device computes before it answers and pauses."""

    layers: int
    load_s: float
    step_tokens: int
    batch_size: int
    cpu_share: float


def ratios(
    runs: Mapping[str, Figures], *, calibration: Calibration, shape: Shape, replica: Replica
) -> dict[str, float | int | None]:
    """The ratios that the project claims; None where a policy was not played."""

    def over(figure: Callable[[Figures], float], policy: str, *, of: str = "live") -> float | None:
        if of not in runs or policy not in runs:
            return None
        return _ratio(figure(runs[of]), figure(runs[policy]))

    live, static = runs.get("live"), runs.get("static")
    return {
        "ttft_p99_live_over_stop_the_world": over(lambda run: run.ttft[2], "stop-the-world"),
        "model_ratio": _predicted(live, runs.get("stop-the-world"), calibration, shape, replica),
        "ttft_p99_live_over_ttl_cache": over(lambda run: run.ttft[2], "ttl-cache"),
        # What the multicast alone brings, before anything is executed early.
        "ttft_p99_stop_the_world_over_network": over(lambda run: run.ttft[2], "network", of="stop-the-world"),
        "tbt_p99_live_over_stop_the_world": over(lambda run: run.tbt[2], "stop-the-world"),
        "replica_seconds_live_over_static": over(lambda run: run.replica_s, "static"),
        "attainment_live_minus_static": live.attainment - static.attainment if live and static else None,
        "failed": sum(each.failed for each in runs.values()),
        "mismatched": sum(each.mismatched for each in runs.values()),
    }


def _predicted(
    live: Figures | None,
    stop: Figures | None,
    calibration: Calibration,
    shape: Shape,
    replica: Replica,
) -> float | None:
    """The scheduling model's ratio for the same arrivals, each policy with the moment of its own decision."""
    if live is None or stop is None or live.decided_s is None or stop.decided_s is None:
        return None
    asked = [
        replace(each, prompt_tokens=length_class(each.prompt_tokens) + calibration.template_tokens)
        for each in shape.arrivals
    ]
    steps = predict.steps_of(
        tokens_max=replica.step_tokens,
        requests_max=replica.batch_size,
        prompt_tokens=median(each.prompt_tokens for each in asked),
        output_tokens=median(each.output_tokens for each in asked),
        alone_s=calibration.prefill_s,
        between_s=calibration.tbt_s,
        capacity=calibration.capacity,
        answers_after=replica.cpu_share,
    )
    waits = []
    for model, run in ((predict.live, live), (predict.stop_the_world, stop)):
        world = predict.World(
            layers=replica.layers,
            steps=steps,
            decided_at_s=run.decided_s or 0.0,
            first_layer_s=replica.load_s / replica.layers,
            layer_load_s=replica.load_s / replica.layers,
            targets=max(1, run.added),
        )
        waits.append(percentile(model(asked, world), 0.99))
    return _ratio(*waits)


def _scale(played: Played, shape: Shape) -> tuple[float | None, float | None, int]:
    """(decision in seconds of the run, seconds from there to the first complete new replica, new replicas)."""
    after = played.started_at + (shape.overload_at_s or 0.0)
    ups = sorted(
        (each for each in played.scales if each.up and each.decided_at >= after), key=lambda up: up.decided_at
    )
    if not ups:
        return None, None, 0
    complete = [each.complete_at for each in ups[0].replicas if each.complete_at is not None]
    load = min(complete) - ups[0].decided_at if complete else None
    return ups[0].decided_at - played.started_at, load, len(ups[0].replicas)


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    p50, p95, p99 = (percentile(values, share) or 0.0 for share in (0.5, 0.95, 0.99))
    return p50, p95, p99


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base
