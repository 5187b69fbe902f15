"""A fleet for benchmarks of the operator: many nodes that speak AgentService, and one gateway that tells demand.

Every command takes effect at once and weighs nothing; what is measured is the operator. One process holds them all:
`python -m bench.operator.fleet` prints a line of JSON with the addresses and then obeys lines of JSON:
`{"demand": {"model": tokens}}`. For each StartReplica it prints `{"started": model, "at": unix seconds}`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from typing import Any

import grpc
from aiohttp import web
from layercast.agent.v1alpha1 import agent_pb2 as pb
from layercast.agent.v1alpha1 import agent_pb2_grpc
from layercast.peer.v1alpha1 import peer_pb2

SEGMENT_BYTES = (1000, *(4000,) * 8, 1000)
DEVICE_BYTES = 100_000
FIELDS = ("prompt_tokens_waiting", "requests_waiting", "requests_in_flight")


def say(**values: object) -> None:
    """One line for the benchmark."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


class FleetNode(agent_pb2_grpc.AgentServiceServicer):
    """One node; nothing on it takes time."""

    def __init__(self, name: str, devices: int) -> None:
        self.name = name
        self.address = ""
        self.devices: dict[str, str] = {f"cpu:{n}": "" for n in range(devices)}
        self.checkpoints: dict[str, pb.Checkpoint] = {}
        self.replicas: dict[str, pb.Replica] = {}
        self._answer: pb.GetStatusResponse | None = None
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Serve on a free port."""
        self._server = grpc.aio.server()
        agent_pb2_grpc.add_AgentServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def stop(self) -> None:
        """End at once."""
        if self._server is not None:
            await self._server.stop(None)

    async def GetStatus(self, request: Any, context: Any) -> pb.GetStatusResponse:  # noqa: N802, RUF100
        """What it holds; made anew only after a change."""
        if self._answer is None:
            self._answer = pb.GetStatusResponse(
                node=self.name,
                instance_id="1",
                peer=peer_pb2.Peer(peer_id=self.name, address=self.address, data_address="h:1"),
                devices=[
                    pb.Device(
                        device_id=device,
                        memory_bytes=DEVICE_BYTES,
                        worker_state=pb.WORKER_STATE_ASSIGNED if replica else pb.WORKER_STATE_IDLE,
                        replica_id=replica,
                    )
                    for device, replica in self.devices.items()
                ],
                checkpoints=list(self.checkpoints.values()),
                replicas=list(self.replicas.values()),
                egress_bytes_per_s=10**9,
                disk_bytes_per_s=10**9,
                leaf="leaf",
            )
        return self._answer

    async def PrepareCheckpoint(  # noqa: N802, RUF100
        self, request: Any, context: Any
    ) -> pb.PrepareCheckpointResponse:
        """It is on disk."""
        self._answer = None
        self.checkpoints[request.key] = pb.Checkpoint(
            key=request.key,
            digest=f"{abs(hash(request.key)):064x}"[-64:],
            state=pb.CHECKPOINT_STATE_READY,
            segment_bytes=SEGMENT_BYTES,
            context_length_max=4096,
            on_disk=True,
        )
        return pb.PrepareCheckpointResponse()

    async def StartReplica(self, request: Any, context: Any) -> pb.StartReplicaResponse:  # noqa: N802, RUF100
        """It has a device."""
        at = time.time()
        self._answer = None
        if request.replica_id not in self.replicas:
            self.devices[request.device_id] = request.replica_id
            replica = pb.Replica(
                replica_id=request.replica_id,
                model=request.model,
                digest=request.digest,
                device_id=request.device_id,
                state=pb.REPLICA_STATE_LOADING,
                layers_total=len(SEGMENT_BYTES) - 2,
                peer=peer_pb2.Peer(peer_id=request.replica_id, address=f"{self.name}:1", data_address="h:2"),
            )
            replica.timeline.assigned_at.GetCurrentTime()
            self.replicas[request.replica_id] = replica
            say(started=request.model, at=at)
        return pb.StartReplicaResponse(device_id=request.device_id)

    async def StartTransfer(  # noqa: N802, RUF100
        self, request: Any, context: Any
    ) -> pb.StartTransferResponse:
        """It serves."""
        self._answer = None
        replica = self.replicas[request.replica_id]
        replica.state = pb.REPLICA_STATE_SERVING
        replica.layers_resident = replica.layers_total
        replica.timeline.complete_at.GetCurrentTime()
        replica.load.prefill_tokens_per_s = 1000.0
        replica.load.kv_pages_total = 100
        replica.transfer.CopyFrom(
            pb.Transfer(transfer_id=request.transfer_id, generation=request.generation, upstream="disk")
        )
        return pb.StartTransferResponse()

    async def StartHostCopy(  # noqa: N802, RUF100
        self, request: Any, context: Any
    ) -> pb.StartHostCopyResponse:
        """It has no host pool, and says so."""
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "there is no host pool here")
        raise AssertionError("abort raises")

    async def KeepCheckpoints(  # noqa: N802, RUF100
        self, request: pb.KeepCheckpointsRequest, context: object
    ) -> pb.KeepCheckpointsResponse:
        """Keeps everything."""
        return pb.KeepCheckpointsResponse()

    async def DropHostCopy(  # noqa: N802, RUF100
        self, request: Any, context: Any
    ) -> pb.DropHostCopyResponse:
        """There is none."""
        return pb.DropHostCopyResponse()

    async def SetReplicaRole(  # noqa: N802, RUF100
        self, request: Any, context: Any
    ) -> pb.SetReplicaRoleResponse:
        """It has the role."""
        self._answer = None
        if request.replica_id in self.replicas:
            self.replicas[request.replica_id].role = request.role
        return pb.SetReplicaRoleResponse()

    async def DrainReplica(self, request: Any, context: Any) -> pb.DrainReplicaResponse:  # noqa: N802, RUF100
        """It is drained."""
        self._answer = None
        if request.replica_id in self.replicas:
            self.replicas[request.replica_id].state = pb.REPLICA_STATE_DRAINED
        return pb.DrainReplicaResponse()

    async def StopReplica(self, request: Any, context: Any) -> pb.StopReplicaResponse:  # noqa: N802, RUF100
        """Its device is free."""
        self._answer = None
        replica = self.replicas.pop(request.replica_id, None)
        if replica is not None:
            self.devices[replica.device_id] = ""
        return pb.StopReplicaResponse()


class FleetGateway:
    """Tells the demand that it was told, in the format of a gateway's page."""

    def __init__(self, models: list[str]) -> None:
        self.tokens: dict[str, float] = dict.fromkeys(models, 0.0)
        self.address = ""

    async def start(self) -> web.AppRunner:
        """Serve on a free port."""
        app = web.Application()
        app.add_routes([web.get("/metrics", self._metrics)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.address = f"127.0.0.1:{runner.addresses[0][1]}"
        return runner

    async def _metrics(self, request: web.Request) -> web.Response:
        lines = []
        for field in FIELDS:
            lines.append(f"# TYPE layercast_gateway_{field} gauge")
            for model, tokens in self.tokens.items():
                value = tokens if field == FIELDS[0] else float(tokens > 0)
                lines.append(f'layercast_gateway_{field}{{model="{model}"}} {value}')
        return web.Response(text="\n".join(lines) + "\n")


async def serve(nodes: int, devices: int, models: int) -> None:
    """Until the input ends."""
    fleet = [FleetNode(f"fleet-{n}", devices) for n in range(nodes)]
    gateway = FleetGateway([f"m{n}" for n in range(models)])
    runner = await gateway.start()
    for node in fleet:
        await node.start()
    say(agents={node.name: node.address for node in fleet}, gateway=gateway.address)
    while line := await asyncio.to_thread(sys.stdin.readline):
        gateway.tokens.update(json.loads(line)["demand"])
    await asyncio.gather(*(node.stop() for node in fleet))
    await runner.cleanup()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.operator.fleet", description=__doc__)
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--models", type=int, default=500)
    given = parser.parse_args()
    asyncio.run(serve(given.nodes, given.devices, given.models))
