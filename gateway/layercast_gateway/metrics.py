"""What the gateway measures. The operator decides by some of these, so their names are a contract.

Series of a model exist from the moment the model is in the routing table, with zeros: for the operator a missing
series means unknown, which is not the same as no demand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from layercast_gateway.tally import Tallies, Tally, Total, Totals

TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TBT_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

UNKNOWN_MODEL = "unknown"
"""Label of requests that name no ModelService: clients must not be able to create series."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """How much of one model is wanted at this moment."""

    model: str
    prompt_tokens_waiting: int
    requests_waiting: int
    requests_in_flight: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSeries:
    """What every token of a model counts in: looked up once a request, not once a token."""

    ttft: Tally
    tbt: Tally
    tokens: Total


class Metrics:
    """All series of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        prefix = "layercast_gateway_"
        by_model = ("model",)
        self.prompt_tokens_waiting = Gauge(
            prefix + "prompt_tokens_waiting",
            "Prompt tokens of accepted requests without a first token, queued or dispatched.",
            by_model,
            registry=registry,
        )
        self.requests_waiting = Gauge(
            prefix + "requests_waiting",
            "Accepted requests without a first token, queued or dispatched.",
            by_model,
            registry=registry,
        )
        self.requests_in_flight = Gauge(
            prefix + "requests_in_flight",
            "Accepted requests that have not ended.",
            by_model,
            registry=registry,
        )
        self.requests = Counter(
            prefix + "requests",
            "HTTP requests that ended, by status code; 499 is a client that left.",
            ("model", "code"),
            registry=registry,
        )
        self.key_requests = Counter(
            prefix + "key_requests",
            "Requests by the name of their API key and what became of them at the door.",
            ("key", "outcome"),
            registry=registry,
        )
        self.ttft = Tallies(
            prefix + "ttft_seconds", "From acceptance to the first token, seen here.", bounds=TTFT_BUCKETS_S
        )
        self.tbt = Tallies(
            prefix + "tbt_seconds", "Between two tokens of a request, seen here.", bounds=TBT_BUCKETS_S
        )
        registry.register(self.ttft)
        registry.register(self.tbt)
        self._of: dict[str, ModelSeries] = {}
        self._ends: dict[tuple[str, str], Counter] = {}
        self.replays = Counter(
            prefix + "replays", "Dispatches of a request after its first.", by_model, registry=registry
        )
        self.handoffs = Counter(
            prefix + "handoffs",
            "Requests that a replica announced as its own with layers already executed elsewhere.",
            by_model,
            registry=registry,
        )
        self.tokens = Totals(prefix + "tokens", "Tokens delivered to clients.")
        registry.register(self.tokens)
        self._add_demand_only()
        self._add_pool()

    def _add_demand_only(self) -> None:
        """What the operator asks for, in a registry of its own: with its heads also before there is a series."""
        gauges = (self.prompt_tokens_waiting, self.requests_waiting, self.requests_in_flight)
        self._demand = [next(iter(gauge.describe())).name for gauge in gauges]
        self._demand_only = CollectorRegistry()
        for gauge in gauges:
            self._demand_only.register(gauge)

    def _add_pool(self) -> None:
        """What an endpoint picker asks for, in a registry of its own: another's names do not belong into `/metrics`."""
        self._pool = CollectorRegistry()
        self._pool_waiting = Gauge(
            "vllm:num_requests_waiting",
            "Requests in the queue: without a first token.",
            registry=self._pool,
        )
        self._pool_running = Gauge(
            "vllm:num_requests_running",
            "Requests that are being served: with a first token.",
            registry=self._pool,
        )
        self._pool_kv = Gauge(
            "vllm:kv_cache_usage_perc",
            "Used part of the KV memory of all replicas, 0 to 1.",
            registry=self._pool,
        )

    def watch_certificate(self, expires_at: Callable[[], float]) -> None:
        """Tell when our certificate ends; all processes tell it by one name, each with its role."""
        gauge = Gauge(
            "layercast_certificate_expiry_timestamp_seconds",
            "When the certificate of this process ends.",
            ("role",),
            registry=self.registry,
        )
        gauge.labels("gateway").set_function(expires_at)

    def add_model(self, model: str) -> None:
        """Creates the series of a model."""
        for series in (self.prompt_tokens_waiting, self.requests_waiting, self.requests_in_flight):
            series.labels(model)
        for counted in (self.replays, self.handoffs):
            counted.labels(model)
        self.of(model)

    def of(self, model: str) -> ModelSeries:
        """What the tokens of a model count in."""
        found = self._of.get(model)
        if found is None:
            found = ModelSeries(
                ttft=self.ttft.of(model), tbt=self.tbt.of(model), tokens=self.tokens.of(model)
            )
            self._of[model] = found
        return found

    def ended(self, model: str, code: str) -> None:
        """Counts an HTTP request."""
        counter = self._ends.get((model, code))
        if counter is None:
            counter = self._ends[model, code] = self.requests.labels(model, code)
        counter.inc()

    def render(self, demands: Iterable[Demand], names: Sequence[str] = ()) -> bytes:
        """The text format of Prometheus, with the demand of this moment; of `names` only, where some are given."""
        for demand in demands:
            self.prompt_tokens_waiting.labels(demand.model).set(demand.prompt_tokens_waiting)
            self.requests_waiting.labels(demand.model).set(demand.requests_waiting)
            self.requests_in_flight.labels(demand.model).set(demand.requests_in_flight)
        if names and set(names) <= set(self._demand):
            return generate_latest(self._demand_only)
        return generate_latest(self.registry.restricted_registry(names) if names else self.registry)

    def render_pool(self, demands: Iterable[Demand], *, kv_utilization: float) -> bytes:
        """The same moment in the names of the Gateway API Inference Extension's model server protocol.

        Its metrics of a model server, with the names that pickers know by default (vLLM's): sums over all models,
        because a picker reads one value of an endpoint.
        """
        demands = list(demands)
        waiting = sum(demand.requests_waiting for demand in demands)
        self._pool_waiting.set(waiting)
        self._pool_running.set(sum(demand.requests_in_flight for demand in demands) - waiting)
        self._pool_kv.set(kv_utilization)
        return generate_latest(self._pool)
