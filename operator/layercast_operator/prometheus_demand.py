"""Demand as Prometheus tells it: the shipped expressions, what answers mean, and how it joins the gateways' own. Pure.

Prometheus sees every gateway and remembers; the gateways' pages are faster. Growth follows whichever calls for more.
Shrinking needs both: a series that is missing is unknown, not zero, whatever the other one says. An expression that
has no series for minutes is most likely wrong - a label, a name - and then an autoscaler that looks well does
nothing; that is why it is a condition of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from layercast_operator.modelservice import Queries
from layercast_operator.snapshot import Demand

FIELDS = ("prompt_tokens_waiting", "requests_waiting", "requests_in_flight")
# One query answers for all models that have no expression of their own.
SHIPPED = {name: f"sum by (model) (layercast_gateway_{name})" for name in FIELDS}
TTFT_P99 = "histogram_quantile(0.99, sum by (model, le) (rate(layercast_gateway_ttft_seconds_bucket[5m])))"
MISSING_AFTER_S = 120.0
"""So long a new service, a restart or a scrape may take before a missing series is a mistake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What Prometheus answered last for one model; None is no series."""

    values: Mapping[str, float | None] = field(default_factory=dict)
    missing_since: float | None = None
    """Since when at least one of the series is missing."""
    problem: str = ""
    """Why an expression cannot be used, in Prometheus's words."""
    ttft_p99_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """All answers of one round."""

    at: float
    """When the last round succeeded; 0 before the first."""
    by_model: Mapping[str, Told] = field(default_factory=dict)
    problem: str = ""
    """Why there was no answer at all."""


def expression(queries: Queries, name: str, model: str) -> str:
    """The expression of one model alone; empty where the shipped one answers for it."""
    own: str = getattr(queries, name)
    return own.replace("$model", model)


def next_told(before: Told | None, values: Mapping[str, float | None], *, now: float) -> Told:
    """What is told with these values, remembering since when one is missing."""
    missing = any(values.get(name) is None for name in FIELDS)
    since = before.missing_since if before is not None else None
    return Told(values=values, missing_since=(since if since is not None else now) if missing else None)


def joined(
    fast: Demand | None, answers: Answers, *, model: str, now: float, age_max_s: float, gateways: bool
) -> Demand | None:
    """Demand from both; None when neither knows anything. `gateways`: some are known, so `fast` is owed."""
    told = answers.by_model.get(model)
    values = told.values if told is not None and now - answers.at <= age_max_s else {}
    reason, problem = _trouble(answers, told, now=now, age_max_s=age_max_s)
    if fast is None and all(values.get(name) is None for name in FIELDS):
        return None
    base = fast or Demand(
        prompt_tokens_waiting=0,
        requests_waiting=0,
        requests_in_flight=0,
        complete=not gateways,
        problem="no gateway tells its demand" if gateways else "",
    )
    return replace(
        base,
        prompt_tokens_waiting=max(base.prompt_tokens_waiting, values.get(FIELDS[0]) or 0.0),
        requests_waiting=max(base.requests_waiting, values.get(FIELDS[1]) or 0.0),
        requests_in_flight=max(base.requests_in_flight, values.get(FIELDS[2]) or 0.0),
        complete=base.complete and not problem,
        problem="; ".join(filter(None, (base.problem, problem))),
        reason=reason or base.reason,
    )


def _trouble(answers: Answers, told: Told | None, *, now: float, age_max_s: float) -> tuple[str, str]:
    """Reason and words for why Prometheus is no ground to shrink; both empty when it is."""
    if now - answers.at > age_max_s:
        return "PrometheusSilent", answers.problem or "Prometheus has not answered yet"
    if told is None:
        return "PrometheusSilent", "Prometheus was not asked yet"
    if told.problem:
        return "BadExpression", told.problem
    if told.missing_since is None:
        return "", ""
    names = ", ".join(name for name in FIELDS if told.values.get(name) is None)
    if now - told.missing_since < MISSING_AFTER_S:
        return "SeriesAwaited", f"Prometheus has no series of {names} yet"
    minutes = int((now - told.missing_since) / 60)
    return "NoSeries", f"Prometheus has had no series of {names} for {minutes} min: check names and labels"
