"""The node's agent: which replica is on which device, and what the operator may do with them.

It decides nothing about other nodes and stores nothing: assignments live in memory and end with the process,
because its workers end with it too. What a worker does with a replica is the worker's; the agent keeps the one
fact that must survive a worker, namely that its replica failed and why.

Every command is idempotent and named by its caller. A command that has begun is finished even when its caller
hangs up: the caller's next try then finds it done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Collection, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from layercast.agent.v1alpha1 import agent_pb2 as pb
from layercast.peer.v1alpha1 import peer_pb2
from layercast.worker.v1alpha1 import worker_pb2

from layercast_agent.assignment import Assignment, blank_replica, same_request
from layercast_agent.checkpoints import Checkpoints
from layercast_agent.errors import PeerError
from layercast_agent.health import DEFAULT_LIMITS, WorkerLimits
from layercast_agent.host_copies import HostCopies
from layercast_agent.peer_manifest import fetch_manifest
from layercast_agent.settings import AgentSettings, device_slots
from layercast_agent.tls import Tls
from layercast_agent.workers import CommandError, Worker, WorkerLostError

log = logging.getLogger(__name__)

FAILED_REPLICAS_MAX = 64
"""Failed replicas that are remembered until somebody stops them; the oldest is forgotten first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandDeadlines:
    """How long the parts of a command may take, in seconds."""

    manifest_s: float = 5.0
    """A peer's answer with manifest and small files."""

    assign_s: float = 60.0
    """Building a model without parameters and allocating its memory."""

    command_s: float = 5.0
    """A worker's answer to BeginTransfer and BeginDrain, which only begin something."""

    unassign_s: float = 30.0
    """Freeing the device; waits for peers that still read from it. The worker is killed after it."""


DEFAULT_DEADLINES = CommandDeadlines()


class Agent:
    """Commands and status of one node. Used on the asyncio thread only."""

    def __init__(
        self,
        *,
        settings: AgentSettings,
        checkpoints: Checkpoints,
        host_copies: HostCopies,
        tls: Tls | None = None,
        limits: WorkerLimits = DEFAULT_LIMITS,
        deadlines: CommandDeadlines = DEFAULT_DEADLINES,
    ) -> None:
        """Makes the workers of all devices; the caller runs and closes them."""
        self.workers = tuple(
            Worker(slot=slot, settings=settings, limits=limits, on_death=self._worker_died)
            for slot in device_slots(settings)
        )
        self.checkpoints = checkpoints
        self.host_copies = host_copies
        self.peer = peer_pb2.Peer(peer_id=settings.node)
        self.disk_bytes_per_s = 0
        self.instance_id = uuid.uuid4().hex
        self.leaving = False
        """It is to end: nothing new is started here."""
        self._started_at = Timestamp()
        self._started_at.GetCurrentTime()
        self._settings = settings
        self._deadlines = deadlines
        self._tls = tls
        self._assignments: dict[str, Assignment] = {}
        self._failed: dict[str, pb.Replica] = {}
        self._commands: set[asyncio.Task[None]] = set()

    def status(self) -> pb.GetStatusResponse:
        """Everything that is known of this node. Waits for nobody: workers are asked beforehand."""
        pool = self.host_copies.pool.status()
        complete = {c.digest for c in pool.copies if c.state == pb.HOST_COPY_STATE_COMPLETE}
        return pb.GetStatusResponse(
            node=self._settings.node,
            instance_id=self.instance_id,
            started_at=self._started_at,
            peer=self.peer,
            host_pool=pool,
            devices=[self._device(worker) for worker in self.workers],
            checkpoints=[_with_memory(c, complete) for c in self.checkpoints.statuses()],
            replicas=[*self._replicas(), *self._failed.values()],
            egress_bytes_per_s=self._settings.egress_bytes_per_s,
            disk_bytes_per_s=self.disk_bytes_per_s,
            leaf=self._settings.leaf,
            leaving=self.leaving,
            store=self.checkpoints.store_status(),
        )

    def digests(self) -> tuple[str, ...]:
        """Checkpoints of this node's replicas. From any thread."""
        return tuple(assignment.request.digest for assignment in list(self._assignments.values()))

    async def start_replica(self, request: pb.StartReplicaRequest) -> str:
        """AgentService.StartReplica; returns the device. CommandError with a code of its table."""
        for name in ("replica_id", "digest"):
            if not getattr(request, name):
                raise CommandError(grpc.StatusCode.INVALID_ARGUMENT, f"{name} is missing")
        known = self._assignments.get(request.replica_id)
        if known is None:
            known = self._take_device(request)
        elif not same_request(known, request):
            raise CommandError(
                grpc.StatusCode.ALREADY_EXISTS,
                f"replica {request.replica_id} exists on {known.worker.slot.device_id} with other arguments",
            )
        await asyncio.shield(known.begun)
        return known.worker.slot.device_id

    async def start_transfer(self, request: pb.StartTransferRequest) -> None:
        """AgentService.StartTransfer. CommandError with a code of its table."""
        if not request.upstreams:
            raise CommandError(grpc.StatusCode.INVALID_ARGUMENT, "upstreams is empty")
        assignment = await self._found(request.replica_id)
        begin = self._with_local_disk(request, assignment.request.digest)
        with _lost_is_not_found():
            await assignment.worker.begin_transfer(begin, deadline_s=self._deadlines.command_s)

    async def set_replica_role(self, request: pb.SetReplicaRoleRequest) -> None:
        """AgentService.SetReplicaRole. CommandError with a code of its table."""
        assignment = await self._found(request.replica_id)
        with _lost_is_not_found():
            role = worker_pb2.SetRoleRequest(role=request)
            await assignment.worker.set_role(role, deadline_s=self._deadlines.command_s)

    async def drain_replica(self, request: pb.DrainReplicaRequest) -> None:
        """AgentService.DrainReplica; unknown and failed replicas have nothing to drain."""
        assignment = await self._settled(request.replica_id)
        if assignment is None:
            return
        drain = worker_pb2.BeginDrainRequest(drain=request)
        try:
            await assignment.worker.begin_drain(drain, deadline_s=self._deadlines.command_s)
        except WorkerLostError as error:
            log.info(
                "a replica to drain is gone", extra={"replica": request.replica_id, "reason": str(error)}
            )

    async def stop_replica(self, replica_id: str) -> None:
        """AgentService.StopReplica; afterwards its device is free, by the worker's death if need be."""
        await self._to_its_end(self._stop(replica_id))

    def _worker_died(self, device_id: str, reason: str, replica: pb.Replica | None) -> None:
        """Called by a worker for each life that ended: what it held is lost, and stays visible as failed."""
        for replica_id, assignment in list(self._assignments.items()):
            # One that is still being assigned learns of it by its own call to the worker.
            if assignment.worker.slot.device_id == device_id and assignment.assigned:
                del self._assignments[replica_id]
                told = replica if replica is not None and replica.replica_id == replica_id else None
                failed = failed_replica(told or blank_replica(assignment), reason)
                failed.device_id = device_id
                self._remember_failed(failed)
                log.warning("a replica failed", extra={"replica": replica_id, "reason": reason})

    def _take_device(self, request: pb.StartReplicaRequest) -> Assignment:
        if self.leaving:
            raise CommandError(grpc.StatusCode.RESOURCE_EXHAUSTED, "no idle worker: this agent is ending")
        taken = {assignment.worker.slot.device_id for assignment in self._assignments.values()}
        idle = [
            worker
            for worker in self.workers
            if worker.state == pb.WORKER_STATE_IDLE
            and worker.slot.device_id not in taken
            and request.device_id in ("", worker.slot.device_id)
        ]
        if not idle:
            raise CommandError(grpc.StatusCode.RESOURCE_EXHAUSTED, self._why_none_idle(request.device_id))
        begun = asyncio.create_task(self._assign(request, idle[0]))
        begun.add_done_callback(_look_at_result)
        self._failed.pop(request.replica_id, None)
        self._assignments[request.replica_id] = Assignment(request=request, worker=idle[0], begun=begun)
        return self._assignments[request.replica_id]

    def _why_none_idle(self, device_id: str) -> str:
        states = {d.device_id: pb.WorkerState.Name(d.worker_state) for d in map(self._device, self.workers)}
        if device_id and device_id not in states:
            return f"there is no device {device_id} here, only {', '.join(states)}"
        found = ", ".join(
            f"{name} is {state.removeprefix('WORKER_STATE_')}" for name, state in states.items()
        )
        return f"no idle worker: {found}"

    async def _assign(self, request: pb.StartReplicaRequest, worker: Worker) -> None:
        try:
            manifest_json, files = await self._manifest(request)
            pid = worker.pid
            assign = worker_pb2.AssignReplicaRequest(
                replica=request, manifest_json=manifest_json, files=files
            )
            await worker.assign(assign, deadline_s=self._deadlines.assign_s)
            if worker.pid != pid:
                raise WorkerLostError(f"worker of {worker.slot.device_id} died: {worker.error}")
            # No await since the check: a death from here on finds an assigned replica and reports it as failed.
            self._assignments[request.replica_id].assigned = True
        except BaseException as error:
            del self._assignments[request.replica_id]
            if isinstance(error, WorkerLostError):
                text = f"no idle worker: {error}"
                raise CommandError(grpc.StatusCode.RESOURCE_EXHAUSTED, text) from error
            raise
        log.info(
            "a replica was assigned",
            extra={"replica": request.replica_id, "device": worker.slot.device_id, "model": request.model},
        )

    async def _manifest(self, request: pb.StartReplicaRequest) -> tuple[bytes, Mapping[str, bytes]]:
        """Manifest (JSON) and small files, from this node's disk or memory or from the given peer."""
        held = self.checkpoints.held(request.digest) or self.host_copies.pool.holding(request.digest)
        if held is not None:
            return held.manifest.to_json(), held.files
        try:
            return await fetch_manifest(
                request.manifest_peer,
                digest=request.digest,
                deadline_s=self._deadlines.manifest_s,
                tls=self._tls,
            )
        except PeerError as error:
            raise CommandError(grpc.StatusCode.UNAVAILABLE, str(error)) from error

    async def _stop(self, replica_id: str) -> None:
        self._failed.pop(replica_id, None)
        assignment = await self._settled(replica_id)
        if assignment is None:
            return
        worker = assignment.worker
        try:
            if worker.state == pb.WORKER_STATE_DEAD:
                worker.kill("worker was silent when its replica was stopped")
            else:
                unassign = worker_pb2.UnassignReplicaRequest(replica_id=replica_id)
                await worker.unassign(unassign, deadline_s=self._deadlines.unassign_s)
        except WorkerLostError as error:
            log.warning(
                "a replica was stopped by its worker's end",
                extra={"replica": replica_id, "reason": str(error)},
            )
        if self._assignments.get(replica_id) is assignment:
            del self._assignments[replica_id]
        self._failed.pop(replica_id, None)  # the worker may have died of it
        log.info("a replica was stopped", extra={"replica": replica_id, "device": worker.slot.device_id})

    async def _found(self, replica_id: str) -> Assignment:
        """As `_settled`; CommandError NOT_FOUND when there is none."""
        assignment = await self._settled(replica_id)
        if assignment is None:
            failed = self._failed.get(replica_id)
            why = f"failed: {failed.error}" if failed is not None else "is not on this node"
            raise CommandError(grpc.StatusCode.NOT_FOUND, f"replica {replica_id} {why}")
        return assignment

    async def _settled(self, replica_id: str) -> Assignment | None:
        """The assignment, once it has succeeded; None when there is none or it failed."""
        assignment = self._assignments.get(replica_id)
        if assignment is not None and not assignment.begun.done():
            await asyncio.wait({assignment.begun})
            assignment = self._assignments.get(replica_id)
        return assignment

    async def _to_its_end(self, command: Coroutine[Any, Any, None]) -> None:
        """Runs a command that its caller's hanging up does not stop half way."""
        task = asyncio.create_task(command)
        self._commands.add(task)
        task.add_done_callback(self._commands.discard)
        task.add_done_callback(_look_at_result)
        await asyncio.shield(task)

    def _with_local_disk(
        self, request: pb.StartTransferRequest, digest: str
    ) -> worker_pb2.BeginTransferRequest:
        """Adds the folder of this node's own copy, and drops the upstream that means a copy that is not there."""
        held = self.checkpoints.held(digest)
        upstreams = [u for u in request.upstreams if held is not None or not u.local_disk]
        if not upstreams:
            raise CommandError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this node's disk does not hold checkpoint {digest}, and there is no other upstream",
            )
        transfer = pb.StartTransferRequest()
        transfer.CopyFrom(request)
        del transfer.upstreams[:]
        transfer.upstreams.extend(upstreams)
        reads_disk = held is not None and any(u.local_disk for u in upstreams)
        path = str(self.checkpoints.folder(digest)) if reads_disk else ""
        memory = ""
        if any(not u.local_disk and u.peer.peer_id == self._settings.node for u in upstreams):
            memory = self.host_copies.socket_for(digest)
        return worker_pb2.BeginTransferRequest(
            transfer=transfer, local_disk_path=path, host_memory_path=memory
        )

    def _device(self, worker: Worker) -> pb.Device:
        occupants = [i for i, a in self._assignments.items() if a.worker is worker]
        taken = bool(occupants) and worker.state == pb.WORKER_STATE_IDLE
        return pb.Device(
            device_id=worker.slot.device_id,
            memory_bytes=worker.memory_bytes,
            worker_state=pb.WORKER_STATE_ASSIGNED if taken else worker.state,
            error=worker.error,
            replica_id=occupants[0] if occupants else "",
            worker_pid=worker.pid,
            reads=worker.reads,
        )

    def _replicas(self) -> Iterator[pb.Replica]:
        for replica_id, assignment in self._assignments.items():
            if not assignment.assigned:
                continue
            worker = assignment.worker
            told = worker.replica
            replica = (
                told if told is not None and told.replica_id == replica_id else blank_replica(assignment)
            )
            if worker.state == pb.WORKER_STATE_DEAD:
                replica = failed_replica(replica, worker.error)
            shown = pb.Replica()
            shown.CopyFrom(replica)
            shown.device_id = worker.slot.device_id
            yield shown

    def _remember_failed(self, replica: pb.Replica) -> None:
        self._failed[replica.replica_id] = replica
        while len(self._failed) > FAILED_REPLICAS_MAX:
            del self._failed[next(iter(self._failed))]


def failed_replica(replica: pb.Replica, reason: str) -> pb.Replica:
    """The replica as it is without its worker: nothing resident, nothing running; how far it was stays visible."""
    failed = pb.Replica()
    failed.CopyFrom(replica)
    failed.state = pb.REPLICA_STATE_FAILED
    failed.error = reason
    failed.segments_resident[:] = [False] * len(replica.segments_resident)
    failed.layers_resident = 0
    failed.ClearField("load")
    return failed


def _with_memory(checkpoint: pb.Checkpoint, in_memory: Collection[str]) -> pb.Checkpoint:
    """What the disk knows of a checkpoint, and whether it is in host memory too."""
    if checkpoint.digest not in in_memory:
        return checkpoint
    shown = pb.Checkpoint()
    shown.CopyFrom(checkpoint)
    shown.in_host_memory = True
    return shown


@contextlib.contextmanager
def _lost_is_not_found() -> Iterator[None]:
    """Of a worker that died the operator should look again."""
    try:
        yield
    except WorkerLostError as error:
        raise CommandError(grpc.StatusCode.NOT_FOUND, str(error)) from error


def _look_at_result(task: asyncio.Task[None]) -> None:
    """An error has been told to the callers; when all of them hung up, asyncio need not complain."""
    if not task.cancelled():
        task.exception()
