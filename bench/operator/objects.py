"""Where the benchmark of the operator keeps its ModelServices: a folder, or a Kubernetes API server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from layercast_operator.cluster.api import MERGE, KubeApi, log_in
from layercast_operator.crd import crd
from layercast_operator.errors import KubernetesError

AT_ONCE = 16
CONFLICT = 409


def modelservice(name: str, replicas: int) -> dict[str, Any]:
    """One object: it may grow by one, and does not shrink while the benchmark looks."""
    scaling = {"min": replicas, "max": replicas + 1, "windows": {"scaleDownSeconds": 3600}}
    spec = {"model": {"source": f"file:///models/{name}"}, "replicas": replicas, "scaling": scaling}
    return {
        "apiVersion": "layercast.dev/v1alpha1",
        "kind": "ModelService",
        "metadata": {"name": name},
        "spec": spec,
    }


class FolderObjects:
    """Files."""

    def __init__(self, root: Path, replicas: int) -> None:
        self._root, self._replicas = root, replicas

    def flags(self) -> list[str]:
        """What the operator is told."""
        return ["--local-dir", str(self._root)]

    async def prepare(self, agents: dict[str, str], gateway: str, models: list[str]) -> None:
        """All files."""
        (self._root / "modelservices").mkdir()
        for model in models:
            self._write(model, self._replicas)
        cluster = {"agents": agents, "gateways": [gateway]}
        (self._root / "cluster.json").write_text(json.dumps(cluster))

    async def set_replicas(self, model: str, replicas: int) -> None:
        """Replace one file."""
        self._write(model, replicas)

    async def close(self) -> None:
        """The folder goes with its owner."""

    def _write(self, model: str, replicas: int) -> None:
        path = self._root / "modelservices" / f"{model}.yaml"
        scratch = path.with_suffix(".new")
        scratch.write_text(yaml.safe_dump(modelservice(model, replicas)))
        scratch.replace(path)


class ApiObjects:
    """Objects of an API server, in a namespace of their own; nodes and pods that exist there only."""

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self._api = KubeApi(log_in())
        self._namespace = f"bench-{secrets.token_hex(4)}"
        self._nodes: list[str] = []
        self._alive: asyncio.Task[None] | None = None
        self._limit = asyncio.Semaphore(AT_ONCE)

    def flags(self) -> list[str]:
        """What the operator is told."""
        return ["--namespace", self._namespace, "--watch-namespaces", self._namespace]

    async def prepare(self, agents: dict[str, str], gateway: str, models: list[str]) -> None:
        """CRD, namespace, nodes, pods, ModelServices."""
        definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        with contextlib.suppress(KubernetesError):  # it is there
            await self._api.call("POST", definitions, body=crd())
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self._namespace}}
        await self._api.call("POST", "/api/v1/namespaces", body=namespace)
        await asyncio.sleep(2)  # its service account is made, and the definition is served
        named = {f"{self._namespace}-{name}": address for name, address in agents.items()}
        await asyncio.gather(*(self._node(name) for name in named))
        self._alive = asyncio.create_task(self._keep_alive(next(iter(named))))
        pods = [self._pod(f"agent-{name}", name, "agent", "grpc", address) for name, address in named.items()]
        pods.append(self._pod("gateway", next(iter(named)), "gateway", "http", gateway))
        await asyncio.gather(*pods)
        path = f"/apis/layercast.dev/v1alpha1/namespaces/{self._namespace}/modelservices"
        await asyncio.gather(
            *(self._call("POST", path, body=modelservice(model, self._replicas)) for model in models)
        )

    async def set_replicas(self, model: str, replicas: int) -> None:
        """As kubectl scale does."""
        path = f"/apis/layercast.dev/v1alpha1/namespaces/{self._namespace}/modelservices/{model}"
        body = {"spec": {"replicas": replicas}}
        await self._api.call("PATCH", path, body=body, content_type=MERGE)

    async def close(self) -> None:
        """Delete all of it."""
        if self._alive is not None:
            self._alive.cancel()
        paths = [f"/api/v1/nodes/{node}" for node in self._nodes]
        paths.append(f"/api/v1/namespaces/{self._namespace}")
        await asyncio.gather(*(self._call("DELETE", path) for path in paths), return_exceptions=True)
        await self._api.close()

    async def _call(self, method: str, path: str, **more: Any) -> None:
        async with self._limit:
            await self._api.call(method, path, deadline_s=30, **more)

    async def _node(self, name: str) -> None:
        self._nodes.append(name)
        await self._call(
            "POST", "/api/v1/nodes", body={"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
        )

    async def _pod(self, name: str, node: str, component: str, port_name: str, address: str) -> None:
        host, _, port = address.rpartition(":")
        labels = {"app.kubernetes.io/name": "layercast", "app.kubernetes.io/component": component}
        ports = [{"name": port_name, "containerPort": int(port)}]
        spec = {
            "nodeName": node,
            "automountServiceAccountToken": False,
            "tolerations": [{"operator": "Exists"}],
            "containers": [{"name": "c", "image": "none", "ports": ports}],
        }
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}
        path = f"/api/v1/namespaces/{self._namespace}/pods"
        await self._call("POST", path, body=body)
        status = {"phase": "Running", "podIP": host, "conditions": [{"type": "Ready", "status": "True"}]}
        await self._call("PATCH", f"{path}/{name}/status", body={"status": status}, content_type=MERGE)

    async def _keep_alive(self, node: str) -> None:
        """The gateway's node: without a kubelet its pods would be unready in seconds."""
        while True:
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            condition = {"type": "Ready", "status": "True", "lastHeartbeatTime": now, "reason": "Bench"}
            body = {"status": {"conditions": [condition]}}
            with contextlib.suppress(KubernetesError):
                await self._call("PATCH", f"/api/v1/nodes/{node}/status", body=body, content_type=MERGE)
            await asyncio.sleep(2)
