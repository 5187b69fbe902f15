"""Checkpoints of a node: prepared, failed, found again after a restart, and read by a peer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from layercast.agent.v1alpha1 import agent_pb2 as pb
from layercast.agent.v1alpha1 import agent_pb2_grpc
from layercast.peer.v1alpha1 import peer_pb2, peer_pb2_grpc

from layercast_agent.checkpoint_files import PackedCheckpoint
from layercast_agent.checkpoints import WAITING_MAX, Checkpoints, Wanted, measure_disk
from layercast_agent.errors import AgentError
from layercast_agent.health import WorkerLimits
from layercast_agent.holdings import Holdings
from layercast_agent.layout import Manifest
from layercast_agent.node import RunningAgent, running
from layercast_agent.regions import HostMemory, RegionRef, RegionTable
from layercast_agent.residency import Residency
from layercast_agent.runner import TransferOutcome, TransferRunner, UpstreamSpec
from layercast_agent.settings import AgentSettings
from layercast_agent.store import Progress, Store
from layercast_agent.transport.tcp import read_region
from layercast_agent.workers import CommandError

Eventually = Callable[..., Awaitable[Any]]
Settings = Callable[..., AgentSettings]


@contextlib.asynccontextmanager
async def serving(
    settings: AgentSettings, limits: WorkerLimits
) -> AsyncIterator[
    tuple[RunningAgent, agent_pb2_grpc.AgentServiceAsyncStub, peer_pb2_grpc.PeerServiceAsyncStub]
]:
    async with (
        running(settings, limits=limits) as node,
        grpc.aio.insecure_channel(node.agent.peer.address) as channel,
    ):
        yield node, agent_pb2_grpc.AgentServiceStub(channel), peer_pb2_grpc.PeerServiceStub(channel)


def prepare(
    source: str, *, key: str = "k", revision: str = "", dtype: str = ""
) -> pb.PrepareCheckpointRequest:
    return pb.PrepareCheckpointRequest(key=key, source=source, revision=revision, dtype=dtype)


async def test_prepared_then_found_again(
    settings: Settings, limits: WorkerLimits, eventually: Eventually, tiny_model: Path
) -> None:
    asked = prepare(f"file://{tiny_model}", dtype="bfloat16")
    async with serving(settings(), limits) as (node, stub, _):
        assert list(node.agent.status().checkpoints) == []
        await stub.PrepareCheckpoint(asked)
        await stub.PrepareCheckpoint(asked)
        await eventually(lambda: node.agent.status().checkpoints[0].state == pb.CHECKPOINT_STATE_READY)
        (ready,) = (await stub.GetStatus(pb.GetStatusRequest())).checkpoints
        manifest = Store(settings().store_dir).manifests()[ready.digest]
        assert (ready.key, ready.error, ready.on_disk, ready.in_host_memory) == ("k", "", True, False)
        assert list(ready.segment_bytes) == [segment.nbytes for segment in manifest.segments]
        assert ready.context_length_max == manifest.config["max_position_embeddings"] > 0
        assert ready.done_bytes == ready.total_bytes == manifest.nbytes
    async with serving(settings(), limits) as (node, stub, _):
        (found,) = node.agent.status().checkpoints
        assert (found.key, found.digest, found.state) == ("", ready.digest, pb.CHECKPOINT_STATE_READY)
        await stub.PrepareCheckpoint(asked)
        await eventually(lambda: node.agent.status().checkpoints[0].state == pb.CHECKPOINT_STATE_READY)
        assert list(node.agent.status().checkpoints) == [ready]


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (prepare("ftp://bucket/model"), "ftp://bucket/model"),
        (prepare("file://relative/model"), "file:///absolute/path"),
        (prepare("file:///model", key=""), "key is missing"),
    ],
)
async def test_sources_that_nobody_can_fetch(
    settings: Settings, limits: WorkerLimits, request_: pb.PrepareCheckpointRequest, text: str
) -> None:
    async with serving(settings(), limits) as (node, stub, _):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.PrepareCheckpoint(request_)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert text in (refused.value.details() or "")
        assert list(node.agent.status().checkpoints) == []


async def test_a_failed_one_is_tried_again(
    settings: Settings, limits: WorkerLimits, eventually: Eventually, tiny_model: Path, tmp_path: Path
) -> None:
    late = tmp_path / "late"
    async with serving(settings(), limits) as (node, stub, _):
        await stub.PrepareCheckpoint(prepare(f"file://{late}"))
        await eventually(lambda: node.agent.status().checkpoints[0].state == pb.CHECKPOINT_STATE_FAILED)
        assert str(late) in node.agent.status().checkpoints[0].error
        late.symlink_to(tiny_model)
        await stub.PrepareCheckpoint(prepare(f"file://{late}"))
        await eventually(lambda: node.agent.status().checkpoints[0].state == pb.CHECKPOINT_STATE_READY)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.PrepareCheckpoint(prepare(f"file://{tiny_model}"))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "stands for" in (refused.value.details() or "")


async def test_a_damaged_copy_is_not_offered(
    settings: Settings, limits: WorkerLimits, packed_store: Path, eventually: Eventually, tiny_model: Path
) -> None:
    (digest,) = Store(packed_store).manifests()
    tokenizer = packed_store / digest / "files" / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes()[:-1])
    async with serving(settings(store_dir=packed_store), limits) as (node, _, peer):
        (status,) = node.agent.status().checkpoints
        assert status.state == pb.CHECKPOINT_STATE_FAILED
        assert "tokenizer.json" in status.error
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await peer.GetManifest(peer_pb2.GetManifestRequest(digest=digest))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_peer_reads_every_chunk(settings: Settings, limits: WorkerLimits, packed_store: Path) -> None:
    (digest,) = Store(packed_store).manifests()
    async with serving(settings(store_dir=packed_store), limits) as (node, _, peer):
        answer = await peer.GetManifest(peer_pb2.GetManifestRequest(digest=digest))
        manifest = Manifest.from_json(answer.manifest_json)
        watch = peer.WatchResidency(peer_pb2.WatchResidencyRequest(digest=digest))
        first = await anext(aiter(watch))
        assert [s.segment for s in first.segments] == [s.index for s in manifest.segments]
        for told, segment in zip(first.segments, manifest.segments, strict=True):
            chunks = manifest.chunk_count(segment.index)
            assert int.from_bytes(told.verified_chunks, "little") == (1 << chunks) - 1
            region = RegionRef(
                region_id=told.region.region_id, epoch=told.region.epoch, nbytes=told.region.size_bytes
            )
            data = await asyncio.to_thread(
                read_region, node.agent.peer.data_address, token=b"secret", region=region, deadline_s=5
            )
            for chunk, crc32 in enumerate(segment.chunk_crc32):
                offset, nbytes = manifest.chunk_range(segment.index, chunk)
                assert zlib.crc32(data[offset : offset + nbytes]) == crc32
        with pytest.raises(AgentError):
            await asyncio.to_thread(
                read_region, node.agent.peer.data_address, token=b"wrong", region=region, deadline_s=5
            )


async def test_a_target_loads_from_the_agent(
    settings: Settings, limits: WorkerLimits, packed_store: Path
) -> None:
    store = Store(packed_store)
    ((digest, manifest),) = store.manifests().items()
    async with serving(settings(store_dir=packed_store), limits) as (node, _, _):
        memories = [HostMemory(segment.nbytes) for segment in manifest.segments]
        ended: asyncio.Future[TransferOutcome] = asyncio.get_running_loop().create_future()

        def tell(outcome: TransferOutcome) -> None:
            ended.get_loop().call_soon_threadsafe(ended.set_result, outcome)

        runner = TransferRunner(
            transfer_id="t-1",
            manifest=manifest,
            memories=memories,
            residency=Residency(manifest),
            upstreams=[
                UpstreamSpec(
                    peer_id="node-0",
                    address=node.agent.peer.address,
                    data_address=node.agent.peer.data_address,
                    local_folder=None,
                )
            ],
            generation=1,
            segment_order=range(len(manifest.segments)),
            token=b"secret",
            on_segment=lambda segment: None,
            on_end=tell,
        )
        runner.start()
        outcome = await asyncio.wait_for(ended, 20)
        await asyncio.to_thread(runner.cancel, 5.0)
        assert outcome.complete, outcome
        original = PackedCheckpoint(store.folder(digest))
        for segment, memory in zip(manifest.segments, memories, strict=True):
            assert memory.view(0, segment.nbytes) == original.view(segment.index, 0, segment.nbytes)


async def test_watchers_are_sent_elsewhere_when_the_agent_ends(
    settings: Settings, limits: WorkerLimits, packed_store: Path
) -> None:
    (digest,) = Store(packed_store).manifests()
    async with contextlib.AsyncExitStack() as stack:
        node = await stack.enter_async_context(running(settings(store_dir=packed_store), limits=limits))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(node.agent.peer.address))
        watch = peer_pb2_grpc.PeerServiceStub(channel).WatchResidency(
            peer_pb2.WatchResidencyRequest(digest=digest)
        )
        messages = aiter(watch)
        await anext(messages)
        node.agent.checkpoints.close()
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await asyncio.wait_for(anext(messages), 5)
        assert told.value.code() is grpc.StatusCode.ABORTED


class BrokenStore(Store):
    """A store that fails as no store should."""

    def prepare(
        self,
        *,
        key: str,
        source: str,
        revision: str,
        dtype: str,
        progress: Callable[[Progress], None],
        rank: int = 0,
        ranks: int = 1,
    ) -> Manifest:
        raise ZeroDivisionError("a bug in a library")


def test_orders_are_bounded(tmp_path: Path) -> None:
    checkpoints = Checkpoints(store=Store(tmp_path), holdings=Holdings(), regions=RegionTable())
    for number in range(WAITING_MAX):
        checkpoints.prepare(Wanted(key=f"k-{number}", source="file:///x", revision="", dtype=""))
    with pytest.raises(CommandError) as refused:
        checkpoints.prepare(Wanted(key="one more", source="file:///x", revision="", dtype=""))
    assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(checkpoints.statuses()) == WAITING_MAX


async def test_a_bug_fails_one_checkpoint_only(
    tmp_path: Path, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(store=BrokenStore(tmp_path), holdings=Holdings(), regions=RegionTable())
    checkpoints.start()
    with caplog.at_level(logging.CRITICAL):
        for key in ("a", "b"):
            checkpoints.prepare(Wanted(key=key, source="file:///x", revision="", dtype=""))
        await eventually(
            lambda: [c.state for c in checkpoints.statuses()] == [pb.CHECKPOINT_STATE_FAILED] * 2
        )
    assert checkpoints.statuses()[0].error == "ZeroDivisionError: a bug in a library"


def test_the_disk_is_measured(tmp_path: Path) -> None:
    assert measure_disk(tmp_path) > 1_000_000
    assert list(tmp_path.iterdir()) == []
    assert measure_disk(tmp_path / "missing") == 0
