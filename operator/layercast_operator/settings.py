"""Settings of the operator: read from flags and environment once, checked, never changed."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from layercast_operator.cluster.pods import Component, parse_selector
from layercast_operator.errors import SettingsError
from layercast_operator.modelservice import ScalePolicy

PORT_MAX = 65535
_LABELS = "app.kubernetes.io/name=layercast,app.kubernetes.io/component="


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a server listens; port 0 lets the system choose."""

    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesSettings:
    """What is only said where there is an API server."""

    namespace: str
    """Ours: agents, gateways and the Lease are in it; empty means that of the service account or the kubeconfig."""

    watch_namespaces: tuple[str, ...]
    """Where ModelServices are looked for; empty means everywhere."""

    identity: str
    """Who we are in the Lease: unique in the cluster."""

    lease_name: str
    """Operators with the same Lease never act at the same time."""

    agents: Component
    """How the agents' pods are found."""

    gateways: Component
    """How the gateways' pods are found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the operator is told at its start; every flag is also LAYERCAST_<FLAG> in the environment."""

    local_dir: Path | None
    """The folder that stands for the API server: modelservices/, cluster.json, status/. None: Kubernetes."""

    listen: Address
    """RouteService, for gateways."""

    metrics_listen: Address
    """/metrics, /healthz, /readyz."""

    policy: ScalePolicy | None
    """Overrides spec.scaling.policy of every ModelService; None leaves them alone."""

    tick_s: float
    """Longest time between two passes."""

    agent_deadline_s: float
    """How long an agent may take to tell its status."""

    agent_lost_after_s: float
    """An agent that has not answered for so long counts as gone with its replicas."""

    demand_age_max_s: float
    """Older demand is unknown, and what is unknown shrinks nothing."""

    tls_dir: Path | None
    """Folder with ca.crt, tls.crt and tls.key, read again when they change; None: nothing is encrypted."""

    prometheus_url: str
    """Where demand is asked for besides the gateways; empty means nowhere."""

    prometheus_every_s: float
    """Time between two rounds of questions to Prometheus."""

    prometheus_token_file: Path | None
    """A bearer token for it, read again for each question."""

    log_format: str
    """`text`, or `json` for one JSON object a line."""

    kubernetes: KubernetesSettings | None = None
    """None where there is a `local_dir`."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence instead of the whole usage."""
        raise SettingsError(f"{message}; --help lists the flags")


def _flags(environment: Mapping[str, str]) -> _Parser:
    parser = _Parser(
        prog="layercast-operator",
        description="Decides how many replicas serve each model, where they are, and who feeds them.",
    )

    def flag(name: str, text: str, *, default: str | None = None) -> None:
        variable = f"LAYERCAST_{name.upper().replace('-', '_')}"
        shown = f"{text} (default {default})" if default else text
        parser.add_argument(f"--{name}", help=shown, default=environment.get(variable, default))

    flag("local-dir", "folder with modelservices/, cluster.json and status/; without it: Kubernetes")
    flag("namespace", "our own namespace (default: that of the service account)", default="")
    flag("watch-namespaces", "where ModelServices are, a,b; empty means everywhere", default="")
    flag("identity", "our name in the Lease (default: POD_NAME or the host's name)", default="")
    flag("lease-name", "operators that share it never act at the same time", default="layercast-operator")
    flag("agent-selector", "labels of the agents' pods", default=f"{_LABELS}agent")
    flag("agent-port", "port of AgentService where the pod names none `grpc`", default="7100")
    flag("gateway-selector", "labels of the gateways' pods", default=f"{_LABELS}gateway")
    flag("gateway-port", "port of a gateway where the pod names none `http`", default="8080")
    flag("listen", "host:port of RouteService", default="127.0.0.1:7000")
    flag("metrics-listen", "host:port of /metrics, /healthz, /readyz", default="127.0.0.1:7090")
    flag(
        "policy",
        "one for every ModelService: live, stop-the-world, network, host-cache, ttl-cache",
        default="",
    )
    flag("tick-s", "longest time between two passes in seconds", default="0.2")
    flag("agent-deadline-s", "how long an agent may take to answer", default="1")
    flag("agent-lost-after-s", "when a silent agent counts as gone", default="5")
    flag("demand-age-max-s", "when the demand that a gateway told is unknown", default="2")
    flag("tls-dir", "folder with ca.crt, tls.crt and tls.key; without it plaintext", default="")
    flag("prometheus-url", "http(s) address of Prometheus; empty means none", default="")
    flag("prometheus-every-s", "time between two rounds of questions", default="5")
    flag("prometheus-token-file", "file with a bearer token for it", default="")
    flag("log-format", "text or json", default="text")
    return parser


def parse_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Settings from flags, else environment, else defaults. Raises SettingsError with one sentence."""
    flags = _flags(environment).parse_args(arguments)
    local_dir = Path(flags.local_dir).expanduser() if flags.local_dir else None
    if local_dir is not None and not local_dir.is_dir():
        raise SettingsError(f"--local-dir {local_dir}: there is no such folder")
    policies = {policy.value: policy for policy in ScalePolicy}
    if flags.policy and flags.policy not in policies:
        raise SettingsError(f"--policy {flags.policy!r} must be one of {', '.join(policies)}")
    if flags.log_format not in {"text", "json"}:
        raise SettingsError(f"--log-format {flags.log_format!r} must be text or json")
    return Settings(
        local_dir=local_dir,
        kubernetes=_kubernetes(flags, environment) if local_dir is None else None,
        listen=_address(flags.listen, "--listen"),
        metrics_listen=_address(flags.metrics_listen, "--metrics-listen"),
        policy=policies.get(flags.policy),
        tick_s=_seconds(flags.tick_s, "--tick-s"),
        agent_deadline_s=_seconds(flags.agent_deadline_s, "--agent-deadline-s"),
        agent_lost_after_s=_seconds(flags.agent_lost_after_s, "--agent-lost-after-s"),
        demand_age_max_s=_seconds(flags.demand_age_max_s, "--demand-age-max-s"),
        tls_dir=Path(flags.tls_dir) if flags.tls_dir else None,
        prometheus_url=_url(flags.prometheus_url, "--prometheus-url"),
        prometheus_every_s=_seconds(flags.prometheus_every_s, "--prometheus-every-s"),
        prometheus_token_file=Path(flags.prometheus_token_file) if flags.prometheus_token_file else None,
        log_format=flags.log_format,
    )


def _kubernetes(flags: argparse.Namespace, environment: Mapping[str, str]) -> KubernetesSettings:
    own_name = environment.get("POD_NAME", "") or f"{socket.gethostname()}-{os.getpid()}"
    return KubernetesSettings(
        namespace=flags.namespace,
        watch_namespaces=tuple(filter(None, flags.watch_namespaces.split(","))),
        identity=flags.identity or own_name,
        lease_name=flags.lease_name,
        agents=_component(flags.agent_selector, "--agent-selector", "grpc", flags.agent_port),
        gateways=_component(flags.gateway_selector, "--gateway-selector", "http", flags.gateway_port),
    )


def _component(selector: str, flag: str, port_name: str, port: str) -> Component:
    try:
        labels = parse_selector(selector)
    except ValueError as error:
        raise SettingsError(f"{flag}: {error}") from None
    if not port.isdecimal() or not 0 < int(port) <= PORT_MAX:
        raise SettingsError(f"{flag.replace('selector', 'port')} {port!r} is not a port")
    return Component(labels=labels, port_name=port_name, port=int(port))


def _address(text: str, flag: str) -> Address:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > PORT_MAX:
        raise SettingsError(f"{flag} {text!r} is not host:port")
    return Address(host=host, port=int(port))


def _url(text: str, flag: str) -> str:
    if text and not text.startswith(("http://", "https://")):
        raise SettingsError(f"{flag} {text!r} must start with http:// or https://")
    return text


def _seconds(text: str, flag: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise SettingsError(f"{flag} {text!r} is not a number") from None
    if not 0.01 <= value <= 3600:
        raise SettingsError(f"{flag} {text} must be between 0.01 and 3600 seconds")
    return value
