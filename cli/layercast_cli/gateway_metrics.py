"""The gateway's /metrics as values: the same names that the operator and Prometheus read."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

PREFIX = "layercast_gateway_"
TTFT_BUCKET = f"{PREFIX}ttft_seconds_bucket"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayMetrics:
    """What one gateway says of one model; `ttft_buckets` are (upper bound in seconds, cumulative count)."""

    requests_waiting: float = 0.0
    requests_in_flight: float = 0.0
    prompt_tokens_waiting: float = 0.0
    handoffs: float = 0.0
    replays: float = 0.0
    tokens: float = 0.0
    ttft_buckets: tuple[tuple[float, float], ...] = ()


def parse_metrics(text: str, model: str) -> GatewayMetrics:
    """The values of `model`; a series that is not there counts as 0. Raises ValueError for what is no
    exposition."""
    values: dict[str, float] = {}
    buckets: list[tuple[float, float]] = []
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("model") != model:
                continue
            if sample.name == TTFT_BUCKET:
                buckets.append((float(sample.labels["le"]), sample.value))
            else:
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return GatewayMetrics(
        requests_waiting=values.get(f"{PREFIX}requests_waiting", 0.0),
        requests_in_flight=values.get(f"{PREFIX}requests_in_flight", 0.0),
        prompt_tokens_waiting=values.get(f"{PREFIX}prompt_tokens_waiting", 0.0),
        handoffs=values.get(f"{PREFIX}handoffs_total", 0.0),
        replays=values.get(f"{PREFIX}replays_total", 0.0),
        tokens=values.get(f"{PREFIX}tokens_total", 0.0),
        ttft_buckets=tuple(sorted(buckets)),
    )


def histogram_quantile(quantile: float, buckets: Sequence[tuple[float, float]]) -> float | None:
    """Prometheus' histogram_quantile: linear inside the bucket; None without observations.

    In the open last bucket the answer is the highest finite bound.
    """
    if not buckets or buckets[-1][1] <= 0:
        return None
    rank = quantile * buckets[-1][1]
    lower, below = 0.0, 0.0
    for bound, count in buckets:
        if count >= rank and bound != float("inf"):
            inside = count - below
            return lower + (bound - lower) * ((rank - below) / inside if inside else 1.0)
        if bound != float("inf"):
            lower, below = bound, count
    return lower


def fetch_metrics(gateway_url: str, model: str, *, timeout_s: float = 1.0) -> GatewayMetrics | None:
    """Asks a gateway; None when it does not answer in time."""
    try:
        with urllib.request.urlopen(f"{gateway_url}/metrics", timeout=timeout_s) as response:
            return parse_metrics(response.read().decode(), model)
    except (urllib.error.URLError, OSError, ValueError):
        return None
