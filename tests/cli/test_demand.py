"""The demo's client side against scripted servers: records, failures, phases, and a whole run of stand-ins."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from layercast_cli.demand import DemandPlan, Drive, demand_plan, rate_of, shrunk
from layercast_cli.errors import ClusterError
from layercast_cli.local import LocalCluster
from layercast_cli.programs import ClusterLayout, ClusterSettings, layercast_programs
from layercast_cli.prompts import PROMPTS
from layercast_cli.records import BURST, LOW, REFERENCE, STEADY, Sample
from layercast_cli.summary import problems, summarize
from layercast_cli.supervise import Program
from layercast_cli.traffic import Traffic

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
STANDIN = str(Path(__file__).with_name("standin.py"))


def event(text: str | None, reason: str | None = None) -> bytes:
    delta = {} if text is None else {"content": text}
    body = {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
    return f"data: {json.dumps(body)}\n\n".encode()


def streaming(*parts: bytes) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for part in parts:
            await response.write(part)
        return response

    return handle


@pytest.fixture
async def traffic_to() -> AsyncIterator[Callable[..., Awaitable[Traffic]]]:
    """Makes a Traffic that talks to a server with the given handler."""
    servers: list[TestServer] = []
    session = aiohttp.ClientSession()

    async def make(handler: Handler, **changes: Any) -> Traffic:
        app = web.Application()
        app.add_routes([web.post("/v1/chat/completions", handler)])
        servers.append(TestServer(app))
        await servers[-1].start_server()
        values: dict[str, Any] = {"model": "m", "prompts": ("one", "two", "three"), "max_tokens": 8}
        values |= {"seed": 3, "requests_max": 50, "deadline_s": 20.0}
        return Traffic(session, url=str(servers[-1].make_url("")).rstrip("/"), **(values | changes))

    yield make
    await session.close()
    for server in servers:
        await server.close()


async def test_an_answer_is_recorded_piece_by_piece(traffic_to: Callable[..., Awaitable[Traffic]]) -> None:
    bodies: list[dict[str, Any]] = []
    stream = streaming(event(""), event("Hel"), event("lo"), event(None, "stop"), b"data: [DONE]\n\n")

    async def handle(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        return await stream(request)

    traffic = await traffic_to(handle)
    record = await traffic.ask(1, phase=STEADY)
    assert (record.text, record.finish_reason, record.ok, len(record.token_at)) == ("Hello", "stop", True, 2)
    assert record.ttft_s is not None
    assert 0 < record.ttft_s < 20
    assert record.sent_at < record.token_at[0] <= record.token_at[1] <= record.ended_at
    assert bodies[0]["messages"] == [{"role": "user", "content": "two"}]
    assert (bodies[0]["temperature"], bodies[0]["stream"], bodies[0]["max_tokens"]) == (0, True, 8)
    assert (traffic.sent, traffic.in_flight, traffic.records) == (1, 0, [record])


async def refuse(_request: web.Request) -> web.StreamResponse:
    return web.json_response({"error": {"message": "queue full"}}, status=503)


async def never(_request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (refuse, "HTTP 503"),
        (streaming(event("a"), b'data: {"error": {"message": "replica lost"}}\n\n'), "replica lost"),
        (streaming(event("a")), "the connection ended before the answer did"),
        (streaming(event("a"), b"data: [DONE]\n\n"), "the stream ended before the answer did"),
        (streaming(b"data: {not json\n\n"), "JSONDecodeError"),
        (never, "no complete answer within 0 s"),
    ],
)
async def test_whatever_is_not_a_whole_answer_is_a_failure(
    traffic_to: Callable[..., Awaitable[Traffic]], handler: Handler, words: str
) -> None:
    traffic = await traffic_to(handler, deadline_s=0.2 if handler is never else 20.0)
    record = await traffic.ask(0, phase=BURST)
    assert not record.ok
    assert words in record.error
    assert traffic.records == [record]


async def test_a_refused_connection_is_a_failure() -> None:
    async with aiohttp.ClientSession() as session:
        traffic = Traffic(
            session, url="http://127.0.0.1:1", model="m", prompts=("a",), max_tokens=1, seed=1, requests_max=1
        )
        assert "ClientConnectorError" in (await traffic.ask(0, phase=LOW)).error


async def test_arrivals_are_poisson_bounded_and_from_the_seed(
    traffic_to: Callable[..., Awaitable[Traffic]],
) -> None:
    answer = streaming(event("a", "stop"), b"data: [DONE]\n\n")
    orders = []
    for _ in range(2):
        traffic = await traffic_to(answer)
        count = await traffic.poisson(phase=STEADY, rate=60.0, seconds=0.4)
        await traffic.finish()
        chance, expected, at = random.Random(3), 0, 0.0
        while True:
            at += chance.expovariate(60.0)
            if at > 0.4:
                break
            expected += 1
            # The shuffle of prompts draws from the same stream, at the first request and every third after it.
            if (expected - 1) % 3 == 0:
                chance.shuffle(list(range(3)))
        assert count == expected == len(traffic.records)
        orders.append([each.prompt for each in sorted(traffic.records, key=lambda each: each.index)])
    assert orders[0] == orders[1]
    assert set(orders[0][:3]) == {0, 1, 2}
    bounded = await traffic_to(answer, requests_max=5)
    assert await bounded.poisson(phase=STEADY, rate=500.0, seconds=0.1) == 5
    await bounded.finish()
    assert await bounded.poisson(phase=STEADY, rate=500.0, seconds=5, stop=lambda: True) == 0


async def test_few_at_a_time_never_asks_more_together(traffic_to: Callable[..., Awaitable[Traffic]]) -> None:
    together, most = 0, 0
    inner = streaming(event("a", "stop"), b"data: [DONE]\n\n")

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal together, most
        together += 1
        most = max(most, together)
        response = await inner(request)
        together -= 1
        return response

    traffic = await traffic_to(handle)
    records = await traffic.few_at_a_time([2, 0, 1, 2], phase=REFERENCE, concurrency=2)
    assert [each.prompt for each in records] == [2, 0, 1, 2]
    assert 1 <= most <= 2


def test_rates_and_phases() -> None:
    assert rate_of(2.0, 0.4) == pytest.approx(0.8)
    assert (rate_of(0.01, 0.4), rate_of(1000, 1)) == (0.1, 20.0)
    plan = demand_plan(120)
    assert plan.steady_s + plan.burst_s_max + plan.low_s_max == pytest.approx(122)
    assert not shrunk(None)


def standins(layout: ClusterLayout) -> tuple[Program, ...]:
    import sys

    parts = {"gateway": ("gateway", layout.gateway_listen), "operator": ("operator", str(layout.state.root))}
    return tuple(
        Program(
            name=each.name,
            argv=(sys.executable, STANDIN, *parts[each.name]),
            log=each.log,
            pid_file=each.pid_file,
        )
        for each in layercast_programs(layout)
        if each.name in parts
    )


async def test_a_whole_run(tmp_path: Path) -> None:
    spec = {
        "model": {"source": "hf://a/b"},
        "replicas": 1,
        "scaling": {"min": 1, "max": 3, "mode": "Recommend"},
    }
    service = {
        "apiVersion": "layercast.dev/v1alpha1",
        "kind": "ModelService",
        "metadata": {"name": "smollm2"},
    }
    settings = ClusterSettings(state_dir=tmp_path, services=({**service, "spec": spec},), agents=3)
    plan = DemandPlan(steady_s=0.4, burst_s_max=2.0, burst_tail_s=0.1, low_s_max=4.0, requests_max=60)
    seen: list[Sample] = []
    with LocalCluster(settings, programs=standins) as cluster:
        cluster.wait_ready("smollm2", deadline_s=60)
        drive = Drive(
            cluster=cluster,
            model="smollm2",
            plan=plan,
            wanted_replicas=3,
            seed=1,
            max_tokens=3,
            settings={"policy": "live"},
            on_sample=lambda sample, _traffic: seen.append(sample),
        )
        record = await drive.run()
    assert tuple(seen) == record.samples
    assert record.reference == {
        place: "".join(f"{w} " for w in text.split()[:3]) for place, text in enumerate(PROMPTS)
    }
    assert list(record.phase_at) == [REFERENCE, STEADY, BURST, LOW]
    assert {each.phase for each in record.requests} >= {REFERENCE, BURST}
    summary = summarize(record)
    assert problems(record, summary) == []
    assert (summary.replicas_max, summary.replicas_end, len(record.scales)) == (3, 1, 1)
    # The entry in the record is its last version: it was incomplete when it appeared.
    assert summary.decision_to_first_token_s == pytest.approx(0.1)
    assert summary.load_s == pytest.approx(0.5)
    assert summary.handoffs == len(record.requests)


async def test_a_process_that_does_not_stay_up_ends_the_run(tmp_path: Path) -> None:
    class Ill(LocalCluster):
        def broken(self) -> str:
            return "gateway does not stay up"

    service = {"metadata": {"name": "m"}, "spec": {"scaling": {}}}
    cluster = Ill(ClusterSettings(state_dir=tmp_path, services=(service,)), programs=lambda _layout: ())
    cluster.start()
    try:
        drive = Drive(
            cluster=cluster,
            model="m",
            plan=DemandPlan(),
            wanted_replicas=3,
            seed=1,
            max_tokens=3,
            settings={},
            on_sample=lambda _sample, _traffic: None,
        )
        with pytest.raises(ClusterError, match="gateway does not stay up"):
            await drive.run()
    finally:
        cluster.stop()
