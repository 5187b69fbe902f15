"""Copies in host memory over the wire: filled from disk and from peers, served, dropped, and never more than fits.

Agents are the real ones, in this process; their workers follow a script and play no part.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from layercast.agent.v1alpha1 import agent_pb2 as pb
from layercast.agent.v1alpha1 import agent_pb2_grpc
from layercast.peer.v1alpha1 import peer_pb2, peer_pb2_grpc

from layercast_agent.checkpoint_files import PackedCheckpoint
from layercast_agent.errors import RegionFencedError
from layercast_agent.health import WorkerLimits
from layercast_agent.node import RunningAgent, running
from layercast_agent.regions import RegionRef
from layercast_agent.settings import AgentSettings, SettingsError
from layercast_agent.transport import shm
from layercast_agent.transport.shm import Kind, LeaseAnswer, LeaseRequest
from layercast_agent.transport.tcp import read_region
from layercast_agent.transport.wire import Deadline, Status

Eventually = Callable[..., Awaitable[Any]]
Settings = Callable[..., AgentSettings]
Code = grpc.StatusCode
TOKEN = b"secret"
POOL = 8 << 20
DISK = pb.Upstream(local_disk=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A running agent, seen by an operator and by peers."""

    running: RunningAgent
    settings: AgentSettings
    stub: agent_pb2_grpc.AgentServiceAsyncStub
    peers: peer_pb2_grpc.PeerServiceAsyncStub

    @property
    def peer(self) -> peer_pb2.Peer:
        return self.running.agent.peer

    @property
    def upstream(self) -> pb.Upstream:
        return pb.Upstream(peer=self.peer)

    async def pool(self) -> pb.HostPool:
        return (await self.stub.GetStatus(pb.GetStatusRequest(), timeout=5)).host_pool

    async def start(self, digest: str, *upstreams: pb.Upstream, **changes: Any) -> None:
        request = pb.StartHostCopyRequest(
            **{"digest": digest, "generation": 1, "upstreams": upstreams, **changes}
        )
        await self.stub.StartHostCopy(request, timeout=10)

    async def drop(self, digest: str) -> None:
        await self.stub.DropHostCopy(pb.DropHostCopyRequest(digest=digest), timeout=20)

    async def complete(self) -> pb.HostCopy | None:
        """The one copy, when it is complete."""
        copies = (await self.pool()).copies
        assert all(copy.state != pb.HOST_COPY_STATE_FAILED for copy in copies), copies
        return next((copy for copy in copies if copy.state == pb.HOST_COPY_STATE_COMPLETE), None)

    async def regions(self, digest: str) -> list[RegionRef]:
        """What a peer is told first."""
        call = self.peers.WatchResidency(peer_pb2.WatchResidencyRequest(digest=digest), timeout=10)
        async for message in call:
            call.cancel()
            return [
                RegionRef(region_id=s.region.region_id, epoch=s.region.epoch, nbytes=s.region.size_bytes)
                for s in message.segments
            ]
        raise AssertionError("nothing was told")


OpenNode = Callable[..., contextlib.AbstractAsyncContextManager[Node]]


@pytest.fixture
def open_node(settings: Settings, limits: WorkerLimits, tmp_path: Path) -> OpenNode:
    """Runs an agent with a small host pool and an empty disk."""

    @contextlib.asynccontextmanager
    async def run(name: str = "node-0", **changes: Any) -> AsyncIterator[Node]:
        folders = {"store_dir": tmp_path / name / "store", "run_dir": tmp_path / name / "run"}
        chosen = settings(**{"node": name, "host_pool_bytes": POOL, **folders, **changes})
        async with (
            running(chosen, limits=limits) as node,
            grpc.aio.insecure_channel(node.agent.peer.address) as channel,
        ):
            yield Node(
                running=node,
                settings=chosen,
                stub=agent_pb2_grpc.AgentServiceStub(channel),
                peers=peer_pb2_grpc.PeerServiceStub(channel),
            )

    return run


@pytest.fixture
def checkpoint(packed: Path) -> PackedCheckpoint:
    """What the disk of a node with `store_dir=packed_store` holds."""
    return PackedCheckpoint(next(p.parent for p in packed.glob("*/manifest.json")))


@contextlib.asynccontextmanager
async def refused(code: grpc.StatusCode, *texts: str) -> AsyncIterator[None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    assert caught.value.code() is code
    for text in texts:
        assert text in (caught.value.details() or "")


async def test_a_copy_comes_from_the_own_disk_and_is_given_to_peers(
    open_node: OpenNode, packed_store: Path, checkpoint: PackedCheckpoint, eventually: Eventually
) -> None:
    manifest = checkpoint.manifest
    async with open_node(store_dir=packed_store) as node:
        on_disk = await node.regions(manifest.digest)
        await node.start(manifest.digest, DISK)
        copy = await eventually(node.complete)
        assert copy.digest == copy.transfer.transfer_id == manifest.digest
        assert copy.total_bytes == copy.transfer.done_bytes == manifest.nbytes
        assert list(copy.segments_resident) == [True] * len(manifest.segments)
        assert copy.HasField("complete_at") and copy.transfer.bytes_per_s > 0
        pool = await node.pool()
        assert pool.capacity_bytes == POOL and manifest.nbytes <= pool.used_bytes < POOL
        status = await node.stub.GetStatus(pb.GetStatusRequest(), timeout=5)
        assert [(c.on_disk, c.in_host_memory) for c in status.checkpoints] == [(True, True)]
        regions = await node.regions(manifest.digest)
        assert not {r.region_id for r in regions} & {r.region_id for r in on_disk}, "memory comes before disk"
        for segment, region in zip(manifest.segments, regions, strict=True):
            read = await asyncio.to_thread(
                read_region, node.peer.data_address, token=TOKEN, region=region, deadline_s=5
            )
            assert read == checkpoint.view(segment.index, 0, segment.nbytes)
        await node.start(manifest.digest, DISK)  # the same again changes nothing
        assert (await node.pool()).used_bytes == pool.used_bytes


async def test_a_copy_is_a_target_like_any_other_and_forwards(
    open_node: OpenNode, packed_store: Path, checkpoint: PackedCheckpoint, eventually: Eventually
) -> None:
    digest = checkpoint.manifest.digest
    async with (
        open_node("a", store_dir=packed_store) as a,
        open_node("b") as b,
        open_node("c") as c,
    ):
        await b.start(digest, a.upstream, manifest_peer=a.peer)
        await c.start(digest, b.upstream, a.upstream, manifest_peer=b.peer)
        await eventually(b.complete)
        copy = await eventually(c.complete)
        assert list(copy.transfer.failures) == []
        regions = await c.regions(digest)
        read = await asyncio.to_thread(
            read_region, c.peer.data_address, token=TOKEN, region=regions[1], deadline_s=5
        )
        assert read == checkpoint.view(1, 0, regions[1].nbytes)


async def test_a_copy_rests_without_upstreams_and_goes_on_with_new_ones(
    open_node: OpenNode, packed_store: Path, checkpoint: PackedCheckpoint, eventually: Eventually
) -> None:
    digest = checkpoint.manifest.digest
    async with open_node("a", store_dir=packed_store) as a, open_node("b") as b:
        await b.start(digest, manifest_peer=a.peer)
        (copy,) = (await b.pool()).copies
        assert (copy.state, copy.transfer.done_bytes) == (pb.HOST_COPY_STATE_FILLING, 0)
        await b.start(digest, a.upstream, generation=1)  # old news
        assert (await b.complete()) is None
        await b.start(digest, a.upstream, generation=2)
        await eventually(b.complete)


async def test_workers_of_the_node_read_it_where_it_lies_and_it_is_not_freed_under_them(
    open_node: OpenNode, packed_store: Path, checkpoint: PackedCheckpoint, eventually: Eventually
) -> None:
    digest = checkpoint.manifest.digest
    async with open_node(store_dir=packed_store) as node:
        await node.start(digest, DISK)
        await eventually(node.complete)
        region = (await node.regions(digest))[1]
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            _, nbytes, descriptor = await asyncio.to_thread(
                shm.connect, sock, node.settings.memory_socket, token=TOKEN, deadline=Deadline(5)
            )
            ask = LeaseRequest(
                kind=Kind.LEASE,
                lease_id=1,
                region_id=region.region_id,
                epoch=region.epoch,
                nbytes=region.nbytes,
            )
            sock.settimeout(10)
            sock.sendall(ask.pack())
            answer = LeaseAnswer.unpack(await asyncio.to_thread(sock.recv, shm.ANSWER_BYTES))
            assert nbytes == POOL and answer.status is Status.OK
            assert os.pread(descriptor, region.nbytes, answer.at) == checkpoint.view(1, 0, region.nbytes)
            os.close(descriptor)
            dropping = asyncio.create_task(node.drop(digest))

            async def is_dropping() -> bool:
                return [c.state for c in (await node.pool()).copies] == [pb.HOST_COPY_STATE_DROPPING]

            await eventually(is_dropping)
            assert (await node.pool()).copies[0].readers == 1 and not dropping.done()
            async with refused(Code.ABORTED):
                await node.start(digest, DISK, generation=9)
            sock.sendall(LeaseRequest(kind=Kind.RETURN, lease_id=1).pack())
            await dropping
        pool = await node.pool()
        assert (list(pool.copies), pool.used_bytes) == ([], 0)
        with pytest.raises(RegionFencedError):
            await asyncio.to_thread(
                read_region, node.peer.data_address, token=TOKEN, region=region, deadline_s=5
            )
        await node.drop(digest)  # what is not there is dropped already
        await node.start(digest, DISK)
        await eventually(node.complete)


async def test_what_does_not_fit_is_refused_and_takes_nothing(
    open_node: OpenNode, packed_store: Path, checkpoint: PackedCheckpoint
) -> None:
    digest = checkpoint.manifest.digest
    async with open_node(store_dir=packed_store, host_pool_bytes=64 * 1024) as node:
        async with refused(Code.RESOURCE_EXHAUSTED, str(checkpoint.manifest.nbytes), "65536"):
            await node.start(digest, DISK)
        pool = await node.pool()
        assert (list(pool.copies), pool.used_bytes) == ([], 0)


async def test_a_node_without_a_pool_and_a_manifest_without_a_peer_are_refused(
    open_node: OpenNode, packed_store: Path, checkpoint: PackedCheckpoint
) -> None:
    digest = checkpoint.manifest.digest
    async with open_node("a", store_dir=packed_store, host_pool_bytes=0) as a, open_node("b") as b:
        async with refused(Code.FAILED_PRECONDITION, "keeps no copies"):
            await a.start(digest, DISK)
        async with refused(Code.UNAVAILABLE, digest):
            await b.start(digest, a.upstream)
        assert (await a.pool()).capacity_bytes == 0


async def test_a_pool_that_the_machine_cannot_give_ends_the_start(open_node: OpenNode) -> None:
    with pytest.raises(SettingsError, match=r"--host-pool-bytes .*available on this machine"):
        async with open_node(host_pool_bytes=1 << 50):
            pytest.fail("it started")
