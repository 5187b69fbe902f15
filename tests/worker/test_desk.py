"""The desk's bookkeeping with a real engine thread and a tiny real engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import torch
from layercast.engine.v1alpha1 import engine_pb2 as pb

from layercast_agent.engine.engine import Engine, EngineLimits
from layercast_agent.engine.kv import KVCache
from layercast_agent.engine.model import build_model, shape_of
from layercast_agent.engine.sequence import TokenEvent
from layercast_agent.worker import warm
from layercast_agent.worker.desk import RequestDesk
from layercast_agent.worker.engine_loop import EngineLoop
from layercast_agent.worker.pacing import ComputeShare
from layercast_agent.worker.streams import GatewayStreams, Outbox

GATEWAY = "gateway"


@dataclass(slots=True)
class Bench:
    """A complete one-layer replica without its wire."""

    desk: RequestDesk
    loop: EngineLoop
    outbox: Outbox

    async def until(self, kind: str, request_id: str) -> list[pb.Event]:
        """All events up to the first of that kind for that request."""
        seen: list[pb.Event] = []
        async with asyncio.timeout(20):
            while True:
                for event in await self.outbox.next_batch() or []:
                    seen.append(event)
                if any(e.request_id == request_id and e.WhichOneof("event") == kind for e in seen):
                    return seen


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    device = torch.device("cpu")
    shape = shape_of(warm.TINY, "F32")
    model = build_model(config=warm.TINY, shape=shape, device=device)
    tensors = {name: torch.randn(parameter.shape) for name, parameter in model.named_tensors()}
    engine = Engine(
        model=model,
        kv=KVCache(shape, 8, page_size=16, device=device),
        limits=EngineLimits(batch_size_max=2, step_tokens_max=16, waiting_max=2, context_length_max=64),
    )
    aio = asyncio.get_running_loop()
    streams = GatewayStreams()
    desks: list[RequestDesk] = []

    def on_tokens(events: list[TokenEvent]) -> None:
        aio.call_soon_threadsafe(desks[0].tokens, events)

    loop = EngineLoop(
        engine=engine,
        layers=1,
        share=ComputeShare(1.0),
        on_tokens=on_tokens,
        on_turn=lambda: None,
        on_failure=lambda error: None,
    )
    desk = RequestDesk(replica_id="r", model="tiny", loop=loop, streams=streams)
    desks.append(desk)
    loop.start()
    for segment, part in enumerate(("embed", "layers", "norm")):
        mine = {n: t for n, t in tensors.items() if part in n or (part == "norm" and "lm_head" in n)}
        if part == "norm":
            mine = {n: t for n, t in mine.items() if "layers" not in n}
        await asyncio.wrap_future(loop.attach(segment, mine))
    yield Bench(desk=desk, loop=loop, outbox=streams.open(GATEWAY))
    assert await asyncio.to_thread(loop.stop, deadline_s=10)


def request(request_id: str, *, attempt: int = 1, max_tokens: int = 4, prompt: int = 8) -> pb.Request:
    return pb.Request(
        request_id=request_id,
        gateway_id=GATEWAY,
        attempt=attempt,
        model="tiny",
        prompt_token_ids=range(1, 1 + prompt),
        sampling=pb.Sampling(max_tokens=max_tokens),
    )


def kinds(events: list[pb.Event], request_id: str) -> list[str]:
    return [str(e.WhichOneof("event")) for e in events if e.request_id == request_id]


async def test_a_request_is_announced_before_its_tokens_and_forgotten_after_its_end(bench: Bench) -> None:
    bench.desk.submit(request("a"))
    events = await bench.until("finished", "a")
    assert kinds(events, "a") == ["accepted", "tokens", "tokens", "tokens", "tokens", "finished"]
    assert bench.desk.owned == {}
    assert bench.desk.first_token_at is not None


async def test_the_same_submit_again_is_answered_again_and_executed_once(bench: Bench) -> None:
    bench.desk.submit(request("a", max_tokens=40))
    bench.desk.submit(request("a", max_tokens=40))
    events = await bench.until("finished", "a")
    tokens: dict[int, int] = {}
    for event in events:
        for index, token in enumerate(event.tokens.token_ids, start=event.tokens.position):
            assert tokens.setdefault(index, token) == token
    assert sorted(tokens) == list(range(40))
    assert kinds(events, "a").count("accepted") == 2


async def test_a_newer_attempt_replaces_the_older(bench: Bench) -> None:
    bench.desk.submit(request("a", max_tokens=40))
    bench.desk.submit(request("a", attempt=2, max_tokens=5))
    events = await bench.until("finished", "a")
    last = [e for e in events if e.request_id == "a"][-1]
    assert (last.attempt, last.WhichOneof("event")) == (2, "finished")


async def test_what_cannot_be_served_is_refused_and_what_finds_no_room_is_given_back(bench: Bench) -> None:
    bench.desk.submit(request("long", prompt=63, max_tokens=1))
    bench.desk.submit(request("longer", prompt=64))
    events = await bench.until("failed", "longer")
    assert "64" in next(e.failed.message for e in events if e.request_id == "longer" and e.HasField("failed"))
    full = threading.Event()
    held = bench.loop.call(lambda engine: full.wait(20))  # no turn in between: the queue of two fills up
    for index in range(12):
        bench.desk.submit(request(f"r{index}", max_tokens=30))
    full.set()
    returned = await bench.until("returned", "r11")
    assert await asyncio.wrap_future(held)
    refused = [e for e in returned if e.HasField("returned")]
    assert {f"r{index}" for index in range(2, 12)} <= {e.request_id for e in refused}
    assert all("wait already" in e.returned.reason for e in refused)


async def test_a_cancelled_request_says_nothing_more(bench: Bench) -> None:
    bench.desk.submit(request("a", max_tokens=50))
    bench.desk.cancel("a", 1)
    bench.desk.submit(request("b"))
    events = await bench.until("finished", "b")
    assert "finished" not in kinds(events, "a")
    assert (await bench.desk.ask(lambda engine: engine.load())).kv_pages_used == 0


async def test_a_gateway_that_is_gone_takes_its_requests_along(bench: Bench) -> None:
    bench.desk.submit(request("a", max_tokens=50))
    bench.desk.cancel_gateway(GATEWAY)
    await bench.desk.wait_empty(5)
    assert bench.desk.owned == {}


async def test_refusing_new_requests_returns_them(bench: Bench) -> None:
    bench.desk.refuse_new("the replica is being drained")
    bench.desk.submit(request("a"))
    events = await bench.until("returned", "a")
    assert kinds(events, "a") == ["returned"]


async def test_tiny_prompts_leave_the_prefill_rate_alone(bench: Bench) -> None:
    """Their steps are fixed cost; a rate of five tokens a second once asked for three replicas."""

    async def rate_after(request_id: str, prompt: int) -> float:
        bench.desk.submit(request(request_id, prompt=prompt, max_tokens=1))
        await bench.until("finished", request_id)
        await asyncio.wrap_future(bench.loop.call(lambda engine: None))  # the turn has told what it left
        return bench.loop.view.prefill_tokens_per_s

    before = await rate_after("chunk", 16)
    assert before > 0
    rates = [await rate_after(f"tiny{index}", 2) for index in range(8)]
    assert min(rates) >= before
