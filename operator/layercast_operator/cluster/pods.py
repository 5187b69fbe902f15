"""From Kubernetes' objects to where agents and gateways are and what the nodes are like. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from layercast_operator.snapshot import LOSING_AGENT, NodeFacts

Object = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """How pods of one kind of ours are found: by labels; and reached: by the name of a port."""

    labels: Mapping[str, str]
    port_name: str
    port: int
    """Where the pod names no such port."""

    @property
    def selector(self) -> str:
        """As the API server wants it."""
        return ",".join(f"{key}={value}" for key, value in sorted(self.labels.items()))

    def covers(self, pod: Object) -> bool:
        """Whether a pod is one of these."""
        found = (pod.get("metadata") or {}).get("labels") or {}
        return all(found.get(key) == value for key, value in self.labels.items())


def parse_selector(text: str) -> dict[str, str]:
    """`a=b,c=d` as labels. Raises ValueError with one sentence."""
    labels = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{text!r} is not key=value,key=value")
        labels[key.strip()] = value.strip()
    if not labels:
        raise ValueError("it names no label")
    return labels


def agent_addresses(pods: Iterable[Object], agents: Component) -> dict[str, str]:
    """Node to address of its agent. Where an old and a new pod meet on a node, the one that stays counts."""
    best: dict[str, tuple[tuple[bool, bool, str], str]] = {}
    for pod in pods:
        node = str((pod.get("spec") or {}).get("nodeName") or "")
        if not node or not agents.covers(pod) or not _runs(pod):
            continue
        rank = (not _ends(pod), _ready(pod), _created(pod))
        if node not in best or rank > best[node][0]:
            best[node] = (rank, _address(pod, agents))
    return {node: address for node, (_, address) in sorted(best.items())}


def gateway_addresses(pods: Iterable[Object], gateways: Component) -> tuple[str, ...]:
    """Addresses of gateways that take requests; others have no say in demand."""
    return tuple(
        sorted(
            _address(pod, gateways)
            for pod in pods
            if gateways.covers(pod) and _runs(pod) and _ready(pod) and not _ends(pod)
        )
    )


def node_facts(nodes: Iterable[Object], pods: Iterable[Object], agents: Component) -> dict[str, NodeFacts]:
    """What Kubernetes knows of nodes: labels, and why one is to be left."""
    leaving = {
        str((pod.get("spec") or {}).get("nodeName") or ""): pod
        for pod in pods
        if agents.covers(pod) and _ends(pod)
    }
    staying = {
        str((pod.get("spec") or {}).get("nodeName") or "")
        for pod in pods
        if agents.covers(pod) and not _ends(pod) and _runs(pod)
    }
    facts = {}
    for node in nodes:
        metadata = node.get("metadata") or {}
        name = str(metadata.get("name") or "")
        why = ""
        if (node.get("spec") or {}).get("unschedulable"):
            why = "cordoned"
        elif metadata.get("deletionTimestamp"):
            why = "being deleted"
        elif name in leaving and name not in staying:
            why = LOSING_AGENT
        facts[name] = NodeFacts(labels=dict(metadata.get("labels") or {}), leaving=why)
    return facts


def _runs(pod: Object) -> bool:
    status = pod.get("status") or {}
    return status.get("phase") == "Running" and bool(status.get("podIP"))


def _ready(pod: Object) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)


def _ends(pod: Object) -> bool:
    return bool((pod.get("metadata") or {}).get("deletionTimestamp"))


def _created(pod: Object) -> str:
    return str((pod.get("metadata") or {}).get("creationTimestamp") or "")


def _address(pod: Object, component: Component) -> str:
    host = str((pod.get("status") or {}).get("podIP") or "")
    host = f"[{host}]" if ":" in host else host
    containers = (pod.get("spec") or {}).get("containers") or ()
    ports = (port for container in containers for port in container.get("ports") or ())
    named = (port.get("containerPort") for port in ports if port.get("name") == component.port_name)
    return f"{host}:{next(named, None) or component.port}"
