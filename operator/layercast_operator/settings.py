"""Settings of the operator in local mode: read from flags and environment once, checked, never changed."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from layercast_operator.errors import SettingsError
from layercast_operator.modelservice import ScalePolicy

PORT_MAX = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a server listens; port 0 lets the system choose."""

    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the operator is told at its start; every flag is also LAYERCAST_<FLAG> in the environment."""

    local_dir: Path
    """The folder that stands for the API server: modelservices/, cluster.json, status/."""

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

    log_format: str
    """`text`, or `json` for one JSON object a line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence instead of the whole usage."""
        raise SettingsError(f"{message}; --help lists the flags")


def parse_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Settings from flags, else environment, else defaults. Raises SettingsError with one sentence."""
    parser = _Parser(
        prog="layercast-operator",
        description="Decides how many replicas serve each model, where they are, and who feeds them.",
    )

    def flag(name: str, text: str, *, default: str | None = None) -> None:
        variable = f"LAYERCAST_{name.upper().replace('-', '_')}"
        shown = f"{text} (default {default})" if default else text
        parser.add_argument(f"--{name}", help=shown, default=environment.get(variable, default))

    flag("local-dir", "folder with modelservices/, cluster.json and status/")
    flag("listen", "host:port of RouteService", default="127.0.0.1:7000")
    flag("metrics-listen", "host:port of /metrics, /healthz, /readyz", default="127.0.0.1:7090")
    flag("policy", "live or stop-the-world, for every ModelService", default="")
    flag("tick-s", "longest time between two passes in seconds", default="0.2")
    flag("agent-deadline-s", "how long an agent may take to answer", default="1")
    flag("agent-lost-after-s", "when a silent agent counts as gone", default="5")
    flag("demand-age-max-s", "when the demand that a gateway told is unknown", default="2")
    flag("log-format", "text or json", default="text")
    flags = parser.parse_args(arguments)
    if not flags.local_dir:
        raise SettingsError("--local-dir (or LAYERCAST_LOCAL_DIR) is missing")
    local_dir = Path(flags.local_dir).expanduser()
    if not local_dir.is_dir():
        raise SettingsError(f"--local-dir {local_dir}: there is no such folder")
    policies = {policy.value: policy for policy in ScalePolicy}
    if flags.policy and flags.policy not in policies:
        raise SettingsError(f"--policy {flags.policy!r} must be one of {', '.join(policies)}")
    if flags.log_format not in {"text", "json"}:
        raise SettingsError(f"--log-format {flags.log_format!r} must be text or json")
    return Settings(
        local_dir=local_dir,
        listen=_address(flags.listen, "--listen"),
        metrics_listen=_address(flags.metrics_listen, "--metrics-listen"),
        policy=policies.get(flags.policy),
        tick_s=_seconds(flags.tick_s, "--tick-s"),
        agent_deadline_s=_seconds(flags.agent_deadline_s, "--agent-deadline-s"),
        agent_lost_after_s=_seconds(flags.agent_lost_after_s, "--agent-lost-after-s"),
        demand_age_max_s=_seconds(flags.demand_age_max_s, "--demand-age-max-s"),
        log_format=flags.log_format,
    )


def _address(text: str, flag: str) -> Address:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > PORT_MAX:
        raise SettingsError(f"{flag} {text!r} is not host:port")
    return Address(host=host, port=int(port))


def _seconds(text: str, flag: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise SettingsError(f"{flag} {text!r} is not a number") from None
    if not 0.01 <= value <= 3600:
        raise SettingsError(f"{flag} {text} must be between 0.01 and 3600 seconds")
    return value
