"""Running requests that leave a replica: their tokens go on elsewhere, the same as ever, and nobody replays them."""

from __future__ import annotations

import asyncio
import random

import pytest
from layercast.agent.v1alpha1 import agent_pb2
from layercast.worker.v1alpha1 import worker_pb2
from tests.worker.conftest import Answer, GatewayClient, Packed, Reference, StartWorker, WorkerProcess

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

PROMPTS = [[random.Random(i).randrange(3, 500) for _ in range(10 + 30 * (i % 4))] for i in range(6)]
TOKENS = 120


async def serving_pair(start_worker: StartWorker, packed: Packed) -> tuple[WorkerProcess, WorkerProcess]:
    workers = [await start_worker(name) for name in ("source", "target")]
    for worker in workers:
        await worker.assign(packed)
        await worker.feed(packed)
        await worker.until(lambda status: status.replica.state == agent_pb2.REPLICA_STATE_SERVING)
    return workers[0], workers[1]


async def submitted(gateway: GatewayClient, address: str) -> list[Answer]:
    return [
        await gateway.submit(address, gateway.request(f"r{index}", prompt, max_tokens=TOKENS))
        for index, prompt in enumerate(PROMPTS)
    ]


async def until_started(answers: list[Answer], tokens: int) -> None:
    async with asyncio.timeout(60):
        for answer in answers:
            while len(answer.tokens) < tokens:
                answer.changed.clear()
                await answer.changed.wait()


async def drain(worker: WorkerProcess, *, to: list[WorkerProcess], grace_s: float = 30.0) -> None:
    await worker.control.BeginDrain(
        worker_pb2.BeginDrainRequest(
            drain=agent_pb2.DrainReplicaRequest(
                replica_id=worker.name,
                grace_ms=int(grace_s * 1000),
                destinations=[await target.peer() for target in to],
            )
        ),
        timeout=10,
    )


@pytest.mark.parametrize("after", [1, 9])
async def test_running_requests_move_with_a_drain(
    packed: Packed, start_worker: StartWorker, gateway: GatewayClient, reference: Reference, after: int
) -> None:
    source, target = await serving_pair(start_worker, packed)
    places = [(await worker.peer()).address for worker in (source, target)]
    for address in places:
        await gateway.connect(address)
    answers = await submitted(gateway, places[0])
    await until_started(answers, after)
    await drain(source, to=[target])
    await gateway.all_done()
    await source.until(lambda status: status.replica.state == agent_pb2.REPLICA_STATE_DRAINED)
    for index, answer in enumerate(answers):
        assert answer.finished and not answer.returned
        assert answer.tokens == reference(PROMPTS[index], TOKENS)
    assert any(answer.owner == places[1] for answer in answers), "nothing moved"
    assert (await target.status()).replica.load.kv_pages_used == 0


async def test_a_target_that_dies_leaves_requests_where_they_are_or_at_their_gateway(
    packed: Packed, start_worker: StartWorker, gateway: GatewayClient, reference: Reference
) -> None:
    source, target = await serving_pair(start_worker, packed)
    address = (await source.peer()).address
    await gateway.connect(address)  # and not to the target, which may therefore take nothing
    answers = await submitted(gateway, address)
    await until_started(answers, 3)
    peer = [target]
    draining = asyncio.create_task(drain(source, to=peer))
    await draining
    target.kill()
    await gateway.all_done()
    for index, answer in enumerate(answers):
        wanted = reference(PROMPTS[index], TOKENS)
        assert answer.tokens == wanted[: len(answer.tokens)]
        assert answer.returned or answer.tokens == wanted
