"""Whether this node can read its peers by RDMA, and why not: seen once at start, judged by a pure function.

A library that falls back in silence turns a network of 400 Gbit/s into one of 10, and nobody knows. So the choice is
made here, told in a sentence, and loud when RDMA was demanded.
"""

from __future__ import annotations

import importlib.util
import resource
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

INFINIBAND = Path("/sys/class/infiniband")
MEMLOCK_BYTES_MIN = 1 << 30
"""Registered memory is locked memory, and a model has gigabytes: what a default of 8 MiB cannot mean well."""


class Rdma(StrEnum):
    """What was asked for."""

    AUTO = "auto"
    REQUIRE = "require"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A port of a network card that speaks verbs."""

    device: str
    number: int
    state: str
    """As the kernel says it: ACTIVE, DOWN, INIT, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fabric:
    """What the node has."""

    ports: tuple[Port, ...]
    memlock_bytes: int | None
    """How much this process may lock; None is unlimited."""

    library: bool
    """Whether NIXL is installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What follows."""

    use: bool
    reason: str
    """A sentence for people."""

    loud: bool
    """RDMA was demanded and cannot be: a warning in logs, status and metrics instead of a remark."""


def judge(fabric: Fabric, asked: Rdma) -> Verdict:
    """Use RDMA exactly when a port is ACTIVE, memory may be locked, the library is there and nobody said no."""
    if asked is Rdma.OFF:
        return Verdict(use=False, reason="RDMA is turned off", loud=False)
    problem = _problem(fabric)
    if problem:
        return refused(problem, asked)
    active = ", ".join(f"{port.device}:{port.number}" for port in fabric.ports if port.state == "ACTIVE")
    return Verdict(use=True, reason=f"RDMA by {active}", loud=False)


def refused(problem: str, asked: Rdma) -> Verdict:
    """It cannot be used; whether that is more than a remark depends on what was asked."""
    return Verdict(use=False, reason=problem, loud=asked is Rdma.REQUIRE)


def _problem(fabric: Fabric) -> str:
    if not fabric.ports:
        return "this node has no RDMA device (/sys/class/infiniband is empty)"
    if all(port.state != "ACTIVE" for port in fabric.ports):
        states = ", ".join(f"{port.device}:{port.number} is {port.state}" for port in fabric.ports)
        return f"no RDMA port is ACTIVE: {states}"
    if fabric.memlock_bytes is not None and fabric.memlock_bytes < MEMLOCK_BYTES_MIN:
        return (
            f"only {fabric.memlock_bytes} bytes may be locked, RDMA needs {MEMLOCK_BYTES_MIN} and more "
            "(ulimit -l unlimited, or the capability IPC_LOCK)"
        )
    if not fabric.library:
        return "NIXL is not installed (the extra [rdma])"
    return ""


def look(root: Path = INFINIBAND) -> Fabric:
    """What this process sees."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Fabric(
        ports=tuple(sorted(_ports(root), key=lambda port: (port.device, port.number))),
        memlock_bytes=None if limit == resource.RLIM_INFINITY else limit,
        library=importlib.util.find_spec("nixl_cu12") is not None,
    )


def _ports(root: Path) -> list[Port]:
    found = []
    for state in root.glob("*/ports/*/state"):
        # "4: ACTIVE"
        text = state.read_text().strip().rpartition(":")[2].strip()
        found.append(Port(device=state.parts[-4], number=int(state.parts[-2]), state=text))
    return found
