"""Gateways hear how much KV memory a worker's replica uses, also when nothing happens to their own requests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import grpc
import pytest
from layercast.engine.v1alpha1 import engine_pb2, engine_pb2_grpc
from tests.worker.conftest import Packed
from tests.worker.inprocess import Gateway, Worker

pytestmark = [pytest.mark.timeout(120)]


async def until_used(messages: AsyncIterator[engine_pb2.GenerateResponse], *, some: bool) -> int:
    """Until a message tells that pages are used, or that none is; how many there are in all."""
    async with asyncio.timeout(20):
        async for message in messages:
            assert not message.events, "this gateway has no requests"
            if message.kv.total and (message.kv.used > 0) == some:
                return message.kv.total
    raise AssertionError("the stream ended")


async def test_a_gateway_without_requests_hears_of_kv_too(packed: Packed) -> None:
    worker, busy = Worker("a"), Gateway()
    channel = grpc.aio.insecure_channel(worker.host.address)
    try:
        await worker.start(packed.manifest, packed.files)
        worker.feed(worker.from_disk(packed.folder))
        await worker.until(lambda replica: replica.loop.complete)
        idle = engine_pb2_grpc.EngineServiceStub(channel).Generate()
        await idle.write(engine_pb2.GenerateRequest(hello=engine_pb2.Hello(gateway_id="idle")))
        messages = aiter(idle)
        total = await until_used(messages, some=False)
        assert total == worker.replica.loop.view.load.kv_pages_total

        await busy.connect(worker.peer.address)
        busy.routes = [worker.peer.address]
        busy.ask("long", [7] * 40, 60)
        running = asyncio.create_task(busy.run())
        await busy.until_events(3)
        # Held in the middle: the whole request takes less than a second, and nobody would hear of its pages.
        go_on = threading.Event()
        worker.replica.loop.execute(lambda engine: go_on.wait(30))
        await until_used(messages, some=True)
        go_on.set()
        await running
        await until_used(messages, some=False)
    finally:
        await busy.close()
        await channel.close()
        await worker.kill()
