"""A client that leaves while its worker is far ahead."""

from __future__ import annotations

import logging

import pytest
from tests.gateway.conftest import World, tokens
from tests.gateway.test_faults import EIGHT_STEPS, REPLY, Reading


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
