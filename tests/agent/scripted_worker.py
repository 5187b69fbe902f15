"""A worker that follows a script: the real WorkerService on the wire, and no engine behind it.

The name of the assigned model says what goes wrong, so that a test needs no back door:
`too-large`, `unsupported`, `breaks`: AssignReplica is refused; `dies`: the process ends in AssignReplica;
`silent`: AssignReplica is never answered; `clings`: UnassignReplica is never answered. Any other model is fine.
Environment SCRIPTED_WARM=never keeps it warming, SCRIPTED_SIGTERM=ignore makes it deaf to SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import signal
import sys
from typing import Any

import grpc
from grpc.aio import ServicerContext
from layercast.agent.v1alpha1 import agent_pb2
from layercast.worker.v1alpha1 import worker_pb2 as pb
from layercast.worker.v1alpha1 import worker_pb2_grpc

PR_SET_PDEATHSIG = 1
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
REFUSALS = {
    "too-large": (grpc.StatusCode.FAILED_PRECONDITION, "parameters need 9 bytes, the device has 8"),
    "unsupported": (grpc.StatusCode.INVALID_ARGUMENT, "architecture Mamba is not supported"),
    "breaks": (grpc.StatusCode.INTERNAL, "a bug"),
}


def _leave_connections_open() -> None:
    """A child holds them for a moment: their end will not tell the agent that this process is gone."""
    if ctypes.CDLL(None).fork() == 0:
        signal.sigtimedwait((signal.SIGTERM,), 2)
        os._exit(0)


class ScriptedWorker(worker_pb2_grpc.WorkerServiceServicer):
    """Keeps one replica as a plain message."""

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.replica: agent_pb2.Replica | None = None

    async def GetWorkerStatus(
        self, request: pb.GetWorkerStatusRequest, context: ServicerContext[Any, Any]
    ) -> pb.GetWorkerStatusResponse:
        warm = os.environ.get("SCRIPTED_WARM") != "never"
        return pb.GetWorkerStatusResponse(warm=warm, memory_bytes=self.memory_bytes, replica=self.replica)

    async def AssignReplica(
        self, request: pb.AssignReplicaRequest, context: ServicerContext[Any, Any]
    ) -> pb.AssignReplicaResponse:
        wanted = request.replica
        if wanted.model in REFUSALS:
            await context.abort(*REFUSALS[wanted.model])
        if wanted.model == "dies connected":
            _leave_connections_open()
        if wanted.model.startswith("dies"):
            os.kill(os.getpid(), signal.SIGKILL)
        if wanted.model == "silent":
            await asyncio.Event().wait()
        self.replica = agent_pb2.Replica(
            replica_id=wanted.replica_id,
            model=wanted.model,
            digest=wanted.digest,
            device_id="as the worker calls it",
            state=agent_pb2.REPLICA_STATE_LOADING,
            segments_resident=[False, False, False],
            layers_total=1,
        )
        # What arrived from the agent, where a test can see it.
        self.replica.peer.peer_id = ",".join(sorted(request.files))
        self.replica.transfer.total_bytes = len(request.manifest_json)
        return pb.AssignReplicaResponse()

    async def BeginTransfer(
        self, request: pb.BeginTransferRequest, context: ServicerContext[Any, Any]
    ) -> pb.BeginTransferResponse:
        asked = request.transfer
        if self.replica is None or self.replica.replica_id != asked.replica_id:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such replica")
        transfer = self.replica.transfer
        if transfer.transfer_id not in ("", asked.transfer_id):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{transfer.transfer_id} runs")
        transfer.transfer_id = asked.transfer_id
        transfer.generation = asked.generation
        transfer.upstream = "|".join(u.peer.peer_id or "disk" for u in asked.upstreams)
        transfer.failures[:] = [request.local_disk_path]
        self.replica.segments_resident[0] = True
        self.replica.layers_resident = 1
        self.replica.state = agent_pb2.REPLICA_STATE_SERVING
        return pb.BeginTransferResponse()

    async def SetRole(
        self, request: pb.SetRoleRequest, context: ServicerContext[Any, Any]
    ) -> pb.SetRoleResponse:
        asked = request.role
        if self.replica is None or self.replica.replica_id != asked.replica_id:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such replica")
        self.replica.role = asked.role
        return pb.SetRoleResponse()

    async def BeginDrain(
        self, request: pb.BeginDrainRequest, context: ServicerContext[Any, Any]
    ) -> pb.BeginDrainResponse:
        if self.replica is not None and self.replica.replica_id == request.drain.replica_id:
            self.replica.state = agent_pb2.REPLICA_STATE_DRAINED
        return pb.BeginDrainResponse()

    async def UnassignReplica(
        self, request: pb.UnassignReplicaRequest, context: ServicerContext[Any, Any]
    ) -> pb.UnassignReplicaResponse:
        if self.replica is not None and self.replica.replica_id == request.replica_id:
            if self.replica.model == "clings":
                await asyncio.Event().wait()
            self.replica = None
        return pb.UnassignReplicaResponse()


async def serve(flags: argparse.Namespace) -> None:
    """Until SIGTERM."""
    stop = asyncio.Event()
    deaf = os.environ.get("SCRIPTED_SIGTERM") == "ignore"
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, (lambda: None) if deaf else stop.set)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", MESSAGE_BYTES_MAX)])
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(ScriptedWorker(flags.device_memory_bytes), server)
    server.add_insecure_port(f"unix:{flags.control_socket}")
    await server.start()
    await stop.wait()
    await server.stop(0)


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in (
        "node",
        "device",
        "control-socket",
        "listen",
        "data-listen",
        "token-file",
        "cpu-cores",
        "engine",
        "log-format",
    ):
        parser.add_argument(f"--{name}", required=True)
    for name in (
        "device-memory-bytes",
        "reserve-bytes",
        "egress-bytes-per-s",
        "disk-bytes-per-s",
        "parent-pid",
    ):
        parser.add_argument(f"--{name}", required=True, type=int)
    parser.add_argument("--host-memory-socket", required=True)
    parser.add_argument("--cpu-share", required=True, type=float)
    flags = parser.parse_args()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != flags.parent_pid:
        return 3
    environment = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
    sys.stdout.write(f"{vars(flags)} {environment}\n")
    sys.stdout.flush()
    asyncio.run(serve(flags))
    return 0


if __name__ == "__main__":
    sys.exit(main())
