"""WorkerService: what the agent asks of this worker, and the one replica that it may hold."""

from __future__ import annotations

import asyncio
import gc
import logging
from pathlib import Path

import grpc
from grpc import aio
from layercast.engine.v1alpha1 import engine_pb2
from layercast.worker.v1alpha1 import worker_pb2 as pb
from layercast.worker.v1alpha1 import worker_pb2_grpc

from layercast_agent.errors import AgentError, CheckpointError, DeviceMemoryError, NoCapacityError
from layercast_agent.layout import Manifest
from layercast_agent.runner import UpstreamSpec
from layercast_agent.worker import loading, report, wire
from layercast_agent.worker.host import WorkerHost
from layercast_agent.worker.replica import Replica

log = logging.getLogger(__name__)

STATUS_CODES: tuple[tuple[type[AgentError], grpc.StatusCode], ...] = (
    (CheckpointError, grpc.StatusCode.INVALID_ARGUMENT),
    (DeviceMemoryError, grpc.StatusCode.FAILED_PRECONDITION),
    (NoCapacityError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (AgentError, grpc.StatusCode.UNAVAILABLE),
)
"""First match wins; the meaning of each code is in agent.proto."""


def status_code(error: AgentError) -> grpc.StatusCode:
    """The gRPC code that tells the caller what to do next."""
    return next(code for kind, code in STATUS_CODES if isinstance(error, kind))


class Assignment:
    """The worker's one replica, or none; also what gateways' streams talk to."""

    def __init__(self, host: WorkerHost) -> None:
        self.replica: Replica | None = None
        self.warm = False
        self._host = host
        self._changing = asyncio.Lock()

    async def assign(self, request: pb.AssignReplicaRequest) -> None:
        """Builds the replica; idempotent by its id. Raises AgentError."""
        async with self._changing:
            if self.replica is not None:
                if self.replica.spec == request.replica:
                    return
                raise NoCapacityError(f"this worker holds replica {self.replica.spec.replica_id!r}")
            memory = await asyncio.to_thread(
                loading.build,
                spec=request.replica,
                manifest=Manifest.from_json(request.manifest_json),
                files=dict(request.files),
                host=self._host,
            )
            self.replica = Replica(spec=request.replica, memory=memory, host=self._host)
            log.info("a replica was assigned", extra={"replica": request.replica.replica_id})

    async def unassign(self, replica_id: str) -> None:
        """Frees the device; unknown ids succeed."""
        async with self._changing:
            replica = self.replica
            if replica is None or replica.spec.replica_id != replica_id:
                return
            await replica.close()
            self.replica = replica = None
            # What refers to itself in a circle is freed by the collector, and that when it likes: a replica's KV
            # pages must be free when the caller hears that it is gone.
            await asyncio.to_thread(gc.collect)
            log.info("a replica was released", extra={"replica": replica_id})

    def find(self, replica_id: str) -> Replica | None:
        """The replica when it has this id."""
        replica = self.replica
        return replica if replica is not None and replica.spec.replica_id == replica_id else None

    # RequestHandler of the gateways' streams

    def submit(self, request: engine_pb2.Request) -> None:
        if self.replica is not None:
            self.replica.desk.submit(request)
            return
        seq = wire.sequence_of(request)
        self._host.streams.send(
            request.gateway_id, [wire.returned(seq, reason="no replica is here any more")]
        )

    def cancel(self, request_id: str, attempt: int) -> None:
        if self.replica is not None:
            self.replica.desk.cancel(request_id, attempt)

    def cancel_gateway(self, gateway_id: str) -> None:
        if self.replica is not None:
            self.replica.desk.cancel_gateway(gateway_id)

    def kv_use(self) -> engine_pb2.KvUse:
        if self.replica is None:
            return engine_pb2.KvUse()
        load = self.replica.loop.view.load
        return engine_pb2.KvUse(used=load.kv_pages_used, total=load.kv_pages_total)

    def model_files(self, digest: str) -> dict[str, bytes] | None:
        holding = self._host.holdings.get(digest)
        return dict(holding.files) if holding is not None else None


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """The gRPC face towards the agent; contracts in worker.proto and agent.proto."""

    def __init__(self, *, assignment: Assignment, host: WorkerHost) -> None:
        self._assignment = assignment
        self._host = host

    async def GetWorkerStatus(
        self,
        request: pb.GetWorkerStatusRequest,
        context: aio.ServicerContext[pb.GetWorkerStatusRequest, pb.GetWorkerStatusResponse],
    ) -> pb.GetWorkerStatusResponse:
        answer = pb.GetWorkerStatusResponse(
            warm=self._assignment.warm, memory_bytes=self._host.settings.device_memory_bytes
        )
        verdict = self._host.verdict
        answer.reads.rdma, answer.reads.rdma_reason = verdict.use, verdict.reason
        answer.reads.rdma_missed = verdict.loud
        answer.reads.read_bytes.update(self._host.read_bytes.by_transport())
        if self._assignment.replica is not None:
            answer.replica.CopyFrom(report.replica_status(self._assignment.replica, self._host))
        return answer

    async def AssignReplica(
        self,
        request: pb.AssignReplicaRequest,
        context: aio.ServicerContext[pb.AssignReplicaRequest, pb.AssignReplicaResponse],
    ) -> pb.AssignReplicaResponse:
        try:
            await self._assignment.assign(request)
        except AgentError as error:
            await context.abort(status_code(error), str(error))
        return pb.AssignReplicaResponse()

    async def BeginTransfer(
        self,
        request: pb.BeginTransferRequest,
        context: aio.ServicerContext[pb.BeginTransferRequest, pb.BeginTransferResponse],
    ) -> pb.BeginTransferResponse:
        replica = self._assignment.find(request.transfer.replica_id)
        if replica is None:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"replica {request.transfer.replica_id!r} is not here"
            )
            return pb.BeginTransferResponse()
        running = replica.runner
        if running is not None and running.status().transfer_id != request.transfer.transfer_id:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another transfer runs")
        settings = self._host.settings
        upstreams = _upstreams(request, node=settings.node, disk_bytes_per_s=settings.disk_bytes_per_s)
        if not upstreams:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a transfer needs an upstream")
        replica.begin_transfer(request.transfer, upstreams)
        return pb.BeginTransferResponse()

    async def SetRole(
        self, request: pb.SetRoleRequest, context: aio.ServicerContext[pb.SetRoleRequest, pb.SetRoleResponse]
    ) -> pb.SetRoleResponse:
        replica = self._assignment.find(request.role.replica_id)
        if replica is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"replica {request.role.replica_id!r} is not here")
            return pb.SetRoleResponse()
        try:
            await replica.set_role(request.role.role)
        except AgentError as error:
            await context.abort(status_code(error), str(error))
        return pb.SetRoleResponse()

    async def BeginDrain(
        self,
        request: pb.BeginDrainRequest,
        context: aio.ServicerContext[pb.BeginDrainRequest, pb.BeginDrainResponse],
    ) -> pb.BeginDrainResponse:
        replica = self._assignment.find(request.drain.replica_id)
        if replica is not None:
            await replica.begin_drain(
                grace_s=request.drain.grace_ms / 1000, destinations=list(request.drain.destinations)
            )
        return pb.BeginDrainResponse()

    async def UnassignReplica(
        self,
        request: pb.UnassignReplicaRequest,
        context: aio.ServicerContext[pb.UnassignReplicaRequest, pb.UnassignReplicaResponse],
    ) -> pb.UnassignReplicaResponse:
        try:
            await self._assignment.unassign(request.replica_id)
        except AgentError as error:
            await context.abort(status_code(error), str(error))
        return pb.UnassignReplicaResponse()


def _upstreams(request: pb.BeginTransferRequest, *, node: str, disk_bytes_per_s: int) -> list[UpstreamSpec]:
    """As the operator listed them; the agent of this node is read through its memory when that has a copy."""
    memory = Path(request.host_memory_path) if request.host_memory_path else None
    specs = []
    for upstream in request.transfer.upstreams:
        if upstream.local_disk and request.local_disk_path:
            folder = Path(request.local_disk_path)
            specs.append(UpstreamSpec(peer_id="disk", local_folder=folder, disk_bytes_per_s=disk_bytes_per_s))
        elif not upstream.local_disk:
            peer = upstream.peer
            specs.append(
                UpstreamSpec(
                    peer_id=peer.peer_id,
                    address=peer.address,
                    data_address=peer.data_address,
                    memory_socket=memory if peer.peer_id == node else None,
                )
            )
    return specs
