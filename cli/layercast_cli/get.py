"""`layercast get`: what is wanted and what is there, in the shape that kubectl made familiar."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from layercast_cli import words
from layercast_cli.errors import CliError
from layercast_cli.explain import host_copy
from layercast_cli.gateway_metrics import GatewayMetrics, fetch_metrics, histogram_quantile
from layercast_cli.modelfile import names, read_service, unknown_name
from layercast_cli.state import StateDir
from layercast_cli.status import ReplicaStatus, ServiceStatus, read_status

HEADER = ["NAME", "READY", "LOADING", "SOURCE", "P99 TTFT", "AGE"]
WIDE_HEADER = [
    "REPLICA",
    "NODE",
    "DEVICE",
    "ROLE",
    "STATE",
    "LAYERS",
    "SOURCE",
    "RATE",
    "WAITING",
    "RUNNING",
    "HANDOFFS",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One row: the wanted number, the operator's view, the gateway's numbers; `age_s` since it was
    created."""

    name: str
    wanted: int
    status: ServiceStatus | None
    metrics: GatewayMetrics | None
    age_s: float | None


def get(state: StateDir, *, name: str | None, output: str) -> str:
    """The text of `layercast get`; `output` is "", "wide" or "json". CliError for an unknown name."""
    services = observe(state, name=name)
    if output == "json":
        documents = [
            dict(each.status.raw) if each.status is not None else {"name": each.name} for each in services
        ]
        return json.dumps(documents[0] if name is not None else documents, indent=2, ensure_ascii=False)
    return wide(services) if output == "wide" else overview(services)


def observe(state: StateDir, *, name: str | None) -> tuple[Service, ...]:
    """Reads the state folder and asks the gateway."""
    existing = names(state.services)
    if name is not None and name not in existing:
        raise CliError(unknown_name(name, existing))
    if not existing:
        raise CliError(f"there are no ModelServices in {state.root}; start some with: layercast up -f FILE")
    about = state.about()
    gateway = str(about.get("gateway") or "") if state.running() else ""
    created = about.get("services")
    found = []
    for each in [name] if name is not None else existing:
        since = created.get(each) if isinstance(created, dict) else None
        document = read_service(state.services, each)
        found.append(
            Service(
                name=each,
                wanted=int(document["spec"].get("replicas", 1)),
                status=read_status(state.status, each),
                metrics=fetch_metrics(gateway, each) if gateway else None,
                age_s=time.time() - since if isinstance(since, (int, float)) else None,
            )
        )
    return tuple(found)


def overview(services: Sequence[Service]) -> str:
    """One line a ModelService."""
    return words.table(HEADER, [_row(each) for each in services])


def wide(services: Sequence[Service]) -> str:
    """The overview, then one line a replica."""
    parts = [overview(services)]
    for service in services:
        replicas = service.status.replicas if service.status is not None else ()
        if replicas:
            parts.append(words.table(WIDE_HEADER, [_replica_row(each) for each in replicas]))
        parts.extend(f"{each.replica_id}: {each.error}" for each in replicas if each.error)
        copies = service.status.host_copies if service.status is not None else ()
        if copies:
            parts.append("\n".join(f"{service.name} in host memory of {host_copy(each)}" for each in copies))
    return "\n\n".join(parts)


def loading(replicas: Sequence[ReplicaStatus]) -> tuple[ReplicaStatus, ...]:
    """Those whose parameters are on their way."""
    return tuple(each for each in replicas if each.arriving)


def _row(service: Service) -> list[str]:
    status = service.status
    if status is None:
        return [service.name, f"0/{service.wanted}", "-", "-", "-", words.age(service.age_s)]
    coming = loading(status.replicas)
    there = ", ".join(f"{each.layers_resident}/{each.layers_total} layers {each.share} %" for each in coming)
    p99 = histogram_quantile(0.99, service.metrics.ttft_buckets) if service.metrics is not None else None
    return [
        service.name,
        f"{status.serving}/{status.desired}",
        f"{len(coming)} ({there})" if coming else "-",
        ", ".join(sorted({each.source for each in coming if each.source})) or "-",
        words.duration(p99),
        words.age(service.age_s),
    ]


def _replica_row(replica: ReplicaStatus) -> list[str]:
    return [
        replica.replica_id,
        replica.node,
        replica.device,
        replica.role or "-",
        replica.state,
        f"{replica.layers_resident}/{replica.layers_total}",
        replica.source or "-",
        words.gigabytes_per_s(replica.bytes_per_s),
        str(replica.requests_waiting),
        str(replica.requests_running),
        f"{replica.handoffs_given} given, {replica.handoffs_taken} taken",
    ]
