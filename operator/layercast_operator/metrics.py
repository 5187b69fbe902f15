"""What the operator counts, and where it is read: /metrics, /healthz and /readyz on one small HTTP server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from layercast_operator.errors import SettingsError
from layercast_operator.estimators import Prediction, What
from layercast_operator.snapshot import HostCopyState, Replica, Role

_PREFIX = "layercast_operator_"


class Metrics:
    """All metrics of one operator, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._listed: dict[str, set[str]] = {}
        self._states: dict[str, set[str]] = {}
        self.replicas = Gauge(
            _PREFIX + "replicas",
            "Replicas by state, `desired` included.",
            ["model", "state"],
            registry=self.registry,
        )
        self.layers_resident = Gauge(
            _PREFIX + "layers_resident",
            "Transformer layers resident.",
            ["model", "replica"],
            registry=self.registry,
        )
        self.transfer_bytes_per_s = Gauge(
            _PREFIX + "transfer_bytes_per_second",
            "Rate of parameters that arrive at a replica.",
            ["model", "replica"],
            registry=self.registry,
        )
        self.decisions = Counter(
            _PREFIX + "decisions",
            "Changes of the wanted number, by rule.",
            ["model", "rule"],
            registry=self.registry,
        )
        self.actions = Counter(
            _PREFIX + "actions",
            "Commands to agents, by kind and gRPC code.",
            ["kind", "code"],
            registry=self.registry,
        )
        self.reconcile_seconds = Histogram(
            _PREFIX + "reconcile_seconds",
            "One pass over one model, without waiting for agents.",
            ["model"],
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0),
            registry=self.registry,
        )
        self.reconcile_errors = Counter(
            _PREFIX + "reconcile_errors",
            "Passes that ended by an exception: bugs.",
            ["model"],
            registry=self.registry,
        )
        self.scrape_failures = Counter(
            _PREFIX + "scrape_failures",
            "Gateways that did not tell their demand.",
            ["gateway"],
            registry=self.registry,
        )
        self.poll_failures = Counter(
            _PREFIX + "poll_failures", "Agents that did not answer.", ["node"], registry=self.registry
        )
        self._add_predictions()
        self._add_peers()
        self._add_host_copies()
        self._add_kubernetes()

    def _add_predictions(self) -> None:
        """Estimates of what ended, and what it took: two histograms with the same counts."""
        labels, buckets = ["model", "what"], (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
        self.predicted_seconds = Histogram(
            _PREFIX + "predicted_seconds",
            "How long loads were expected to take, by what of them.",
            labels,
            buckets=buckets,
            registry=self.registry,
        )
        self.actual_seconds = Histogram(
            _PREFIX + "actual_seconds",
            "How long the loads took whose predictions are counted.",
            labels,
            buckets=buckets,
            registry=self.registry,
        )

    def _add_peers(self) -> None:
        """Who answers, and who does what."""
        self.role_replicas = Gauge(
            _PREFIX + "role_replicas",
            "Replicas that serve or will, by what they do: Both, Prefill or Decode.",
            ["model", "role"],
            registry=self.registry,
        )
        self.agent_up = Gauge(
            _PREFIX + "agent_up",
            "1 when the agent of a node answered the last question.",
            ["node"],
            registry=self.registry,
        )
        self.gateway_up = Gauge(
            _PREFIX + "gateway_up",
            "1 when a gateway told its demand the last time.",
            ["gateway"],
            registry=self.registry,
        )

    def _add_host_copies(self) -> None:
        """Where checkpoints are kept in memory."""
        self.host_copies = Gauge(
            _PREFIX + "host_copies",
            "Copies of the model's checkpoint in host memory, by state.",
            ["model", "state"],
            registry=self.registry,
        )
        self.memory_copies = Gauge(
            _PREFIX + "memory_copies",
            "Complete copies on devices and in host memory, `total`; 0 means that at most a disk is left.",
            ["model", "where"],
            registry=self.registry,
        )

    def _add_kubernetes(self) -> None:
        """What is only counted where there is an API server."""
        self.status_failures = Counter(
            _PREFIX + "status_write_failures",
            "Statuses that the API server did not take.",
            registry=self.registry,
        )
        self.list_failures = Counter(
            _PREFIX + "list_failures",
            "Lists that the API server did not answer, by kind.",
            ["kind"],
            registry=self.registry,
        )
        self.prometheus_failures = Counter(
            _PREFIX + "prometheus_failures",
            "Rounds of questions that Prometheus did not answer.",
            registry=self.registry,
        )
        self.metrics_available = Gauge(
            _PREFIX + "metrics_available",
            "1 while the demand of a model is known, 0 while nothing may be scaled down for lack of it.",
            ["model"],
            registry=self.registry,
        )
        self.leader = Gauge(_PREFIX + "leader", "1 while this operator may act.", registry=self.registry)

    def watch_certificate(self, expires_at: Callable[[], float]) -> None:
        """Tell when our certificate ends; all processes tell it by one name, each with its role."""
        gauge = Gauge(
            "layercast_certificate_expiry_timestamp_seconds",
            "When the certificate of this process ends.",
            ["role"],
            registry=self.registry,
        )
        gauge.labels("operator").set_function(expires_at)

    def show_model(self, status: Mapping[str, Any], replicas: tuple[Replica, ...]) -> None:
        """Take over what a pass reported of one model."""
        model = str(status["name"])
        self._states[model] = set(status["counts"])
        for state, count in status["counts"].items():
            self.replicas.labels(model, state).set(count)
        roles = [replica.role for replica in replicas if replica.active]
        for role in Role:
            self.role_replicas.labels(model, role.value).set(roles.count(role))
        known = any(c["type"] == "MetricsAvailable" and c["status"] == "True" for c in status["conditions"])
        self.metrics_available.labels(model).set(known)
        states = [copy["state"] for copy in status["hostCopies"]]
        for copy_state in HostCopyState:
            self.host_copies.labels(model, copy_state.value).set(states.count(copy_state.value))
        copies = {
            "device": sum(1 for replica in replicas if replica.complete),
            "host": states.count(HostCopyState.COMPLETE.value),
        }
        for where, count in (copies | {"total": sum(copies.values())}).items():
            self.memory_copies.labels(model, where).set(count)
        listed = {replica.replica_id for replica in replicas}
        for gone in self._listed.get(model, set()) - listed:
            self._forget_replica(model, gone)
        self._listed[model] = listed
        for replica in replicas:
            self.layers_resident.labels(model, replica.replica_id).set(replica.layers_resident)
            rate = replica.transfer.bytes_per_s if replica.transfer is not None and replica.arriving else 0
            self.transfer_bytes_per_s.labels(model, replica.replica_id).set(rate)

    def show_prediction(self, model: str, prediction: Prediction) -> None:
        """One came true, or did not."""
        if prediction.actual_s is not None:
            self.predicted_seconds.labels(model, prediction.what.value).observe(prediction.predicted_s)
            self.actual_seconds.labels(model, prediction.what.value).observe(prediction.actual_s)

    def forget_model(self, model: str) -> None:
        """Its ModelService is gone."""
        for series in (self.predicted_seconds, self.actual_seconds):
            for what in What:
                with contextlib.suppress(KeyError):
                    series.remove(model, what.value)
        for replica in self._listed.pop(model, set()):
            self._forget_replica(model, replica)
        with contextlib.suppress(KeyError):
            self.metrics_available.remove(model)
        for state in self._states.pop(model, set()):
            self.replicas.remove(model, state)
        for role in Role:
            with contextlib.suppress(KeyError):
                self.role_replicas.remove(model, role.value)
        for copy_state in HostCopyState:
            with contextlib.suppress(KeyError):
                self.host_copies.remove(model, copy_state.value)
        for where in ("device", "host", "total"):
            with contextlib.suppress(KeyError):
                self.memory_copies.remove(model, where)

    def forget_peers(self, nodes: Iterable[str], gateways: Iterable[str]) -> None:
        """They are not in the cluster any more."""
        for series, names in ((self.agent_up, nodes), (self.gateway_up, gateways)):
            for name in names:
                with contextlib.suppress(KeyError):
                    series.remove(name)

    def _forget_replica(self, model: str, replica: str) -> None:
        for series in (self.layers_resident, self.transfer_bytes_per_s):
            with contextlib.suppress(KeyError):
                series.remove(model, replica)


async def serve_metrics(
    metrics: Metrics, *, host: str, port: int, alive: Callable[[], bool], ready: Callable[[], bool]
) -> tuple[web.AppRunner, int]:
    """Serve until the runner is cleaned up; returns it and the port. Raises SettingsError when the port is taken."""

    async def show(_request: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(metrics.registry), headers={"Content-Type": "text/plain; version=0.0.4"}
        )

    def probe(check: Callable[[], bool]) -> Callable[[web.Request], Any]:
        async def answer(_request: web.Request) -> web.Response:
            good = check()
            return web.Response(status=200 if good else 503, text="ok\n" if good else "not yet\n")

        return answer

    app = web.Application()
    app.add_routes(
        [
            web.get("/metrics", show),
            web.get("/healthz", probe(alive)),
            web.get("/readyz", probe(ready)),
        ]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, reuse_port=False).start()
    except OSError as error:
        await runner.cleanup()
        raise SettingsError(f"--metrics-listen {host}:{port} cannot be used: {error.strerror}") from error
    return runner, int(runner.addresses[0][1])
