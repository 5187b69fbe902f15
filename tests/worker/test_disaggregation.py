"""A request's prompt is computed at one replica and its tokens at another: the same tokens as ever, whatever dies."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
import torch
from layercast.agent.v1alpha1 import agent_pb2
from layercast.peer.v1alpha1 import peer_pb2
from layercast.worker.v1alpha1 import worker_pb2
from tests.worker.conftest import Answer, GatewayClient, Packed, Reference, StartWorker, WorkerProcess
from tests.worker.inprocess import Gateway, Worker

from layercast_agent.engine.engine import Engine

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

SERVING = agent_pb2.REPLICA_STATE_SERVING
PROMPTS = [[random.Random(i).randrange(3, 500) for _ in range(9 + 22 * (i % 5))] for i in range(8)]
TOKENS = 24
SLOW = 0.1
"""Of a core for who computes prompts: a request is moved before its last token, however busy the machine is."""


async def serving_pair(start_worker: StartWorker, packed: Packed) -> tuple[WorkerProcess, WorkerProcess]:
    workers = [await start_worker("prefill", cpu_share=SLOW), await start_worker("decode")]
    for worker in workers:
        await worker.assign(packed)
        await worker.feed(packed)
        await worker.until(lambda status: status.replica.state == SERVING)
    return workers[0], workers[1]


async def asked_of(
    gateway: GatewayClient, address: str, decode_at: peer_pb2.Peer, *, tokens: int = TOKENS
) -> list[Answer]:
    return [
        await gateway.submit(
            address,
            gateway.request(f"r{index}", prompt, max_tokens=tokens, decode_at=decode_at),
        )
        for index, prompt in enumerate(PROMPTS)
    ]


async def test_answers_are_those_of_one_replica(
    packed: Packed, start_worker: StartWorker, gateway: GatewayClient, reference: Reference
) -> None:
    prefill, decode = await serving_pair(start_worker, packed)
    here, there = await prefill.peer(), await decode.peer()
    for peer in (here, there):
        await gateway.connect(peer.address)
    answers = await asked_of(gateway, here.address, there, tokens=60)
    await gateway.all_done()
    for index, answer in enumerate(answers):
        assert answer.finished and not answer.returned
        assert answer.tokens == reference(PROMPTS[index], 60)
        assert answer.owner == there.address, "it did not decode where it should"
    told = (await prefill.status()).replica.load
    assert told.requests_moved == len(PROMPTS) and told.kv_bytes_sent > 0
    assert told.kv_pages_used == 0
    assert (await decode.status()).replica.load.kv_pages_used == 0


async def test_a_role_is_told_and_costs_only_what_waits(
    packed: Packed, start_worker: StartWorker, gateway: GatewayClient, reference: Reference
) -> None:
    prefill, decode = await serving_pair(start_worker, packed)
    here, there = await prefill.peer(), await decode.peer()
    for peer in (here, there):
        await gateway.connect(peer.address)
    answers = await asked_of(gateway, here.address, there)
    role = agent_pb2.SetReplicaRoleRequest(replica_id="prefill", role=agent_pb2.REPLICA_ROLE_DECODE)
    await prefill.control.SetRole(worker_pb2.SetRoleRequest(role=role), timeout=10)
    await gateway.all_done()
    for index, answer in enumerate(answers):
        wanted = reference(PROMPTS[index], TOKENS)
        assert answer.returned or answer.tokens == wanted
        assert answer.tokens == wanted[: len(answer.tokens)]
    assert (await prefill.status()).replica.role == agent_pb2.REPLICA_ROLE_DECODE


@pytest.fixture
async def pair(packed: Packed) -> AsyncIterator[tuple[Worker, Worker, Gateway]]:
    """Two complete replicas in this process, and a gateway that names the second for decoding."""
    workers, gateway = (Worker("prefill", cpu_share=SLOW), Worker("decode")), Gateway()
    for worker in workers:
        await worker.start(packed.manifest, packed.files)
        worker.feed(worker.from_disk(packed.folder))
        await worker.until(lambda replica: replica.state == SERVING)
        await gateway.connect(worker.peer.address)
    gateway.routes = [workers[0].peer.address]
    gateway.decode_at = workers[1].peer
    yield (*workers, gateway)
    await gateway.close()
    for worker in workers:
        await worker.kill()


def hold_layer(engine: Engine, layer: int) -> asyncio.Event:
    """The engine's thread does not run `layer` of a prompt until the event is set, which is returned."""
    loop, reached, go_on = asyncio.get_running_loop(), engine.model.run_layers, asyncio.Event()

    def run_layers(first: int, last: int, hidden: torch.Tensor, batch: object) -> torch.Tensor:
        if first >= layer and hidden.shape[0] > 1:
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(60)
        return reached(first, last, hidden, batch)  # type: ignore[arg-type]

    engine.model.run_layers = run_layers  # type: ignore[method-assign]
    return go_on


async def test_layers_arrive_while_the_layers_behind_them_wait(
    pair: tuple[Worker, Worker, Gateway], reference: Reference
) -> None:
    """The prompt is one chunk: what is at the target before its last layer ran can only have come layer by layer."""
    prefill, decode, gateway = pair
    prompt = PROMPTS[4]
    layers = prefill.replica.memory.shape.layers
    go_on = hold_layer(prefill.replica.memory.engine, layers // 2 + 1)
    gateway.ask("r", prompt, TOKENS)
    serving = asyncio.create_task(gateway.run())
    held = await decode.until_held(range(layers // 2), len(prompt))
    assert layers - 1 not in held, "the last layer was not computed yet"
    assert not gateway.asked["r"].state.tokens
    go_on.set()
    await serving
    assert gateway.asked["r"].state.tokens == reference(prompt, TOKENS)
    assert decode.peer.address in gateway.asked["r"].served_by


async def test_a_full_replica_leaves_requests_where_they_are(
    pair: tuple[Worker, Worker, Gateway], reference: Reference
) -> None:
    prefill, decode, gateway = pair
    allocator = decode.replica.memory.engine._kv.allocator
    taken = await decode.replica.desk.ask(lambda engine: allocator.allocate(allocator.total))
    for index, prompt in enumerate(PROMPTS):
        gateway.ask(f"r{index}", prompt, TOKENS)
    await gateway.run()
    for index, prompt in enumerate(PROMPTS):
        asked = gateway.asked[f"r{index}"]
        assert asked.state.tokens == reference(prompt, TOKENS) and asked.state.faults == 0
        assert asked.served_by == {prefill.peer.address}
    await decode.replica.desk.ask(lambda engine: allocator.free(taken))


async def test_what_the_prefix_cache_has_is_brought_too(
    pair: tuple[Worker, Worker, Gateway], reference: Reference
) -> None:
    prefill, decode, gateway = pair
    prompt = PROMPTS[4]
    for name, asked in (("first", prompt), ("second", [*prompt[:64], *PROMPTS[1]])):
        gateway.ask(name, asked, TOKENS)
        await gateway.run()
        assert gateway.asked[name].state.tokens == reference(asked, TOKENS)
        assert decode.peer.address in gateway.asked[name].served_by
    assert prefill.replica.loop.view.load.prefix_tokens_hit > 0
    assert prefill.replica.mover.moved == 2


@pytest.mark.parametrize("who", ["prefill", "decode"])
@pytest.mark.parametrize("events", [1, 12, 40])
async def test_a_death_costs_a_replay_and_no_token(
    pair: tuple[Worker, Worker, Gateway], reference: Reference, who: str, events: int
) -> None:
    prefill, decode, gateway = pair
    gateway.routes.append(decode.peer.address)
    for index, prompt in enumerate(PROMPTS):
        gateway.ask(f"r{index}", prompt, TOKENS)
    serving = asyncio.create_task(gateway.run())
    await gateway.until_events(events)
    await (prefill if who == "prefill" else decode).kill()
    await asyncio.wait_for(serving, 90)
    for index, prompt in enumerate(PROMPTS):
        asked = gateway.asked[f"r{index}"]
        assert asked.ends == 1 and not asked.error
        assert asked.state.tokens == reference(prompt, TOKENS)


async def test_pieces_that_wait_are_bounded(pair: tuple[Worker, Worker, Gateway]) -> None:
    """A link that is slower than the prompt's computation: what is left comes in rounds."""
    from layercast_agent.engine.moves import Piece
    from layercast_agent.worker.moving import PIECES_MAX, _into

    pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
    follower = _into(pieces, asyncio.get_running_loop())
    piece = Piece(first=0, last=1, start=0, stop=1, kv=torch.zeros(1, dtype=torch.uint8))
    told = []
    for _ in range(PIECES_MAX + 1):
        told.append(follower(piece))
        await asyncio.sleep(0)
    assert told == [True] * PIECES_MAX + [False]
    last = [pieces.get_nowait() for _ in range(pieces.qsize())][-1]
    assert last is None
