"""Commands on the wire: one at a time per subject, nothing twice before it was seen, errors as values."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from layercast.agent.v1alpha1 import agent_pb2 as pb

from layercast_operator.actions import StartReplica, StartTransfer
from layercast_operator.agents import AgentCalls
from layercast_operator.errors import AgentCallError
from layercast_operator.executor import Executor
from layercast_operator.metrics import Metrics
from layercast_operator.snapshot import PeerRef, Snapshot

Eventually = Callable[..., Awaitable[None]]


class Bench:
    """An executor, one scripted agent, and time that the test moves."""

    def __init__(self, wire: Any) -> None:
        self.now = 100.0
        self.agent = wire.ScriptedAgent("n")
        self.agent.blank_answers = 0
        self.calls = AgentCalls()
        self.polls: list[str] = []
        self.executor = Executor(
            calls=self.calls,
            metrics=Metrics(),
            clock=lambda: self.now,
            wake=asyncio.Event(),
            poll_soon=self.polls.append,
        )

    async def look(self) -> Snapshot:
        self.now += 1
        node = await self.calls.get_status("n", polled_at=self.now, deadline_s=5)
        return Snapshot(at=self.now, nodes=(node,))


@pytest.fixture
async def bench(wire: Any) -> AsyncIterator[Bench]:
    made = Bench(wire)
    await made.agent.start()
    await made.calls.set_addresses({"n": made.agent.address})
    yield made
    await made.executor.close()
    await made.calls.close()
    await made.agent.stop()


def start(name: str = "m-000001") -> StartReplica:
    return StartReplica(
        node="n",
        model="m",
        replica_id=name,
        digest="d",
        device_id="cpu:0",
        context_length_max=8,
        batch_size_max=1,
        step_tokens_max=0,
        engine="auto",
        prefix_caching=True,
        manifest_peer=PeerRef(peer_id="p", address="p:1", data_address="p:2"),
        why="a test",
    )


async def test_a_command_is_repeated_only_after_its_effect_could_be_seen(
    bench: Bench, eventually: Eventually
) -> None:
    before = await bench.look()
    assert bench.executor.submit([start()], before) == [start()]
    assert [p.replica_id for p in bench.executor.pending()] == ["m-000001"]
    assert bench.executor.submit([start()], before) == []
    await eventually(lambda: bench.polls == ["n"])
    assert bench.executor.submit([start()], before) == [], "seen before the command was done"
    seen = await bench.look()
    assert bench.executor.submit([], seen) == [] and bench.executor.pending() == []
    assert [r.replica_id for r in seen.replicas("m")] == ["m-000001"]
    (request,) = bench.agent.of(pb.StartReplicaRequest)
    assert request.manifest_peer.data_address == "p:2"
    assert bench.executor.take_failures() == []


async def test_a_refusal_is_a_value_and_rests_before_it_is_tried_again(
    bench: Bench, eventually: Eventually
) -> None:
    bench.agent.refuse["StartReplicaRequest"] = (grpc.StatusCode.RESOURCE_EXHAUSTED, "no idle\nworker")
    snapshot = await bench.look()
    bench.executor.submit([start()], snapshot)
    await eventually(lambda: bench.polls)
    (failure,) = bench.executor.take_failures()
    assert (failure.code, failure.text) == ("RESOURCE_EXHAUSTED", "n: no idle worker (RESOURCE_EXHAUSTED)")
    assert bench.executor.pending() == []
    assert bench.executor.submit([start()], snapshot) == [], "no rest"
    again = await bench.look()
    assert bench.executor.submit([start()], again) == [start()]
    assert bench.executor.submit([start("m-000002")], again) == [start("m-000002")]
    await eventually(lambda: len(bench.polls) == 3)


async def test_an_agent_that_is_away_is_a_value_too(bench: Bench, eventually: Eventually) -> None:
    snapshot = await bench.look()
    await bench.agent.stop()
    bench.executor.submit([start()], snapshot)
    await eventually(lambda: bench.polls)
    assert bench.executor.take_failures()[0].code == "UNAVAILABLE"
    with pytest.raises(AgentCallError, match="not in the cluster"):
        await bench.calls.get_status("other", polled_at=0, deadline_s=1)


async def test_a_transfer_on_the_wire(bench: Bench, eventually: Eventually) -> None:
    snapshot = await bench.look()
    bench.executor.submit([start()], snapshot)
    await eventually(lambda: bench.polls)
    transfer = StartTransfer(
        node="n",
        model="m",
        replica_id="m-000001",
        transfer_id="m-000001-t",
        generation=7,
        upstreams=(PeerRef(peer_id="p", address="p:1", data_address="p:2"), None),
        segment_order=(1, 2, 0, 3),
        live_source=PeerRef(peer_id="s", address="s:1", data_address="s:2"),
        why="a test",
    )
    bench.executor.submit([transfer], await bench.look())
    await eventually(lambda: len(bench.polls) == 2)
    (request,) = bench.agent.of(pb.StartTransferRequest)
    assert (request.transfer_id, request.generation) == ("m-000001-t", 7)
    assert [u.local_disk for u in request.upstreams] == [False, True]
    assert not request.upstreams[1].HasField("peer")
    assert list(request.segment_order) == [1, 2, 0, 3]
    assert request.live_source.address == "s:1"
    (replica,) = (await bench.look()).replicas("m")
    assert replica.transfer is not None and replica.transfer.upstream == "p"
    assert replica.timeline.assigned_at is not None and replica.timeline.complete_at is None
