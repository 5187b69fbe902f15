"""Pipelines of partial replicas, as processes: tokens before anybody is complete, and the same tokens as ever."""

from __future__ import annotations

import asyncio
import random

import pytest
from layercast.agent.v1alpha1 import agent_pb2
from layercast.worker.v1alpha1 import worker_pb2
from tests.worker.conftest import GatewayClient, Packed, Reference, StartWorker, WorkerProcess

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

PROMPTS = [[random.Random(i).randrange(3, 500) for _ in range(12 + 9 * (i % 4))] for i in range(3)]
LINK_BYTES_PER_S = 3_000_000
TOKENS = 24


def in_state(state: agent_pb2.ReplicaState) -> object:
    return lambda status: status.replica.state == state


def complete(status: worker_pb2.GetWorkerStatusResponse) -> bool:
    return status.replica.state == agent_pb2.REPLICA_STATE_SERVING


def shares(segments: int, ways: int) -> list[list[int]]:
    """Each way's segments first: the leader has embed and head, the layers are dealt in runs."""
    layers = list(range(1, segments - 1))
    size = -(-len(layers) // ways)
    orders = []
    for way in range(ways):
        own = layers[way * size : (way + 1) * size]
        ends = [0, segments - 1] if way == 0 else []
        orders.append([*ends, *own, *(s for s in range(segments) if s not in own and s not in ends)])
    return orders


async def start(
    start_worker: StartWorker, packed: Packed, ways: int
) -> tuple[list[WorkerProcess], WorkerProcess]:
    """`ways` targets that load from one holder over a slow link; the first leads."""
    holder = await start_worker("holder", egress_bytes_per_s=LINK_BYTES_PER_S)
    await holder.assign(packed)
    await holder.feed(packed)
    await holder.until(complete)
    targets = [await start_worker(f"target{index}") for index in range(ways)]
    for target in targets:
        await target.assign(packed)
    peers = [await target.peer() for target in targets]
    from_holder = [await holder.peer()]
    orders = shares(len(packed.manifest.segments), ways)
    for index in reversed(range(ways)):
        await targets[index].feed(
            packed, upstreams=from_holder, order=orders[index], lead=peers[1:] if index == 0 else None
        )
    return targets, holder


@pytest.mark.parametrize("ways", [1, 2, 3])
async def test_tokens_come_before_anybody_is_complete(
    packed: Packed, start_worker: StartWorker, gateway: GatewayClient, reference: Reference, ways: int
) -> None:
    targets, _ = await start(start_worker, packed, ways)
    leader = targets[0]
    peer = await leader.peer()
    await gateway.connect(peer.address)
    answers = [
        await gateway.submit(peer.address, gateway.request(f"r{index}", prompt, max_tokens=TOKENS))
        for index, prompt in enumerate(PROMPTS)
    ]
    if ways > 1:
        async with asyncio.timeout(60):
            while not answers[0].tokens:
                answers[0].changed.clear()
                await answers[0].changed.wait()
        for target in targets:
            assert not complete(await target.status()), "there was a complete replica at the first token"
    await gateway.all_done()
    await leader.until(complete)
    for index, prompt in enumerate(PROMPTS):
        assert gateway.answers[f"r{index}"].finished
        assert gateway.answers[f"r{index}"].tokens == reference(prompt, TOKENS)


async def test_a_member_that_dies_costs_no_token(
    packed: Packed, start_worker: StartWorker, gateway: GatewayClient, reference: Reference
) -> None:
    targets, _ = await start(start_worker, packed, 2)
    leader, member = targets
    peer = await leader.peer()
    await gateway.connect(peer.address)
    answers = [
        await gateway.submit(peer.address, gateway.request(f"r{index}", prompt, max_tokens=TOKENS))
        for index, prompt in enumerate(PROMPTS)
    ]
    async with asyncio.timeout(60):
        while len(answers[0].tokens) < 3:
            answers[0].changed.clear()
            await answers[0].changed.wait()
    member.kill()
    await gateway.all_done()
    for index, prompt in enumerate(PROMPTS):
        assert gateway.answers[f"r{index}"].tokens == reference(prompt, TOKENS)


async def test_who_comes_late_is_admitted_and_brings_the_first_token_forward(
    packed: Packed, start_worker: StartWorker, gateway: GatewayClient, reference: Reference
) -> None:
    """One leads alone, which gives no token before it is complete; a second asks it as it would ask a live source."""
    holders = [await start_worker(name, egress_bytes_per_s=LINK_BYTES_PER_S) for name in ("one", "other")]
    for holder in holders:
        await holder.assign(packed)
        await holder.feed(packed)
        await holder.until(complete)
    leader, late = [await start_worker(name) for name in ("leader", "late")]
    for target in (leader, late):
        await target.assign(packed)
    peer, segments = await leader.peer(), len(packed.manifest.segments)
    in_order, towards = list(range(segments)), [*range(segments - 2, 0, -1), 0, segments - 1]
    in_order = [0, segments - 1, *in_order[1:-1]]
    await leader.feed(packed, upstreams=[await holders[0].peer()], order=in_order, lead=[])
    await gateway.connect(peer.address)
    answers = [
        await gateway.submit(peer.address, gateway.request(f"r{index}", prompt, max_tokens=TOKENS))
        for index, prompt in enumerate(PROMPTS)
    ]
    await late.feed(packed, upstreams=[await holders[1].peer()], order=towards, live_source=peer)
    async with asyncio.timeout(60):
        while not answers[0].tokens:
            answers[0].changed.clear()
            await answers[0].changed.wait()
    for target in (leader, late):
        assert not complete(await target.status()), "there was a complete replica at the first token"
    await gateway.all_done()
    await leader.until(complete)
    await late.until(complete)
    for index, prompt in enumerate(PROMPTS):
        assert gateway.answers[f"r{index}"].finished
        assert gateway.answers[f"r{index}"].tokens == reference(prompt, TOKENS)
