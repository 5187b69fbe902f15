"""Who stops listening: a client that leaves while its worker is far ahead, and a worker that reads no commands."""

from __future__ import annotations

import logging

import pytest
from tests.gateway.conftest import MODEL, World, tokens
from tests.gateway.test_faults import EIGHT_STEPS, REPLY, USER, Reading

from layercast_gateway import upstream


async def test_tokens_under_way_are_answered_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    worker = await world.worker(reply=REPLY, automatic=False)
    client = await world.serving(worker)
    reading = Reading(client)
    request = await worker.submit()
    worker.play(request, 8)
    await reading.has(EIGHT_STEPS)
    await reading.leave()
    assert (await worker.cancel()).request_id == request.request_id
    worker.send(*(tokens(request, position, [5]) for position in range(8, 400)))
    assert (await worker.cancel()).request_id == request.request_id
    other = Reading(client)
    worker.play(await worker.submit())
    assert await other.end() == REPLY  # whatever was sent before it has been read
    assert worker.cancels.empty()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_worker_that_reads_no_commands_is_connected_anew(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await world.worker()
    monkeypatch.setattr(upstream, "COMMANDS_MAX", 4)
    client = await world.serving(worker, window_requests=16)
    await world.until(world.gateways[0], lambda dispatcher: dispatcher.available(MODEL).serving == 1)
    monkeypatch.undo()  # the next stream has room for all
    answer = await client.chat.completions.create(model=MODEL, messages=USER, n=8, timeout=30)
    assert [choice.message.content for choice in answer.choices] == ["Hello world!"] * 8
    assert len(worker.hellos) == 2
