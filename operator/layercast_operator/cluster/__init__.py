"""Where desired state comes from and status goes to: the one seam between the core and what runs it.

`local` reads and writes files, `kubernetes` speaks to an API server. Everything else of the operator is the same with
and without Kubernetes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from layercast_operator.modelservice import ModelService
from layercast_operator.snapshot import NodeFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class InvalidModel:
    """Something that was meant to be a ModelService and never was one."""

    name: str
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """What is wanted, and where the parts of the cluster are."""

    models: tuple[ModelService, ...] = ()
    """The newest usable specification of each; `problem` of one says when there is a newer, unusable one."""
    invalid: tuple[InvalidModel, ...] = ()
    agents: Mapping[str, str] = field(default_factory=dict)
    """Node to host:port of its AgentService."""
    gateways: tuple[str, ...] = ()
    """host:port of each gateway's HTTP."""
    nodes: Mapping[str, NodeFacts] = field(default_factory=dict)
    """What the cluster knows of nodes; empty where it knows nothing."""
    complete: bool = True
    """False when something could not be read: then nothing that is missing counts as deleted."""
    problem: str = ""
    """What could not be read, in words."""


class Cluster(Protocol):
    """A source of desired state and a place for status. No method raises for what a user wrote."""

    async def desired(self) -> Desired:
        """What is wanted now; the last usable state where the newest cannot be used."""

    async def last_status(self, name: str) -> Mapping[str, Any] | None:
        """The status that was written last, maybe by an earlier process; None when there is none."""

    async def write_status(self, name: str, status: Mapping[str, Any]) -> None:
        """Publish the status of one ModelService."""

    async def forget(self, name: str) -> None:
        """Its ModelService is gone and so are its replicas: remove the status."""
