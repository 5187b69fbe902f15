"""Agents and a gateway that speak the real protocols on loopback and do nothing but keep books.

Commands take effect as the proto's comments promise. A transfer is complete when the test says so.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc
from aiohttp import web
from layercast.agent.v1alpha1 import agent_pb2 as pb
from layercast.agent.v1alpha1 import agent_pb2_grpc
from layercast.peer.v1alpha1 import peer_pb2
from layercast.route.v1alpha1 import route_pb2, route_pb2_grpc

SEGMENT_BYTES = (1000, 4000, 4000, 1000)
LAYERS = 2
DIGEST = "d" * 64


class ScriptedAgent(agent_pb2_grpc.AgentServiceServicer):
    """One node with one device."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.address = ""
        self.checkpoints: dict[str, pb.Checkpoint] = {}
        self.replicas: dict[str, pb.Replica] = {}
        self.requests: list[Any] = []
        self.kept: list[set[str]] = []
        self.old = False  # of a version before KeepCheckpoints
        self.refuse: dict[str, tuple[grpc.StatusCode, str]] = {}
        self.memory_bytes = 100_000
        # Answers after StartReplica in which the worker's addresses are not known yet, as with the real agent.
        self.blank_answers = 2
        self._blank: dict[str, int] = {}
        self._server: grpc.aio.Server | None = None

    async def start(self, port: int = 0) -> None:
        """Serve; the same port again after a stop."""
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        agent_pb2_grpc.add_AgentServiceServicer_to_server(self, self._server)
        bound = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{bound}"
        await self._server.start()

    async def stop(self) -> None:
        """The process is gone: connections break at once."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def of(self, kind: type) -> list[Any]:
        """Requests of one kind, in order of arrival."""
        return [request for request in self.requests if isinstance(request, kind)]

    def finish(self) -> None:
        """All parameters are here."""
        for replica in self.replicas.values():
            if replica.state in {pb.REPLICA_STATE_LOADING, pb.REPLICA_STATE_LIVE}:
                replica.state = pb.REPLICA_STATE_SERVING
                replica.layers_resident = LAYERS
                replica.transfer.done_bytes = replica.transfer.total_bytes
                replica.timeline.complete_at.GetCurrentTime()
                replica.load.prefill_tokens_per_s = 1000.0
                replica.load.kv_pages_total = 100

    async def GetStatus(self, request: Any, context: Any) -> pb.GetStatusResponse:
        held = next(iter(self.replicas), "")
        state = pb.WORKER_STATE_ASSIGNED if held else pb.WORKER_STATE_IDLE
        return pb.GetStatusResponse(
            node=self.name,
            instance_id="1",
            peer=peer_pb2.Peer(peer_id=self.name, address=self.address, data_address="h:1"),
            devices=[
                pb.Device(
                    device_id="cpu:0", memory_bytes=self.memory_bytes, worker_state=state, replica_id=held
                )
            ],
            checkpoints=list(self.checkpoints.values()),
            replicas=[self._shown(replica) for replica in self.replicas.values()],
            egress_bytes_per_s=10_000,
            disk_bytes_per_s=10_000,
            leaf="local",
        )

    def _shown(self, replica: pb.Replica) -> pb.Replica:
        left = self._blank.get(replica.replica_id, 0)
        if not left:
            return replica
        self._blank[replica.replica_id] = left - 1
        blank = pb.Replica()
        blank.CopyFrom(replica)
        blank.ClearField("peer")
        blank.ClearField("transfer")
        return blank

    async def PrepareCheckpoint(self, request: Any, context: Any) -> pb.PrepareCheckpointResponse:
        await self._note(request, context)
        self.checkpoints[request.key] = pb.Checkpoint(
            key=request.key,
            digest=DIGEST,
            state=pb.CHECKPOINT_STATE_READY,
            segment_bytes=SEGMENT_BYTES,
            context_length_max=4096,
            on_disk=True,
        )
        return pb.PrepareCheckpointResponse()

    async def KeepCheckpoints(self, request: Any, context: Any) -> pb.KeepCheckpointsResponse:
        self.kept.append(set(request.keys))  # a fact that is told, not something to do
        if self.old:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "what?")
        return pb.KeepCheckpointsResponse()

    async def StartReplica(self, request: Any, context: Any) -> pb.StartReplicaResponse:
        await self._note(request, context)
        if self.replicas and request.replica_id not in self.replicas:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no idle worker")
        replica = pb.Replica(
            replica_id=request.replica_id,
            model=request.model,
            digest=request.digest,
            device_id="cpu:0",
            state=pb.REPLICA_STATE_LOADING,
            layers_total=LAYERS,
            peer=peer_pb2.Peer(peer_id=request.replica_id, address=f"{self.name}.test:1", data_address="h:2"),
        )
        replica.timeline.assigned_at.GetCurrentTime()
        self.replicas[request.replica_id] = replica
        self._blank[request.replica_id] = self.blank_answers
        return pb.StartReplicaResponse(device_id="cpu:0")

    async def StartTransfer(self, request: Any, context: Any) -> pb.StartTransferResponse:
        await self._note(request, context)
        replica = self.replicas.get(request.replica_id)
        if replica is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown replica")
            raise AssertionError("abort returned")
        live = request.HasField("live_source")
        replica.state = pb.REPLICA_STATE_LIVE if live else pb.REPLICA_STATE_LOADING
        first = request.upstreams[0]
        replica.transfer.CopyFrom(
            pb.Transfer(
                transfer_id=request.transfer_id,
                generation=request.generation,
                upstream=self.name if first.local_disk else first.peer.peer_id,
                total_bytes=sum(SEGMENT_BYTES),
                done_bytes=1000,
            )
        )
        return pb.StartTransferResponse()

    async def SetReplicaRole(self, request: Any, context: Any) -> pb.SetReplicaRoleResponse:
        await self._note(request, context)
        if request.replica_id in self.replicas:
            self.replicas[request.replica_id].role = request.role
        return pb.SetReplicaRoleResponse()

    async def DrainReplica(self, request: Any, context: Any) -> pb.DrainReplicaResponse:
        await self._note(request, context)
        if request.replica_id in self.replicas:
            self.replicas[request.replica_id].state = pb.REPLICA_STATE_DRAINED
        return pb.DrainReplicaResponse()

    async def StopReplica(self, request: Any, context: Any) -> pb.StopReplicaResponse:
        await self._note(request, context)
        self.replicas.pop(request.replica_id, None)
        return pb.StopReplicaResponse()

    async def _note(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        refusal = self.refuse.get(type(request).__name__)
        if refusal is not None:
            await context.abort(*refusal)


class ScriptedGateway:
    """Tells whatever demand the test sets, and watches routes."""

    def __init__(self) -> None:
        self.address = ""
        self.tokens: dict[str, float] = {}
        self.waiting: dict[str, float] = {}
        self.tables: list[route_pb2.WatchRoutesResponse] = []
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Serve /metrics."""
        app = web.Application()
        app.add_routes([web.get("/metrics", self._metrics)])
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.address = f"127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """The process is gone."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def watch(self, operator: str) -> None:
        """Collect tables until cancelled."""
        async with grpc.aio.insecure_channel(operator) as channel:
            stub = route_pb2_grpc.RouteServiceStub(channel)
            async for table in stub.WatchRoutes(route_pb2.WatchRoutesRequest(gateway_id="g")):
                self.tables.append(table)

    def routes(self, model: str) -> dict[str, str]:
        """Replica to state in the newest table."""
        for route in self.tables[-1].models if self.tables else ():
            if route.model == model:
                return {
                    e.replica_id: route_pb2.EndpointState.Name(e.state).removeprefix("ENDPOINT_STATE_")
                    for e in route.endpoints
                }
        return {}

    async def _metrics(self, request: web.Request) -> web.Response:
        lines = []
        for name, values in (
            ("prompt_tokens_waiting", self.tokens),
            ("requests_waiting", self.waiting),
            ("requests_in_flight", self.waiting),
        ):
            lines.append(f"# TYPE layercast_gateway_{name} gauge")
            lines += [f'layercast_gateway_{name}{{model="{m}"}} {v}' for m, v in values.items()]
        return web.Response(text="\n".join(lines) + "\n")


def modelservice(name: str = "m", **spec: Any) -> str:
    """A YAML file; `spec` adds to it."""
    import yaml

    document = {
        "apiVersion": "layercast.dev/v1alpha1",
        "kind": "ModelService",
        "metadata": {"name": name},
        "spec": {"model": {"source": f"file:///models/{name}"}, "replicas": 1, **spec},
    }
    return yaml.safe_dump(document)


def write(path: Path, text: str) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{time.monotonic_ns()}")
    scratch.write_text(text)
    scratch.replace(path)
