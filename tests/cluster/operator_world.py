"""A namespace with nodes and pods that exist in the API server only, and scripted agents behind their addresses.

The operator finds them as it finds real ones. Nodes without a kubelet would be NotReady in seconds: a task here
keeps telling that they are well.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import secrets
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from layercast_operator.__main__ import serve
from layercast_operator.cluster.api import MERGE, KubeApi, log_in
from layercast_operator.errors import KubernetesError
from layercast_operator.settings import parse_settings

ROOT = Path(__file__).resolve().parents[2]
SERVICES = "/apis/layercast.dev/v1alpha1/namespaces/{}/modelservices"
HEARTBEAT_S = 2.0


def scripted() -> Any:
    """The module with the scripted agents of tests/control."""
    name = "cluster_scripted_agent"
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests/control/scripted_agent.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class OperatorWorld:
    """One namespace; close it, and nothing is left."""

    def __init__(self) -> None:
        self.api = KubeApi(log_in())
        self.namespace = f"op-{secrets.token_hex(4)}"
        self.wire = scripted()
        self.agents = {f"{self.namespace}-{i}": self.wire.ScriptedAgent(f"node-{i}") for i in range(3)}
        self.gateway = self.wire.ScriptedGateway()
        self._stack = contextlib.AsyncExitStack()

    async def start(self) -> None:
        """Namespace, nodes, pods, agents."""
        self._stack.push_async_callback(self.api.close)
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}}
        await self.api.call("POST", "/api/v1/namespaces", body=body)
        self._stack.push_async_callback(self._quietly, "DELETE", f"/api/v1/namespaces/{self.namespace}")
        await self.gateway.start()
        self._stack.push_async_callback(self.gateway.stop)
        for node, agent in self.agents.items():
            await agent.start()
            self._stack.push_async_callback(agent.stop)
            await self.api.call("POST", "/api/v1/nodes", body=_node(node))
            self._stack.push_async_callback(self._quietly, "DELETE", f"/api/v1/nodes/{node}")
        heartbeat = asyncio.create_task(self._heartbeat())
        self._stack.callback(heartbeat.cancel)
        for node, agent in self.agents.items():
            await self._pod(f"agent-{node}", node, "agent", "grpc", agent.address)
        await self._pod("gateway", next(iter(self.agents)), "gateway", "http", self.gateway.address)

    async def close(self) -> None:
        """Take everything away."""
        await self._stack.aclose()

    def flags(self, *more: str) -> list[str]:
        """What the operator is started with."""
        scope = ["--namespace", self.namespace, "--watch-namespaces", self.namespace]
        ports = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
        return [*scope, *ports, "--tick-s", "0.05", *more]

    @contextlib.asynccontextmanager
    async def operator(self, *more: str) -> Any:
        """An operator in this process, until the block ends."""
        stop = asyncio.Event()
        task = asyncio.create_task(serve(parse_settings(self.flags(*more), {}), stop))
        try:
            yield task
        finally:
            stop.set()
            await task

    async def put(self, name: str = "m", **spec: Any) -> None:
        """Create a ModelService."""
        spec = {"model": {"source": f"file:///models/{name}"}, "replicas": 1, **spec}
        body = {
            "apiVersion": "layercast.dev/v1alpha1",
            "kind": "ModelService",
            "metadata": {"name": name},
            "spec": spec,
        }
        await self.api.call("POST", SERVICES.format(self.namespace), body=body)

    async def patch(self, name: str, body: Any, *, sub: str = "") -> Any:
        """Merge into a ModelService or a subresource of it."""
        path = f"{SERVICES.format(self.namespace)}/{name}{sub}"
        return await self.api.call("PATCH", path, body=body, content_type=MERGE)

    async def get(self, name: str = "m", *, sub: str = "") -> Any:
        """A ModelService as it is."""
        return await self.api.call("GET", f"{SERVICES.format(self.namespace)}/{name}{sub}")

    async def status(self, name: str = "m") -> Any:
        """Its status; empty before the first."""
        return (await self.get(name)).get("status") or {}

    async def condition(self, kind: str, name: str = "m") -> tuple[str, str]:
        """Status and reason of a condition."""
        for condition in (await self.status(name)).get("conditions", ()):
            if condition["type"] == kind:
                return condition["status"], condition["reason"]
        return "", ""

    async def events(self, name: str = "m") -> dict[str, str]:
        """Reason to messages of the events of a ModelService."""
        found = await self.api.call("GET", f"/api/v1/namespaces/{self.namespace}/events")
        ours = [e for e in found["items"] if e["involvedObject"]["name"] == name]
        return {e["reason"]: " ".join(o["message"] for o in ours if o["reason"] == e["reason"]) for e in ours}

    async def holder(self) -> str:
        """Who has the Lease."""
        path = f"/apis/coordination.k8s.io/v1/namespaces/{self.namespace}/leases/layercast-operator"
        with contextlib.suppress(KubernetesError):
            return str((await self.api.call("GET", path))["spec"].get("holderIdentity") or "")
        return ""

    def finish(self) -> None:
        """Transfers that were begun are complete."""
        for agent in self.agents.values():
            agent.finish()

    def replicas(self) -> dict[str, str]:
        """Replica to the node that it is on."""
        return {replica: node for node, agent in self.agents.items() for replica in agent.replicas}

    async def cordon(self, node: str) -> None:
        """As kubectl cordon does."""
        await self.api.call(
            "PATCH", f"/api/v1/nodes/{node}", body={"spec": {"unschedulable": True}}, content_type=MERGE
        )

    async def _pod(self, name: str, node: str, component: str, port_name: str, address: str) -> None:
        labels = {"app.kubernetes.io/name": "layercast", "app.kubernetes.io/component": component}
        host, _, port = address.rpartition(":")
        container = {
            "name": "c",
            "image": "none",
            "ports": [{"name": port_name, "containerPort": int(port)}],
        }
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "nodeName": node,
                "automountServiceAccountToken": False,
                "terminationGracePeriodSeconds": 0,
                "tolerations": [{"operator": "Exists"}],
                "containers": [container],
            },
        }
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        async with asyncio.timeout(20):
            while True:
                try:
                    await self.api.call("POST", path, body=body)
                    break
                except KubernetesError as error:
                    if error.code != 403:  # the namespace's service account is made a moment after it
                        raise
                    await asyncio.sleep(0.1)
        status = {
            "phase": "Running",
            "podIP": host,
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        await self.api.call("PATCH", f"{path}/{name}/status", body={"status": status}, content_type=MERGE)

    async def _heartbeat(self) -> None:
        while True:
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            for node in self.agents:
                ready = {"type": "Ready", "status": "True", "lastHeartbeatTime": now, "reason": "Test"}
                body = {"status": {"conditions": [ready]}}
                with contextlib.suppress(KubernetesError):
                    await self.api.call(
                        "PATCH", f"/api/v1/nodes/{node}/status", body=body, content_type=MERGE
                    )
            await asyncio.sleep(HEARTBEAT_S)

    async def _quietly(self, method: str, path: str) -> None:
        with contextlib.suppress(KubernetesError):
            await self.api.call(method, path)


def _node(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"layercast.test": "yes"}},
    }
