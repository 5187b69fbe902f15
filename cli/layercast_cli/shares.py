"""How one machine's cores and memory are shared out among agents that play separate machines. Pure but for
reading the limits of this process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

# What gateway, operator and client take of the cores when agents cannot have cores of their own.
CONTROL_CORES = 0.3
# Of the free memory, what devices may use: the rest is for Python, torch and the page cache.
DEVICE_MEMORY_FRACTION = 0.6
# ... and what the agents' host pools may take of it. They are taken at the start, so a laptop must not notice.
HOST_POOL_FRACTION = 0.15
HOST_POOL_BYTES_MAX = 640 << 20
CGROUP_MEMORY_MAX = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuPlan:
    """What one agent's workers may use: `share` of one core's time (or of all, when `cores` are its own)."""

    cores: tuple[int, ...]
    share: float


def plan_cpus(cores: Sequence[int], agents: int, *, share: float | None = None) -> tuple[CpuPlan, ...]:
    """One plan for each agent.

    With more cores than agents, each agent has cores of its own and one core or more is left for gateway,
    operator and client. Otherwise all use all cores, each for an equal share of the time, so that one
    replica more is capacity more, as on separate machines. `share` given: as asked, on all cores.
    """
    ordered = tuple(sorted(cores))
    if share is not None:
        return tuple(CpuPlan(cores=ordered, share=share) for _ in range(agents))
    if len(ordered) >= agents + 1:
        each = (len(ordered) - 1) // agents
        return tuple(CpuPlan(cores=ordered[i * each : (i + 1) * each], share=1.0) for i in range(agents))
    equal = round(min(1.0, (len(ordered) - CONTROL_CORES) / agents), 3)
    return tuple(CpuPlan(cores=ordered, share=equal) for _ in range(agents))


def usable_cores() -> tuple[int, ...]:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def device_memory_bytes(available_bytes: int, agents: int) -> int:
    """Memory of one agent's device, in whole MiB."""
    mebibyte = 1 << 20
    return int(available_bytes * DEVICE_MEMORY_FRACTION / agents) // mebibyte * mebibyte


def host_pool_bytes(available_bytes: int, agents: int) -> int:
    """Host memory of one agent for copies of checkpoints, in whole MiB."""
    mebibyte = 1 << 20
    share = int(available_bytes * HOST_POOL_FRACTION / agents)
    return min(share, HOST_POOL_BYTES_MAX) // mebibyte * mebibyte


def available_memory_bytes() -> int:
    """Memory that is free for us: the machine's, or less where a container is limited."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = CGROUP_MEMORY_MAX.read_text().strip()
    except OSError:
        return free
    return min(free, int(limit)) if limit.isdigit() else free
