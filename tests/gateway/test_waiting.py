"""Requests that wait: for room, for a replica, for a tokenizer, and how long."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from tests.gateway.conftest import MODEL, World, accepted, within

USER: Any = [{"role": "user", "content": "Hi"}]


async def test_full_queue_is_429(world: World) -> None:
    worker = await world.worker("Hello", automatic=False)
    client = await world.serving(worker, window_requests=1, queue_requests_max=2)
    answers = []
    for _ in range(3):
        answers.append(asyncio.create_task(client.chat.completions.create(model=MODEL, messages=USER)))
        if len(answers) == 1:
            first = await worker.submit()
    await world.metric_reaches("requests_waiting", 3)
    with pytest.raises(openai.RateLimitError) as caught:
        await client.chat.completions.create(model=MODEL, messages=USER)
    assert caught.value.response.headers["Retry-After"] == "1"
    worker.automatic = True
    worker.play(first)
    for answer in answers:
        await within(answer)


async def test_deadline_while_waiting_is_503(world: World) -> None:
    worker = await world.worker("Hello", automatic=False)
    await world.operator.publish((worker, "LOADING"))
    client = world.client(await world.gateway(request_deadline_s=0.3))
    await world.until(world.gateways[0], lambda d: d.available(MODEL).coming == 1)
    with pytest.raises(openai.APIStatusError, match="deadline passed") as caught:
        await client.chat.completions.create(model=MODEL, messages=USER)
    assert caught.value.status_code == 503
    assert int(caught.value.response.headers["Retry-After"]) > 0


async def test_nobody_serves_and_nobody_comes(world: World) -> None:
    await world.operator.publish(message="no device is free")
    client = world.client(await world.gateway(no_replica_wait_s=0.2))
    await world.until(world.gateways[0], lambda d: d.table is not None)
    with pytest.raises(openai.APIStatusError, match="no device is free") as caught:
        await client.chat.completions.create(model=MODEL, messages=USER)
    assert caught.value.status_code == 503


async def test_queued_requests_are_refused_when_the_last_replica_leaves(world: World) -> None:
    worker = await world.worker("Hello", automatic=False)
    client = await world.serving(worker, window_requests=1, no_replica_wait_s=0.2)
    answers = [
        asyncio.create_task(client.chat.completions.create(model=MODEL, messages=USER)) for _ in range(2)
    ]
    request = await worker.submit()
    worker.send(accepted(request))
    await world.operator.publish(message="scaled to zero")
    done, waiting = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED, timeout=5)
    with pytest.raises(openai.APIStatusError, match="scaled to zero"):
        await done.pop()
    worker.play(request)  # its stream stays until its request is done
    assert (await within(waiting.pop())).choices[0].message.content == "Hello"


async def test_requests_wait_for_a_replica_from_zero(world: World) -> None:
    await world.operator.publish(message="scaled to zero")
    client = world.client(await world.gateway())
    await world.until(world.gateways[0], lambda d: d.table is not None)
    answer = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=USER))
    await world.metric_reaches("requests_waiting", 1)  # this is what makes the operator scale
    worker = await world.worker("Hello", automatic=False)
    await world.operator.publish((worker, "LOADING"))
    await within(worker.connected.wait())
    await world.metric_reaches("prompt_tokens_waiting", 1)  # the tokenizer is there: tokens are known
    assert worker.submits.empty()
    await world.operator.publish((worker, "SERVING"))
    worker.play(await worker.submit())
    assert (await within(answer)).choices[0].message.content == "Hello"


async def test_tokenizer_comes_from_whoever_has_it(world: World) -> None:
    without = await world.worker("Hello")
    without.files = {}
    holder = await world.worker("Hello")
    await world.operator.publish((without, "SERVING"), (holder, "LOADING"))
    client = world.client(await world.gateway())
    await within(holder.connected.wait())
    assert (await client.chat.completions.create(model=MODEL, messages=USER)).choices[
        0
    ].finish_reason == "stop"


async def test_unusable_tokenizer_is_said_clearly(world: World) -> None:
    worker = await world.worker("Hello")
    worker.files = {**world.files, "tokenizer.json": b"{}"}
    client = await world.serving(worker)
    with pytest.raises(openai.InternalServerError, match=r"tokenizer\.json cannot be read"):
        await client.chat.completions.create(model=MODEL, messages=USER)


async def test_live_targets_widen_the_window(world: World) -> None:
    source, target = [await world.worker("Hello", automatic=False) for _ in range(2)]
    client = await world.serving(source, window_requests=1)
    answers = [
        asyncio.create_task(client.chat.completions.create(model=MODEL, messages=USER)) for _ in range(3)
    ]
    given = [await source.submit()]
    await world.operator.publish((source, "SERVING"), (target, "LIVE"))
    given.append(await source.submit())
    await world.metric_reaches("requests_waiting", 3)
    assert source.submits.empty() and target.submits.empty()
    source.automatic = True
    for request in given:
        source.play(request)
    for answer in answers:
        await within(answer)


async def test_gateway_serves_without_the_operator(world: World) -> None:
    worker = await world.worker("Hello")
    client = await world.serving(worker)
    port = int(world.operator.address.rpartition(":")[2])
    await world.operator.die()
    assert (await client.chat.completions.create(model=MODEL, messages=USER)).choices[
        0
    ].finish_reason == "stop"
    second = await world.worker("world")
    await world.operator.publish((second, "SERVING"))
    await world.operator.start(port=port)
    await within(second.connected.wait())


async def test_client_leaves_while_it_waits_for_the_tokenizer(world: World) -> None:
    worker = await world.worker()
    worker.files = {}
    client = await world.serving(worker)
    answer = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=USER, n=3))
    await world.metric_reaches("requests_waiting", 3)
    answer.cancel()
    await asyncio.gather(answer, return_exceptions=True)
    async with asyncio.timeout(5):
        while await world.metric("requests_in_flight"):
            await asyncio.sleep(0)


async def test_shutdown_answers_those_who_wait_for_the_tokenizer(world: World) -> None:
    worker = await world.worker()
    worker.files = {}
    client = await world.serving(worker, drain_grace_s=0.0)
    answer = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=USER))
    await world.metric_reaches("requests_waiting", 1)
    await world.gateways.pop().stop()
    with pytest.raises(openai.InternalServerError, match="shutting down"):
        await within(answer)
