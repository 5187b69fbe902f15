"""Settings of a worker, read from its flags once and never changed.

The agent starts workers and passes every flag; a person sets the agent's settings instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from layercast_agent.rdma import Rdma


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What a worker is told at its start."""

    node: str
    """Name of the node, for logs and reports."""

    device: str
    """`cpu:N` or `cuda:N`."""

    control_socket: Path
    """Unix socket on which the worker serves its agent."""

    listen: str
    """host:port of EngineService and PeerService; port 0 lets the kernel choose."""

    data_listen: str
    """host:port of the data plane; port 0 lets the kernel choose."""

    token: bytes
    """Shared secret of the data plane."""

    host_memory_socket: Path | None
    """Where the agent hands out its host pool; None when it has none."""
    rdma: Rdma
    """Whether to read from peers by RDMA."""

    tls_dir: Path | None
    """Folder of the agent's certificate; None leaves everything in plain text."""

    device_memory_bytes: int
    """What parameters and KV cache may use together."""

    reserve_bytes: int
    """Host memory of a CPU device that is touched before the first load; 0 for none. See `host_memory`."""

    cpu_share: float
    """Share of one core that a CPU device may use, in (0, 1]; see `pacing`."""

    cpu_cores: tuple[int, ...]
    """Cores that this process is pinned to; empty leaves it unpinned."""

    engine: str
    """Block implementation of models that ask for none: `auto`, `generic` or `fast`."""

    egress_bytes_per_s: int
    """Most parameter bytes sent per second; 0 is unlimited."""

    disk_bytes_per_s: int
    """Most bytes read from packed files per second; 0 is unlimited."""

    parent_pid: int
    """The agent. The worker ends with it; 0 lets it live alone (debugging)."""

    log_format: str
    """`text` or `json`."""


def parse(arguments: Sequence[str]) -> WorkerSettings:
    """Settings from command-line flags; exits with code 2 and a sentence when one is wrong."""
    parser = argparse.ArgumentParser(
        prog="layercast-worker", description="Owns one device and runs the engine; started by the agent."
    )
    parser.add_argument("--node", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--control-socket", required=True, type=Path)
    parser.add_argument("--listen", default="127.0.0.1:0")
    parser.add_argument("--data-listen", default="127.0.0.1:0")
    parser.add_argument("--token-file", required=True, type=Path)
    parser.add_argument("--host-memory-socket", default="")
    parser.add_argument("--rdma", default=Rdma.AUTO, type=Rdma)
    parser.add_argument("--tls-dir", default=None, type=Path)
    parser.add_argument("--device-memory-bytes", required=True, type=int)
    parser.add_argument("--reserve-bytes", default=0, type=int)
    parser.add_argument("--cpu-share", default=1.0, type=float)
    parser.add_argument("--cpu-cores", default="")
    parser.add_argument("--engine", default="auto", choices=["auto", "generic", "fast"])
    parser.add_argument("--egress-bytes-per-s", default=0, type=int)
    parser.add_argument("--disk-bytes-per-s", default=0, type=int)
    parser.add_argument("--parent-pid", default=0, type=int)
    parser.add_argument("--log-format", default="text", choices=["text", "json"])
    flags = parser.parse_args(arguments)
    if not 0 < flags.cpu_share <= 1:
        parser.error("--cpu-share must be above 0 and at most 1")
    try:
        token = flags.token_file.read_bytes().strip()
        cores = tuple(int(core) for core in flags.cpu_cores.split(",") if core)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return WorkerSettings(
        node=flags.node,
        device=flags.device,
        control_socket=flags.control_socket,
        listen=flags.listen,
        data_listen=flags.data_listen,
        token=token,
        host_memory_socket=Path(flags.host_memory_socket) if flags.host_memory_socket else None,
        rdma=flags.rdma,
        tls_dir=flags.tls_dir,
        device_memory_bytes=flags.device_memory_bytes,
        reserve_bytes=flags.reserve_bytes,
        cpu_share=flags.cpu_share,
        cpu_cores=cores,
        engine=flags.engine,
        egress_bytes_per_s=flags.egress_bytes_per_s,
        disk_bytes_per_s=flags.disk_bytes_per_s,
        parent_pid=flags.parent_pid,
        log_format=flags.log_format,
    )
