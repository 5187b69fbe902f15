"""An agent that is to end: it says so, starts nothing new, and stays while it is needed and its grace lasts."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from layercast.agent.v1alpha1 import agent_pb2 as pb
from tests.agent.test_process import Process, agent_process, flags

from layercast_agent.leaving import executing, needed

pytestmark = pytest.mark.processes

Eventually = Callable[..., Awaitable[Any]]


async def serve_one(agent: Process, eventually: Eventually, tiny_model: Path) -> str:
    """One replica that serves; returns its checkpoint."""
    await eventually(agent.workers, within_s=30)
    await agent.stub.PrepareCheckpoint(pb.PrepareCheckpointRequest(key="k", source=f"file://{tiny_model}"))

    async def digest() -> str:
        return (await agent.status()).checkpoints[0].digest

    packed = str(await eventually(digest))
    await agent.stub.StartReplica(pb.StartReplicaRequest(replica_id="r-1", model="m", digest=packed))
    await agent.stub.StartTransfer(
        pb.StartTransferRequest(
            replica_id="r-1", transfer_id="t", generation=1, upstreams=[pb.Upstream(local_disk=True)]
        )
    )
    return packed


async def said_at_the_end(agent: Process) -> str:
    _, said = await asyncio.to_thread(agent.process.communicate, timeout=20)
    assert agent.process.returncode == 0 and "Traceback" not in said, said
    return str(said)


async def test_it_stays_until_its_replica_was_moved_and_takes_no_other(
    tmp_path: Path, eventually: Eventually, tiny_model: Path
) -> None:
    async with agent_process(flags(tmp_path, leave_grace_s=60)) as agent:
        digest = await serve_one(agent, eventually, tiny_model)
        assert not (await agent.status()).leaving
        agent.process.send_signal(signal.SIGTERM)

        async def leaves() -> bool:
            return (await agent.status()).leaving

        await eventually(leaves)
        with pytest.raises(grpc.aio.AioRpcError, match="this agent is ending") as refused:
            await agent.stub.StartReplica(pb.StartReplicaRequest(replica_id="r-2", model="m", digest=digest))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        (replica,) = (await agent.status()).replicas
        assert replica.state == pb.REPLICA_STATE_SERVING
        # What the operator does when another one serves.
        await agent.stub.DrainReplica(pb.DrainReplicaRequest(replica_id="r-1"))
        await agent.stub.StopReplica(pb.StopReplicaRequest(replica_id="r-1"))
        assert "they are drained" not in await said_at_the_end(agent)


async def test_what_is_left_when_its_time_is_up_is_drained(
    tmp_path: Path, eventually: Eventually, tiny_model: Path
) -> None:
    async with agent_process(flags(tmp_path, leave_grace_s=0.5)) as agent:
        await serve_one(agent, eventually, tiny_model)
        agent.process.send_signal(signal.SIGTERM)
        assert "they are drained" in await said_at_the_end(agent)


async def test_who_asks_twice_does_not_wait(tmp_path: Path, eventually: Eventually, tiny_model: Path) -> None:
    async with agent_process(flags(tmp_path, leave_grace_s=300)) as agent:
        await serve_one(agent, eventually, tiny_model)
        agent.process.send_signal(signal.SIGTERM)

        async def leaves() -> bool:
            return (await agent.status()).leaving

        await eventually(leaves)
        agent.process.send_signal(signal.SIGINT)
        await said_at_the_end(agent)


def test_copies_and_requests_are_needed_and_what_only_arrives_is_not() -> None:
    status = pb.GetStatusResponse(
        replicas=[
            pb.Replica(replica_id=state, state=pb.ReplicaState.Value(f"REPLICA_STATE_{state}"))
            for state in ("LOADING", "LIVE", "LEADING", "SERVING", "DRAINING", "DRAINED", "FAILED")
        ],
        host_pool=pb.HostPool(
            copies=[
                pb.HostCopy(digest="whole", state=pb.HOST_COPY_STATE_COMPLETE),
                pb.HostCopy(digest="part", state=pb.HOST_COPY_STATE_FILLING),
            ]
        ),
    )
    assert executing(status) == ["LIVE", "LEADING", "SERVING", "DRAINING"]
    assert needed(status) == ["LIVE", "LEADING", "SERVING", "DRAINING", "DRAINED", "whole"]
