"""Which processes a local cluster consists of, and with which flags: the documented interface of the three
programs.

Pure: a layout (addresses, folders, shares) goes in, a list of programs comes out. `LocalCluster` makes the
layout and keeps the programs running; its tests pass other programs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layercast_cli.shares import CpuPlan
from layercast_cli.state import StateDir
from layercast_cli.supervise import Program

LOOPBACK = "127.0.0.1"
POLICIES = ("live", "stop-the-world", "network", "host-cache", "ttl-cache")
# Sources are not the current folder, and logs appear line by line.
ENVIRONMENT = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """What a local cluster shall be like.

    `services` are checked ModelService documents. `policy` empty leaves each ModelService its own. `port` 0
    takes a free one. `link_bytes_per_s` 0 leaves the links between agents unlimited, `disk_bytes_per_s` 0 their
    disks. `cpu_share`, `device_memory_bytes` and `host_pool_bytes` None share out what the machine has.
    `reserve_bytes` of each device's memory are touched at the start, as a GPU's always are: the first touch of fresh
    memory costs a load more processor time than all the rest. `gateway_flags` are appended to the gateway's. `fresh`
    forgets the checkpoints that an earlier cluster on this folder packed: its nodes begin with empty disks. `tls` makes
    certificates and has all processes demand them of one another.
    """

    state_dir: Path
    services: tuple[Mapping[str, Any], ...]
    agents: int = 1
    policy: str = ""
    host: str = LOOPBACK
    port: int = 0
    link_bytes_per_s: int = 0
    disk_bytes_per_s: int = 0
    cpu_share: float | None = None
    devices: str = "cpu:1"
    device_memory_bytes: int | None = None
    host_pool_bytes: int | None = None
    reserve_bytes: int = 0
    gateway_flags: tuple[str, ...] = ()
    fresh: bool = False
    tls: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLayout:
    """One agent: its addresses (host:port) and its part of the machine."""

    name: str
    address: str
    data_address: str
    metrics_address: str
    cpus: CpuPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterLayout:
    """Everything that the flags of the processes need."""

    state: StateDir
    settings: ClusterSettings
    nodes: tuple[NodeLayout, ...]
    gateway_listen: str
    gateway_address: str
    operator_address: str
    operator_metrics_address: str
    device_memory_bytes: int
    host_pool_bytes: int = 0
    environment: Mapping[str, str] = field(default_factory=lambda: dict(ENVIRONMENT))


def layercast_programs(layout: ClusterLayout) -> tuple[Program, ...]:
    """Agents first: they take longest to warm up."""
    agents = tuple(_program(layout, node.name, "agent", agent_flags(layout, node)) for node in layout.nodes)
    return (
        *agents,
        _program(layout, "operator", "operator", operator_flags(layout)),
        _program(layout, "gateway", "gateway", gateway_flags(layout)),
    )


def agent_flags(layout: ClusterLayout, node: NodeLayout) -> tuple[str, ...]:
    """Command of one agent."""
    folder = layout.state.node(node.name)
    flags = (
        *(
            "layercast_agent",
            "--node",
            node.name,
            "--listen",
            node.address,
            "--data-listen",
            node.data_address,
        ),
        *("--metrics-listen", node.metrics_address, "--leaf", "local"),
        *("--store-dir", str(folder / "store"), "--run-dir", str(folder / "run")),
        *("--host-pool-bytes", str(layout.host_pool_bytes)),
        *("--devices", layout.settings.devices, "--device-memory-bytes", str(layout.device_memory_bytes)),
        *(
            "--cpu-share",
            str(node.cpus.share),
            "--cpu-cores",
            ",".join(str(core) for core in node.cpus.cores),
        ),
        *("--token-file", str(layout.state.token_file), "--log-format", "text"),
    )
    numbers = {
        "--egress-bytes-per-s": layout.settings.link_bytes_per_s,
        "--disk-bytes-per-s": layout.settings.disk_bytes_per_s,
        "--reserve-bytes": layout.settings.reserve_bytes,
    }
    given = (part for flag, number in numbers.items() if number for part in (flag, str(number)))
    return (*flags, *given)


def operator_flags(layout: ClusterLayout) -> tuple[str, ...]:
    """Command of the operator core."""
    policy = ("--policy", layout.settings.policy) if layout.settings.policy else ()
    return (
        *("layercast_operator", "--local-dir", str(layout.state.root), "--listen", layout.operator_address),
        *("--metrics-listen", layout.operator_metrics_address, "--log-format", "text", *policy),
    )


def gateway_flags(layout: ClusterLayout) -> tuple[str, ...]:
    """Command of the gateway."""
    return (
        *("layercast_gateway", "--listen", layout.gateway_listen, "--operator", layout.operator_address),
        *("--log-format", "text", *layout.settings.gateway_flags),
    )


def _program(layout: ClusterLayout, name: str, role: str, module_and_flags: tuple[str, ...]) -> Program:
    tls = {"LAYERCAST_TLS_DIR": str(layout.state.certificates / role)} if layout.settings.tls else {}
    return Program(
        name=name,
        argv=(sys.executable, "-m", *module_and_flags),
        log=layout.state.logs / f"{name}.log",
        pid_file=layout.state.pids / f"{name}.pid",
        env={**layout.environment, **tls},
    )
