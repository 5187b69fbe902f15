"""The operator's commands over the wire: idempotency, every code of agent.proto's tables, a worker's death.

The agent is the real one, in this process; its workers are processes that follow a script.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from layercast.agent.v1alpha1 import agent_pb2 as pb
from layercast.agent.v1alpha1 import agent_pb2_grpc
from layercast.peer.v1alpha1 import peer_pb2, peer_pb2_grpc

from layercast_agent.agent import CommandDeadlines
from layercast_agent.health import WorkerLimits
from layercast_agent.node import running
from layercast_agent.settings import AgentSettings
from layercast_agent.store import Store

Eventually = Callable[..., Awaitable[Any]]
Settings = Callable[..., AgentSettings]
Code = grpc.StatusCode


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A running agent, seen by an operator."""

    stub: agent_pb2_grpc.AgentServiceAsyncStub
    peer: peer_pb2_grpc.PeerServiceAsyncStub
    digest: str

    async def status(self) -> pb.GetStatusResponse:
        return await self.stub.GetStatus(pb.GetStatusRequest(), timeout=5)

    async def replica(self, replica_id: str) -> pb.Replica | None:
        return next((r for r in (await self.status()).replicas if r.replica_id == replica_id), None)

    async def worker_states(self) -> list[pb.WorkerState.ValueType]:
        return [device.worker_state for device in (await self.status()).devices]

    def start_request(self, replica_id: str, model: str = "m", **changes: Any) -> pb.StartReplicaRequest:
        values = {"digest": self.digest, "context_length_max": 64, "batch_size_max": 2, **changes}
        return pb.StartReplicaRequest(replica_id=replica_id, model=model, **values)

    async def start(self, replica_id: str, model: str = "m", **changes: Any) -> str:
        request = self.start_request(replica_id, model, **changes)
        return (await self.stub.StartReplica(request, timeout=10)).device_id

    async def stop(self, replica_id: str) -> None:
        await self.stub.StopReplica(pb.StopReplicaRequest(replica_id=replica_id), timeout=10)

    async def transfer(self, replica_id: str, *upstreams: pb.Upstream, **changes: Any) -> None:
        values: dict[str, Any] = {"transfer_id": "t-1", "generation": 1, **changes}
        request = pb.StartTransferRequest(replica_id=replica_id, upstreams=upstreams, **values)
        await self.stub.StartTransfer(request, timeout=10)


OpenNode = Callable[..., contextlib.AbstractAsyncContextManager[Node]]

PEER = pb.Upstream(peer=peer_pb2.Peer(peer_id="p", address="127.0.0.1:1"))
DISK = pb.Upstream(local_disk=True)
IDLE = pb.WORKER_STATE_IDLE


@pytest.fixture
def open_node(
    settings: Settings,
    limits: WorkerLimits,
    deadlines: CommandDeadlines,
    eventually: Eventually,
    packed_store: Path,
) -> OpenNode:
    """Runs an agent whose disk holds one tiny checkpoint, with all workers warm."""

    @contextlib.asynccontextmanager
    async def run(**changes: Any) -> AsyncIterator[Node]:
        chosen = settings(**{"store_dir": packed_store, **changes})
        async with (
            running(chosen, limits=limits, deadlines=deadlines) as node,
            grpc.aio.insecure_channel(node.agent.peer.address) as channel,
        ):
            seen = Node(
                stub=agent_pb2_grpc.AgentServiceStub(channel),
                peer=peer_pb2_grpc.PeerServiceStub(channel),
                digest=next(iter(Store(packed_store).manifests()), "0" * 64),
            )
            await eventually(lambda: all(w.state == IDLE for w in node.agent.workers))
            yield seen

    return run


@contextlib.asynccontextmanager
async def refused(code: grpc.StatusCode, *texts: str) -> AsyncIterator[None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    assert caught.value.code() is code
    for text in texts:
        assert text in (caught.value.details() or "")


async def test_status_tells_all_of_the_node(open_node: OpenNode) -> None:
    async with open_node(leaf="leaf-a", egress_bytes_per_s=77, devices="cpu:2") as node:
        status = await node.status()
        assert (status.node, status.leaf, status.egress_bytes_per_s) == ("node-0", "leaf-a", 77)
        assert status.instance_id
        assert status.peer.peer_id == "node-0"
        assert {a.rpartition(":")[0] for a in (status.peer.address, status.peer.data_address)} == {
            "127.0.0.1"
        }
        assert status.disk_bytes_per_s > 1_000_000
        assert [(d.device_id, d.memory_bytes, d.worker_state, d.error) for d in status.devices] == [
            ("cpu:0", 1_000_000, IDLE, ""),
            ("cpu:1", 1_000_000, IDLE, ""),
        ]
        for device in status.devices:
            os.kill(device.worker_pid, 0)
        assert [(c.digest, c.on_disk, c.state) for c in status.checkpoints] == [
            (node.digest, True, pb.CHECKPOINT_STATE_READY)
        ]


async def test_a_replica_from_start_to_stop(open_node: OpenNode) -> None:
    async with open_node() as node:
        assert await node.start("r-1") == "cpu:0"
        replica = await node.replica("r-1")
        assert replica is not None
        assert (replica.model, replica.device_id, replica.digest) == ("m", "cpu:0", node.digest)
        assert replica.state == pb.REPLICA_STATE_LOADING
        assert not any(replica.segments_resident)
        assert "config.json" in replica.peer.peer_id, "the small files went with the manifest"
        assert replica.transfer.total_bytes > 100, "the manifest went to the worker"
        device = (await node.status()).devices[0]
        assert (device.worker_state, device.replica_id) == (pb.WORKER_STATE_ASSIGNED, "r-1")

        await node.transfer("r-1", PEER)
        replica = await node.replica("r-1")
        assert replica is not None
        assert (replica.state, replica.layers_resident) == (pb.REPLICA_STATE_SERVING, 1)

        role = pb.SetReplicaRoleRequest(replica_id="r-1", role=pb.REPLICA_ROLE_DECODE)
        await node.stub.SetReplicaRole(role)
        await node.stub.DrainReplica(pb.DrainReplicaRequest(replica_id="r-1", grace_ms=10))
        replica = await node.replica("r-1")
        assert replica is not None
        assert (replica.state, replica.role) == (pb.REPLICA_STATE_DRAINED, pb.REPLICA_ROLE_DECODE)

        await node.stop("r-1")
        assert await node.replica("r-1") is None
        assert await node.worker_states() == [IDLE]
        await node.stop("r-1")
        assert await node.start("r-2") == "cpu:0"


async def test_start_is_idempotent(open_node: OpenNode) -> None:
    async with open_node(devices="cpu:2") as node:
        same = await asyncio.gather(*(node.start("r-1") for _ in range(3)))
        assert set(same) == {"cpu:0"}
        assert await node.start("r-1", manifest_peer=peer_pb2.Peer(address="127.0.0.1:1")) == "cpu:0"
        assert await node.start("r-1", device_id="cpu:0") == "cpu:0"
        assert len((await node.status()).replicas) == 1
        for change in (
            {"model": "n"},
            {"context_length_max": 65},
            {"batch_size_max": 3},
            {"step_tokens_max": 3},
            {"device_id": "cpu:1"},
        ):
            async with refused(Code.ALREADY_EXISTS, "r-1", "cpu:0"):
                await node.start("r-1", **{"model": "m", **change})  # type: ignore[arg-type]
        assert await node.start("r-2") == "cpu:1"


async def test_a_start_whose_caller_hung_up_is_finished(open_node: OpenNode, eventually: Eventually) -> None:
    async with open_node() as node:
        worker = (await node.status()).devices[0].worker_pid
        os.kill(worker, signal.SIGSTOP)
        call = node.stub.StartReplica(node.start_request("r-1"))
        await eventually(lambda: _device_taken(node))
        assert await node.replica("r-1") is None
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        os.kill(worker, signal.SIGCONT)
        assert await eventually(lambda: node.replica("r-1"))
        assert await node.start("r-1") == "cpu:0"


async def _device_taken(node: Node) -> bool:
    return (await node.status()).devices[0].replica_id == "r-1"


async def test_no_idle_worker(open_node: OpenNode) -> None:
    async with open_node() as node:
        async with refused(Code.RESOURCE_EXHAUSTED, "no device cuda:7", "cpu:0"):
            await node.start("r-1", device_id="cuda:7")
        await node.start("r-1")
        async with refused(Code.RESOURCE_EXHAUSTED, "no idle worker: cpu:0 is ASSIGNED"):
            await node.start("r-2")


@pytest.mark.parametrize(
    ("model", "code", "text"),
    [
        ("too-large", Code.FAILED_PRECONDITION, "the device has 8"),
        ("unsupported", Code.INVALID_ARGUMENT, "architecture Mamba"),
        ("breaks", Code.INTERNAL, "a bug"),
    ],
)
async def test_the_workers_refusal_is_passed_on(
    open_node: OpenNode, model: str, code: grpc.StatusCode, text: str
) -> None:
    async with open_node() as node:
        async with refused(code, text):
            await node.start("r-1", model)
        assert await node.replica("r-1") is None
        assert await node.start("r-1", "fine") == "cpu:0", "the same id may be used for something else"


@pytest.mark.parametrize("model", ["dies", "dies connected", "silent"])
async def test_a_worker_lost_in_a_start_frees_the_device(
    open_node: OpenNode, eventually: Eventually, model: str
) -> None:
    async with open_node() as node:
        before = (await node.status()).devices[0].worker_pid
        async with refused(Code.RESOURCE_EXHAUSTED, "no idle worker"):
            await node.start("r-1", model)
        assert await node.replica("r-1") is None
        await eventually(lambda: _idle_again(node, before))
        assert await node.start("r-2") == "cpu:0"


async def _idle_again(node: Node, before: int) -> bool:
    device = (await node.status()).devices[0]
    return device.worker_state == IDLE and device.worker_pid != before


async def test_malformed_starts(open_node: OpenNode) -> None:
    async with open_node() as node:
        async with refused(Code.INVALID_ARGUMENT, "replica_id"):
            await node.start("")
        async with refused(Code.INVALID_ARGUMENT, "digest"):
            await node.start("r-1", digest="")


async def test_manifest_from_a_peer(
    open_node: OpenNode, settings: Settings, limits: WorkerLimits, tmp_path: Path
) -> None:
    async with open_node(store_dir=tmp_path / "empty") as node:
        async with refused(Code.UNAVAILABLE, "no manifest_peer is given"):
            await node.start("r-1")
        assert await node.worker_states() == [IDLE]
    holder = settings(run_dir=tmp_path / "run-3", store_dir=tmp_path / "packed")
    async with open_node(store_dir=tmp_path / "empty") as node, running(holder, limits=limits) as other:
        digest = next(iter(Store(tmp_path / "packed").manifests()))
        peer = peer_pb2.Peer(peer_id="node-1", address=other.agent.peer.address)
        assert await node.start("r-1", digest=digest, manifest_peer=peer) == "cpu:0"
        replica = await node.replica("r-1")
        assert replica is not None
        assert "tokenizer.json" in replica.peer.peer_id


async def test_transfer_codes(open_node: OpenNode) -> None:
    async with open_node() as node:
        async with refused(Code.NOT_FOUND, "r-9 is not on this node"):
            await node.transfer("r-9", PEER)
        await node.start("r-1")
        async with refused(Code.INVALID_ARGUMENT, "upstreams"):
            await node.transfer("r-1")
        await node.transfer("r-1", PEER)
        await node.transfer("r-1", PEER, generation=2)
        async with refused(Code.FAILED_PRECONDITION, "t-1 runs"):
            await node.transfer("r-1", PEER, transfer_id="t-2")


async def test_local_disk_is_named_when_it_has_the_checkpoint(
    open_node: OpenNode, packed_store: Path
) -> None:
    async with open_node() as node:
        await node.start("r-1")
        await node.transfer("r-1", PEER, DISK)
        replica = await node.replica("r-1")
        assert replica is not None
        assert replica.transfer.upstream == "p|disk"
        assert list(replica.transfer.failures) == [str(packed_store / node.digest)]


async def test_local_disk_is_dropped_when_it_has_not(
    open_node: OpenNode, settings: Settings, limits: WorkerLimits, tmp_path: Path
) -> None:
    holder = settings(run_dir=tmp_path / "run-2", store_dir=tmp_path / "packed")
    async with open_node(store_dir=tmp_path / "empty") as node, running(holder, limits=limits) as other:
        digest = next(iter(Store(tmp_path / "packed").manifests()))
        await node.start("r-1", digest=digest, manifest_peer=peer_pb2.Peer(address=other.agent.peer.address))
        async with refused(Code.FAILED_PRECONDITION, "does not hold checkpoint"):
            await node.transfer("r-1", DISK)
        await node.transfer("r-1", DISK, PEER)
        replica = await node.replica("r-1")
        assert replica is not None
        assert (replica.transfer.upstream, list(replica.transfer.failures)) == ("p", [""])


async def test_unknown_ids_drain_and_stop(open_node: OpenNode) -> None:
    async with open_node() as node:
        await node.stub.DrainReplica(pb.DrainReplicaRequest(replica_id="r-9"))
        await node.stop("r-9")


async def test_a_workers_death_fails_its_replica(open_node: OpenNode, eventually: Eventually) -> None:
    async with open_node() as node:
        await node.start("r-1")
        await node.transfer("r-1", PEER)
        os.kill((await node.status()).devices[0].worker_pid, signal.SIGKILL)
        await eventually(lambda: _has_failed(node))
        replica = await node.replica("r-1")
        assert replica is not None
        assert (replica.error, replica.device_id, replica.model) == ("worker died: signal 9", "cpu:0", "m")
        assert (replica.layers_resident, list(replica.segments_resident)) == (0, [False] * 3)
        async with refused(Code.NOT_FOUND, "r-1 failed: worker died: signal 9"):
            await node.transfer("r-1", PEER)
        await node.stub.DrainReplica(pb.DrainReplicaRequest(replica_id="r-1"))

        await eventually(lambda: _all_idle(node))
        assert (await node.status()).devices[0].replica_id == ""
        assert await node.start("r-2") == "cpu:0"
        assert [r.replica_id for r in (await node.status()).replicas] == ["r-2", "r-1"]
        await node.stop("r-1")
        assert [r.replica_id for r in (await node.status()).replicas] == ["r-2"]


async def _has_failed(node: Node) -> bool:
    replica = await node.replica("r-1")
    return replica is not None and replica.state == pb.REPLICA_STATE_FAILED


async def _all_idle(node: Node) -> bool:
    return set(await node.worker_states()) == {IDLE}


async def test_a_failed_replica_may_start_anew(open_node: OpenNode, eventually: Eventually) -> None:
    async with open_node() as node:
        await node.start("r-1")
        os.kill((await node.status()).devices[0].worker_pid, signal.SIGKILL)
        await eventually(lambda: _has_failed(node))
        await eventually(lambda: _all_idle(node))
        await node.start("r-1")
        assert [(r.state, r.error) for r in (await node.status()).replicas] == [
            (pb.REPLICA_STATE_LOADING, "")
        ]


async def test_a_silent_workers_replica_can_be_stopped(
    open_node: OpenNode, limits: WorkerLimits, eventually: Eventually
) -> None:
    async with open_node() as node:
        await node.start("r-1")
        before = (await node.status()).devices[0].worker_pid
        os.kill(before, signal.SIGSTOP)
        await eventually(lambda: _has_failed(node))
        replica = await node.replica("r-1")
        assert replica is not None
        assert replica.error.startswith("worker has not answered for ")
        await node.stop("r-1")
        assert await node.replica("r-1") is None
        await eventually(lambda: _idle_again(node, before))


async def test_a_worker_that_keeps_its_replica_is_killed(open_node: OpenNode, eventually: Eventually) -> None:
    async with open_node() as node:
        await node.start("r-1", "clings")
        before = (await node.status()).devices[0].worker_pid
        await node.stop("r-1")
        assert await node.replica("r-1") is None
        await eventually(lambda: _idle_again(node, before))


async def test_an_agent_takes_no_handoffs(open_node: OpenNode) -> None:
    async with open_node() as node:
        for call in (
            node.peer.StartCooperation(peer_pb2.StartCooperationRequest()),
            node.peer.OfferHandoffs(peer_pb2.OfferHandoffsRequest()),
            node.peer.TakeHandoff(peer_pb2.TakeHandoffRequest()),
            node.peer.ReleaseHandoff(peer_pb2.ReleaseHandoffRequest()),
        ):
            async with refused(Code.UNIMPLEMENTED, "executes no requests"):
                await call
