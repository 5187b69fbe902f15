"""The operator's end of AgentService: the wire turned into values, actions turned into calls.

The only module that knows both the protocol buffers and the planner's values. Every call has a deadline, and every
gRPC exception ends here as an AgentCallError.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar, assert_never

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from layercast.agent.v1alpha1 import agent_pb2 as pb
from layercast.agent.v1alpha1 import agent_pb2_grpc
from layercast.peer.v1alpha1 import peer_pb2

from layercast_operator.actions import (
    Action,
    DrainReplica,
    DropHostCopy,
    PrepareCheckpoint,
    SetReplicaRole,
    StartHostCopy,
    StartReplica,
    StartTransfer,
    StopReplica,
)
from layercast_operator.errors import AgentCallError
from layercast_operator.snapshot import (
    LOSING_AGENT,
    Checkpoint,
    CheckpointState,
    Device,
    HostCopy,
    HostCopyState,
    Node,
    NodeFacts,
    PeerRef,
    Rdma,
    Replica,
    ReplicaState,
    Role,
    Timeline,
    Transfer,
    WorkerState,
)
from layercast_operator.tls import AGENT, Tls
from layercast_operator.tls import channel as channel_to

_T = TypeVar("_T")

CALL_DEADLINE_S = 5.0
# StartReplica builds the model and allocates its memory before it answers; StopReplica waits for peers that read.
START_DEADLINE_S = 65.0
STOP_DEADLINE_S = 35.0

_CHANNEL_OPTIONS = (
    # An agent that was restarted must be found again in a moment, not after gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
)

_REPLICA_STATES = {
    pb.REPLICA_STATE_LOADING: ReplicaState.LOADING,
    pb.REPLICA_STATE_LIVE: ReplicaState.LIVE,
    pb.REPLICA_STATE_LEADING: ReplicaState.LEADING,
    pb.REPLICA_STATE_SERVING: ReplicaState.SERVING,
    pb.REPLICA_STATE_DRAINING: ReplicaState.DRAINING,
    pb.REPLICA_STATE_DRAINED: ReplicaState.DRAINED,
    pb.REPLICA_STATE_FAILED: ReplicaState.FAILED,
}
_ROLES = {
    Role.BOTH: pb.REPLICA_ROLE_UNSPECIFIED,
    Role.PREFILL: pb.REPLICA_ROLE_PREFILL,
    Role.DECODE: pb.REPLICA_ROLE_DECODE,
}
_ROLES_TOLD = {told: role for role, told in _ROLES.items()}
_WORKER_STATES = {
    pb.WORKER_STATE_WARMING: WorkerState.WARMING,
    pb.WORKER_STATE_IDLE: WorkerState.IDLE,
    pb.WORKER_STATE_ASSIGNED: WorkerState.ASSIGNED,
    pb.WORKER_STATE_DEAD: WorkerState.DEAD,
}
_CHECKPOINT_STATES = {
    pb.CHECKPOINT_STATE_FETCHING: CheckpointState.FETCHING,
    pb.CHECKPOINT_STATE_PACKING: CheckpointState.PACKING,
    pb.CHECKPOINT_STATE_READY: CheckpointState.READY,
    pb.CHECKPOINT_STATE_FAILED: CheckpointState.FAILED,
}

_HOST_COPY_STATES = {
    pb.HOST_COPY_STATE_FILLING: HostCopyState.FILLING,
    pb.HOST_COPY_STATE_COMPLETE: HostCopyState.COMPLETE,
    pb.HOST_COPY_STATE_DROPPING: HostCopyState.DROPPING,
    pb.HOST_COPY_STATE_FAILED: HostCopyState.FAILED,
}


@dataclass(slots=True, kw_only=True)
class _Line:
    """An open connection to one agent."""

    address: str
    channel: grpc.aio.Channel
    stub: agent_pb2_grpc.AgentServiceAsyncStub
    kept: tuple[str, frozenset[str]] | None = None
    """Which start of the agent was told last which keys to keep."""
    told: tuple[pb.GetStatusResponse, Node] | None = None
    """The last answer, and what was read in it."""


class AgentCalls:
    """Calls to all agents; keeps one connection per node."""

    def __init__(self, tls: Tls | None = None) -> None:
        self._tls = tls
        self._tls_version: object = None
        self._lines: dict[str, _Line] = {}
        self.wanted: frozenset[str] | None = None
        """Keys of the checkpoints of all ModelServices; None while they are not known, and then nobody is told."""

    async def set_addresses(self, addresses: Mapping[str, str]) -> None:
        """Who the agents are from now on; connections to others are closed."""
        version = self._tls.version if self._tls is not None else None
        renewed, self._tls_version = version != self._tls_version, version
        for node in list(self._lines):
            if renewed or addresses.get(node) != self._lines[node].address:
                await self._lines.pop(node).channel.close()
        for node, address in addresses.items():
            if node not in self._lines:
                channel = channel_to(address, self._tls, role=AGENT, options=_CHANNEL_OPTIONS)
                stub = agent_pb2_grpc.AgentServiceStub(channel)
                self._lines[node] = _Line(address=address, channel=channel, stub=stub)

    async def close(self) -> None:
        """Close all connections."""
        await self.set_addresses({})

    async def get_status(self, node: str, *, polled_at: float, deadline_s: float) -> Node:
        """What the agent of `node` tells. Raises AgentCallError."""
        line = self._line(node)
        answer = await _answer(node, line.stub.GetStatus(pb.GetStatusRequest(), timeout=deadline_s))
        await self._tell_what_is_wanted(node, line, answer.instance_id)
        if line.told is not None and line.told[0] == answer:
            # Most answers of a calm cluster are the one before; comparing is cheaper than reading.
            told = dataclasses.replace(line.told[1], polled_at=polled_at)
        else:
            told = node_of(answer, name=node, polled_at=polled_at)
        line.told = (answer, told)
        return told

    async def _tell_what_is_wanted(self, node: str, line: _Line, instance_id: str) -> None:
        """Once for each start of an agent and each change; a failure is made up for at the next look."""
        if self.wanted is None or line.kept == (instance_id, self.wanted):
            return
        wanted = self.wanted
        keep = pb.KeepCheckpointsRequest(keys=sorted(wanted))
        try:
            await _answer(node, line.stub.KeepCheckpoints(keep, timeout=CALL_DEADLINE_S))
        except AgentCallError as error:
            if error.code != "UNIMPLEMENTED":  # an agent of an earlier version removes nothing
                return
        line.kept = (instance_id, wanted)

    async def carry_out(self, action: Action) -> None:
        """One command. Raises AgentCallError."""
        stub = self._line(action.node).stub
        call: Awaitable[object]
        match action:
            case PrepareCheckpoint():
                call = stub.PrepareCheckpoint(_prepare(action), timeout=CALL_DEADLINE_S)
            case StartReplica():
                call = stub.StartReplica(_start(action), timeout=START_DEADLINE_S)
            case SetReplicaRole():
                role = pb.SetReplicaRoleRequest(replica_id=action.replica_id, role=_ROLES[action.role])
                call = stub.SetReplicaRole(role, timeout=CALL_DEADLINE_S)
            case StartTransfer():
                call = stub.StartTransfer(_transfer(action), timeout=CALL_DEADLINE_S)
            case DrainReplica():
                call = stub.DrainReplica(_drain(action), timeout=CALL_DEADLINE_S)
            case StopReplica():
                stop = pb.StopReplicaRequest(replica_id=action.replica_id)
                call = stub.StopReplica(stop, timeout=STOP_DEADLINE_S)
            case StartHostCopy():
                call = stub.StartHostCopy(_host_copy(action), timeout=START_DEADLINE_S)
            case DropHostCopy():
                call = stub.DropHostCopy(
                    pb.DropHostCopyRequest(digest=action.digest), timeout=STOP_DEADLINE_S
                )
            case _:
                assert_never(action)
        await _answer(action.node, call)

    def _line(self, node: str) -> _Line:
        if node not in self._lines:
            raise AgentCallError("is not in the cluster any more", node=node, code="NOT_FOUND")
        return self._lines[node]


async def _answer(node: str, call: Awaitable[_T]) -> _T:
    """The answer of a call; whatever gRPC raises becomes an AgentCallError."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        details = " ".join((error.details() or "no details").split())[:500]
        raise AgentCallError(details, node=node, code=error.code().name) from error
    except asyncio.CancelledError:
        # gRPC cancels calls when their channel is closed. Only a cancelled task of ours may end by this.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise AgentCallError("the connection was closed", node=node, code="CANCELLED") from None
    except grpc.aio.UsageError as error:
        raise AgentCallError(str(error), node=node, code="CANCELLED") from error


def _prepare(action: PrepareCheckpoint) -> pb.PrepareCheckpointRequest:
    return pb.PrepareCheckpointRequest(
        key=action.key, source=action.source, revision=action.revision, dtype=action.dtype
    )


def _start(action: StartReplica) -> pb.StartReplicaRequest:
    peer = action.manifest_peer
    return pb.StartReplicaRequest(
        replica_id=action.replica_id,
        model=action.model,
        digest=action.digest,
        manifest_peer=None if peer is None else _peer(peer),
        context_length_max=action.context_length_max,
        batch_size_max=action.batch_size_max,
        step_tokens_max=action.step_tokens_max,
        engine=action.engine,
        prefix_caching_off=not action.prefix_caching,
        device_id=action.device_id,
    )


def _transfer(action: StartTransfer) -> pb.StartTransferRequest:
    source = action.live_source
    return pb.StartTransferRequest(
        replica_id=action.replica_id,
        transfer_id=action.transfer_id,
        generation=action.generation,
        upstreams=_upstreams(action.upstreams),
        segment_order=action.segment_order,
        live_source=None if source is None else _peer(source),
        lead=None if action.lead is None else pb.Pipeline(members=[_peer(peer) for peer in action.lead]),
    )


def _drain(action: DrainReplica) -> pb.DrainReplicaRequest:
    return pb.DrainReplicaRequest(
        replica_id=action.replica_id,
        grace_ms=int(action.grace_s * 1000),
        destinations=[_peer(peer) for peer in action.destinations],
    )


def _host_copy(action: StartHostCopy) -> pb.StartHostCopyRequest:
    peer = action.manifest_peer
    return pb.StartHostCopyRequest(
        digest=action.digest,
        generation=action.generation,
        upstreams=_upstreams(action.upstreams),
        manifest_peer=None if peer is None else _peer(peer),
    )


def _upstreams(peers: Iterable[PeerRef | None]) -> list[pb.Upstream]:
    return [pb.Upstream(local_disk=True) if peer is None else pb.Upstream(peer=_peer(peer)) for peer in peers]


def _peer(peer: PeerRef) -> peer_pb2.Peer:
    return peer_pb2.Peer(peer_id=peer.peer_id, address=peer.address, data_address=peer.data_address)


def node_of(answer: pb.GetStatusResponse, *, name: str, polled_at: float) -> Node:
    """A node's answer as a value. `name` is the cluster's name for it, whatever it calls itself."""
    return Node(
        name=name,
        instance_id=answer.instance_id,
        peer=_peer_of(answer.peer),
        devices=tuple(_device_of(device) for device in answer.devices),
        checkpoints=tuple(_checkpoint_of(checkpoint) for checkpoint in answer.checkpoints),
        replicas=tuple(_replica_of(replica, name) for replica in answer.replicas),
        egress_bytes_per_s=answer.egress_bytes_per_s,
        disk_bytes_per_s=answer.disk_bytes_per_s,
        leaf=answer.leaf,
        host_pool_bytes=answer.host_pool.capacity_bytes,
        host_pool_used_bytes=answer.host_pool.used_bytes,
        host_copies=tuple(_host_copy_of(copy) for copy in answer.host_pool.copies),
        started_at=_seconds(answer.started_at, known=answer.HasField("started_at")) or 0.0,
        polled_at=polled_at,
        facts=NodeFacts(leaving=LOSING_AGENT if answer.leaving else ""),
    )


def _peer_of(peer: peer_pb2.Peer) -> PeerRef:
    return PeerRef(peer_id=peer.peer_id, address=peer.address, data_address=peer.data_address)


def _device_of(device: pb.Device) -> Device:
    return Device(
        device_id=device.device_id,
        memory_bytes=device.memory_bytes,
        # A state of a newer agent that we do not know is none that we may use.
        worker_state=_WORKER_STATES.get(device.worker_state, WorkerState.DEAD),
        replica_id=device.replica_id,
        error=device.error,
        rdma=Rdma(device.reads.rdma, device.reads.rdma_reason, missed=device.reads.rdma_missed),
    )


def _checkpoint_of(checkpoint: pb.Checkpoint) -> Checkpoint:
    return Checkpoint(
        key=checkpoint.key,
        state=_CHECKPOINT_STATES.get(checkpoint.state, CheckpointState.FAILED),
        digest=checkpoint.digest,
        done_bytes=checkpoint.done_bytes,
        total_bytes=checkpoint.total_bytes,
        error=checkpoint.error,
        segment_bytes=tuple(checkpoint.segment_bytes),
        context_length_max=checkpoint.context_length_max,
        on_disk=checkpoint.on_disk,
        in_host_memory=checkpoint.in_host_memory,
    )


def _host_copy_of(copy: pb.HostCopy) -> HostCopy:
    return HostCopy(
        digest=copy.digest,
        state=_HOST_COPY_STATES.get(copy.state, HostCopyState.FAILED),
        total_bytes=copy.total_bytes,
        transfer=_transfer_of(copy.transfer),
        followers=copy.followers,
        error=copy.error,
    )


def _replica_of(replica: pb.Replica, node: str) -> Replica:
    load, seen = replica.load, replica.timeline
    return Replica(
        replica_id=replica.replica_id,
        model=replica.model,
        digest=replica.digest,
        node=node,
        device_id=replica.device_id,
        state=_REPLICA_STATES.get(replica.state, ReplicaState.FAILED),
        # Right after its start an agent may not know the worker's addresses yet.
        peer=dataclasses.replace(_peer_of(replica.peer), peer_id=replica.replica_id),
        layers_resident=replica.layers_resident,
        layers_total=replica.layers_total,
        transfer=_transfer_of(replica.transfer) if replica.HasField("transfer") else None,
        requests_waiting=load.requests_waiting,
        requests_running=load.requests_running,
        prompt_tokens_waiting=load.prompt_tokens_waiting,
        kv_pages_used=load.kv_pages_used,
        kv_pages_total=load.kv_pages_total,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        handoffs_given=load.handoffs_given,
        handoffs_taken=load.handoffs_taken,
        timeline=Timeline(
            assigned_at=_seconds(seen.assigned_at, known=seen.HasField("assigned_at")),
            first_segment_at=_seconds(seen.first_segment_at, known=seen.HasField("first_segment_at")),
            first_layer_at=_seconds(seen.first_layer_at, known=seen.HasField("first_layer_at")),
            first_token_at=_seconds(seen.first_token_at, known=seen.HasField("first_token_at")),
            complete_at=_seconds(seen.complete_at, known=seen.HasField("complete_at")),
        ),
        engine=replica.engine,
        error=replica.error,
        role=_ROLES_TOLD.get(replica.role, Role.BOTH),
        kv_page_tokens=replica.memory.kv_page_tokens,
        requests_moved=load.requests_moved,
    )


def _transfer_of(transfer: pb.Transfer) -> Transfer | None:
    if not transfer.transfer_id:
        return None
    return Transfer(
        transfer_id=transfer.transfer_id,
        generation=transfer.generation,
        upstream=transfer.upstream,
        done_bytes=transfer.done_bytes,
        total_bytes=transfer.total_bytes,
        bytes_per_s=transfer.bytes_per_s,
        failures=tuple(transfer.failures),
        stalled=transfer.stalled,
    )


def _seconds(stamp: Timestamp, *, known: bool) -> float | None:
    return stamp.seconds + stamp.nanos / 1e9 if known else None
