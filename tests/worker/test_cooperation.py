"""A source in the middle of a step goes on sharing: what it takes waits for the step's end, and nobody else does."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest
from tests.worker.conftest import Packed
from tests.worker.inprocess import Gateway, Worker

from layercast_agent.worker.cooperation import Cooperation

pytestmark = [pytest.mark.timeout(120)]

PROMPTS = [[random.Random(i).randrange(3, 500) for _ in range(20)] for i in range(5)]
TOKENS = 6
LOAD_S = 60.0
"""So slow that the target stays partial for the whole test."""


async def test_a_step_keeps_neither_offers_nor_takes_waiting(packed: Packed) -> None:
    files, manifest = packed.files, packed.manifest
    source, target = Worker("source"), Worker("target", disk_bytes_per_s=int(manifest.nbytes / LOAD_S))
    gateway = Gateway()
    try:
        for worker in (source, target):
            await worker.start(manifest, files)
            await gateway.connect(worker.peer.address)
        source.feed(source.from_disk(packed.folder))
        await source.until(lambda replica: replica.loop.complete)
        target.feed(target.from_disk(packed.folder), live_source=source.peer)
        cooperation: Cooperation = source.replica.cooperation
        await source.until(lambda replica: cooperation.active)

        step_ends = threading.Event()
        source.replica.loop.execute(lambda engine: step_ends.wait(60))
        gateway.routes = [source.peer.address]
        for index, prompt in enumerate(PROMPTS[:-1]):
            gateway.ask(f"r{index}", prompt, TOKENS)
        running = asyncio.create_task(gateway.run())
        owned = source.replica.desk.owned
        await source.until(lambda replica: cooperation.given == len(owned) == len(PROMPTS) - 1)
        assert cooperation.taken == 0, "they are here, and the engine has not taken them over yet"

        gateway.ask("late", PROMPTS[-1], TOKENS)
        await source.until(lambda replica: cooperation.given == len(PROMPTS))
        assert not step_ends.is_set()
        step_ends.set()
        await running
        assert cooperation.taken == len(PROMPTS)
    finally:
        await gateway.close()
        for worker in (source, target):
            await worker.kill()
    assert all(asked.ends == 1 and not asked.error for asked in gateway.asked.values())
    assert all(len(asked.state.tokens) == TOKENS for asked in gateway.asked.values())
    assert {address for asked in gateway.asked.values() for address in asked.served_by} == {
        source.peer.address
    }
