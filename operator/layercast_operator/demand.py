"""Demand from the gateways' own /metrics: text in, numbers out, and what is not known stays unknown. Pure.

Three answers are kept apart: a value, zero, and unknown. A gateway that speaks our names and has no series for a
model has never seen a request for it: zero. One that cannot be read, or whose page lacks our names, is unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from prometheus_client.parser import text_string_to_metric_families

from layercast_operator.snapshot import Demand

PROMPT_TOKENS_WAITING = "layercast_gateway_prompt_tokens_waiting"
REQUESTS_WAITING = "layercast_gateway_requests_waiting"
REQUESTS_IN_FLIGHT = "layercast_gateway_requests_in_flight"
NAMES = (PROMPT_TOKENS_WAITING, REQUESTS_WAITING, REQUESTS_IN_FLIGHT)
_OUR_COMMENTS = [[name] for name in NAMES]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one gateway told at one time: metric name to model to value."""

    at: float
    values: Mapping[str, Mapping[str, float]]

    def calls_for_more(self, before: Reading) -> bool:
        """Whether more waits for some model than before: worth a pass at once, while less can wait for the next."""
        return any(
            value > before.values[name].get(model, 0.0)
            for name in (PROMPT_TOKENS_WAITING, REQUESTS_WAITING)
            for model, value in self.values[name].items()
        )


def parse_reading(text: str, *, at: float) -> Reading:
    """The three metrics of a page in the Prometheus text format.

    Raises ValueError when the page lacks one of them: then it is no gateway of ours, or one of another version.
    """
    values: dict[str, dict[str, float]] = {}
    # Histograms are most of the page and none of our business: the parser sees our lines only.
    for line in text.splitlines():
        if line.startswith(NAMES):
            name, model, value = _sample(line)
            by_model = values.setdefault(name, {})
            by_model[model] = by_model.get(model, 0.0) + value
        elif line.startswith("# ") and line.split(" ", 3)[2:3] in _OUR_COMMENTS:
            values.setdefault(line.split(" ", 3)[2], {})
    missing = [name for name in NAMES if name not in values]
    if missing:
        raise ValueError(f"the page has no {', '.join(missing)}")
    return Reading(at=at, values=values)


@lru_cache(maxsize=1 << 14)
def _sample(line: str) -> tuple[str, str, float]:
    """Name, model and value of one line; most lines are the same from page to page. Raises ValueError."""
    try:
        for family in text_string_to_metric_families(line + "\n"):
            for sample in family.samples:
                return family.name, sample.labels.get("model", ""), sample.value if sample.value > 0 else 0.0
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        # The parser expects well-formed pages; whatever it stumbles over is the page's fault.
        raise ValueError(f"the page is malformed: {error!r}") from error
    raise ValueError(f"the page is malformed: {line[:80]!r}")


def demand_of(
    readings: Mapping[str, Reading | None], *, models: Iterable[str], now: float, age_max_s: float
) -> tuple[dict[str, Demand], str]:
    """Demand by model over all gateways, and what is wrong in words.

    Gateways that are not fresh make the sums incomplete; when none is fresh there is no demand to speak of.
    """
    fresh = [r for r in readings.values() if r is not None and now - r.at <= age_max_s]
    silent = sorted(g for g, r in readings.items() if r is None or now - r.at > age_max_s)
    if not readings:
        return {}, "no gateway is known"
    if not fresh:
        return {}, f"no gateway has told its demand for {age_max_s:g} s: {', '.join(silent)}"
    problem = f"silent: {', '.join(silent)}" if silent else ""

    def total(name: str, model: str) -> float:
        return sum(reading.values[name].get(model, 0.0) for reading in fresh)

    demand = {
        model: Demand(
            prompt_tokens_waiting=total(PROMPT_TOKENS_WAITING, model),
            requests_waiting=total(REQUESTS_WAITING, model),
            requests_in_flight=total(REQUESTS_IN_FLIGHT, model),
            complete=not silent,
            problem=problem,
        )
        for model in models
    }
    return demand, problem
