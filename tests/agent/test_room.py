"""Packed checkpoints make room for others: which, when, and never one that is wanted or in use."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layercast.agent.v1alpha1 import agent_pb2 as pb
from tests.agent.test_checkpoints import prepare, serving

from layercast_agent.errors import NoCapacityError
from layercast_agent.health import WorkerLimits
from layercast_agent.room import Packed, choose
from layercast_agent.settings import AgentSettings
from layercast_agent.store import Store

Eventually = Callable[..., Awaitable[Any]]
Settings = Callable[..., AgentSettings]

HELD = st.lists(
    st.builds(
        Packed,
        digest=st.uuids().map(str),
        nbytes=st.integers(1, 50),
        used_at=st.floats(0, 9, allow_nan=False),
    ),
    max_size=8,
    unique_by=lambda one: one.digest,
)


@given(HELD, st.data(), st.integers(0, 60), st.integers(0, 200))
def test_what_goes_is_enough_old_unwanted_and_no_more(
    held: list[Packed], data: st.DataObject, need_bytes: int, bytes_max: int
) -> None:
    digests = [one.digest for one in held]
    used = set(data.draw(st.lists(st.sampled_from(digests), max_size=4))) if digests else set()
    wanted = set(data.draw(st.lists(st.sampled_from(digests), max_size=4))) if digests else set()
    free = [one for one in held if one.digest not in used | wanted]
    total = sum(one.nbytes for one in held) + need_bytes
    arguments: dict[str, Any] = {"need_bytes": need_bytes, "bytes_max": bytes_max, "used": used}
    try:
        gone = choose(held, wanted=wanted, **arguments)
    except NoCapacityError as error:
        assert total - sum(one.nbytes for one in free) > bytes_max > 0
        assert str(need_bytes) in str(error) and str(bytes_max) in str(error)
    else:
        assert set(gone) <= set(free)
        left = total - sum(one.nbytes for one in gone)
        assert not bytes_max or left <= bytes_max
        assert not gone or left + gone[-1].nbytes > bytes_max, "one more than was needed"
        assert all(one.used_at <= kept.used_at for one in gone for kept in set(free) - set(gone))
    if bytes_max and total > bytes_max:
        with pytest.raises(NoCapacityError, match="has not said yet"):
            choose(held, wanted=None, **arguments)


@pytest.fixture
def models(tinymodels: ModuleType, tmp_path: Path) -> list[str]:
    """Sources of four checkpoints of one size."""
    folders = [tinymodels.make(tmp_path / f"m{n}", "llama", layers=1, seed=n) for n in range(4)]
    return [f"file://{folder}" for folder in folders]


async def test_the_oldest_that_nobody_wants_makes_room(
    settings: Settings, limits: WorkerLimits, eventually: Eventually, models: list[str], tmp_path: Path
) -> None:
    sizing = Store(tmp_path / "sizing")
    size = sizing.prepare(key="k", source=models[0], revision="", dtype="", progress=lambda p: None).nbytes
    async with serving(settings(store_bytes_max=3 * size), limits) as (node, stub, peer):

        async def packed(number: int) -> pb.Checkpoint:
            key = f"k{number}"
            await stub.PrepareCheckpoint(prepare(models[number], key=key))
            ended = (pb.CHECKPOINT_STATE_READY, pb.CHECKPOINT_STATE_FAILED)
            await eventually(lambda: any(c.key == key and c.state in ended for c in known()))
            return next(c for c in known() if c.key == key)

        def known() -> list[pb.Checkpoint]:
            return list(node.agent.status().checkpoints)

        first, second, third = [await packed(number) for number in range(3)]
        refused = await packed(3)
        assert refused.state == pb.CHECKPOINT_STATE_FAILED
        assert "has not said yet which checkpoints are wanted" in refused.error

        await stub.KeepCheckpoints(pb.KeepCheckpointsRequest(keys=["k0", "k1", "k2", "k3"]))
        refused = await packed(3)
        assert f"{3 * size} bytes of it are in use or wanted by ModelServices" in refused.error

        # The first is the oldest and wanted; the second is not wanted, and used after the third.
        await stub.KeepCheckpoints(pb.KeepCheckpointsRequest(keys=["k0", "k3"]))
        assert node.agent.checkpoints.held(second.digest) is not None
        folder = node.agent.checkpoints.folder(third.digest)
        assert (await packed(3)).state == pb.CHECKPOINT_STATE_READY
        assert {c.digest for c in known() if c.on_disk} == {
            first.digest,
            second.digest,
            (await packed(3)).digest,
        }
        assert not folder.exists()
        store = node.agent.status().store
        assert (store.capacity_bytes, store.used_bytes, store.checkpoints_removed) == (3 * size, 3 * size, 1)
        with pytest.raises(grpc.aio.AioRpcError):
            await read_manifest(peer, third.digest)

        # One that a replica runs stays though nobody wants it; one that is gone is packed again when asked for.
        await stub.KeepCheckpoints(pb.KeepCheckpointsRequest(keys=["k2"]))
        await eventually(lambda: node.agent.workers[0].state == pb.WORKER_STATE_IDLE)
        await stub.StartReplica(
            pb.StartReplicaRequest(
                replica_id="r", model="m", digest=first.digest, context_length_max=64, batch_size_max=1
            )
        )
        assert (await packed(2)).state == pb.CHECKPOINT_STATE_READY
        held = {c.digest for c in known() if c.on_disk}
        assert {first.digest, third.digest} <= held and len(held) == 3
    again = Store(settings().store_dir)
    assert set(again.manifests()) == held


async def read_manifest(peer: Any, digest: str) -> None:
    from layercast.peer.v1alpha1 import peer_pb2

    await peer.GetManifest(peer_pb2.GetManifestRequest(digest=digest), timeout=5)
