"""Hundreds of runs in which something dies at any step of a scale-up, a mode switch, a migration or a KV handoff.

Each run is made by its seed: what happens, to which requests, who or what is lost, and after how many events of the
gateway. After each run the invariants of the design (section 8) that a worker can break are looked at: every request
ended once with the tokens of a replica left alone, and who survived holds no request and no page.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from layercast.agent.v1alpha1 import agent_pb2
from tests.worker.inprocess import Gateway, Worker

from layercast_agent.layout import Manifest
from layercast_agent.store import Store
from layercast_agent.worker import stage_host

pytestmark = [pytest.mark.timeout(600)]

RUNS = 260
SHARDS = 4
TOGETHER = 4
TOKENS = 14
LOAD_S = 0.4
STORIES = ("scale-up", "mode switch", "migration", "kv handoff", "disaggregated")
PROMPTS = [[random.Random(i).randrange(3, 500) for _ in range(4 + 9 * (i % 5))] for i in range(10)]
SERVING = agent_pb2.REPLICA_STATE_SERVING


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A tiny checkpoint, and what one replica answers to each prompt."""

    folder: Path
    manifest: Manifest
    files: dict[str, bytes]
    answers: list[list[int]]


@pytest.fixture(scope="session")
def small(tinymodels: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Model:
    root = tmp_path_factory.mktemp("small")
    source = tinymodels.make(root / "hf", "llama", layers=6, hidden=64)
    store = Store(root / "store")
    manifest = store.prepare(
        key="small", source=f"file://{source}", revision="", dtype="float32", progress=lambda progress: None
    )
    model = Model(
        folder=store.folder(manifest.digest),
        manifest=manifest,
        files=dict(store.files(manifest.digest)),
        answers=[],
    )
    model.answers.extend(asyncio.run(_answers(model)))
    return model


async def _answers(model: Model) -> list[list[int]]:
    """Of a replica that is left alone."""
    worker, gateway = Worker("alone"), Gateway()
    await worker.start(model.manifest, model.files)
    worker.feed(worker.from_disk(model.folder))
    await worker.until(lambda replica: replica.state == SERVING)
    await gateway.connect(worker.peer.address)
    gateway.routes = [worker.peer.address]
    for index, prompt in enumerate(PROMPTS):
        gateway.ask(f"r{index}", prompt, TOKENS)
    await gateway.run()
    await gateway.close()
    await worker.kill()
    return [gateway.asked[f"r{index}"].state.tokens for index in range(len(PROMPTS))]


class Run:
    """One seed."""

    def __init__(self, model: Model, seed: int) -> None:
        self.model = model
        self.chance = random.Random(seed)
        self.story = STORIES[seed % len(STORIES)]
        self.gateway = Gateway()
        self.wanted: dict[str, list[int]] = {}

    async def play(self) -> None:
        rate = int(self.model.manifest.nbytes / LOAD_S)
        slow = self.story == "mode switch"
        names = ("a", "b", "spare")
        workers = [
            Worker(
                name,
                egress_bytes_per_s=rate if self.story == "scale-up" and name == "a" else 0,
                disk_bytes_per_s=rate if slow and name != "spare" else 0,
            )
            for name in names
        ]
        try:
            for worker in workers:
                await worker.start(self.model.manifest, self.model.files)
                await self.gateway.connect(worker.peer.address)
            await self._tell(*workers)
        finally:
            await self.gateway.close()
            for worker in workers:
                await worker.kill()

    async def _tell(self, a: Worker, b: Worker, spare: Worker) -> None:
        disk = self.model.folder
        spare.feed(spare.from_disk(disk))
        await spare.until(lambda replica: replica.state == SERVING)
        segments = len(self.model.manifest.segments)
        if self.story == "mode switch":
            part = self.chance.randint(1, segments - 2)
            first = [0, segments - 1, *range(1, part)]
            b.feed(b.from_disk(disk), order=[*range(part, segments - 1), 0, segments - 1, *range(1, part)])
            a.feed(a.from_disk(disk), order=[*first, *range(part, segments - 1)], lead=[b.peer])
        else:
            a.feed(a.from_disk(disk))
            await a.until(lambda replica: replica.state == SERVING)
        if self.story == "scale-up":
            layers_first = [*range(1, segments - 1), 0, segments - 1]
            b.feed([a.as_upstream(), *b.from_disk(disk)], order=layers_first, live_source=a.peer)
        elif self.story != "mode switch":
            b.feed(b.from_disk(disk))
            await b.until(lambda replica: replica.state == SERVING)
        self.gateway.routes = [a.peer.address, spare.peer.address]
        if self.story == "disaggregated":
            self.gateway.decode_at = b.peer
        for index in self.chance.sample(range(len(PROMPTS)), self.chance.randint(2, 5)):
            self.wanted[f"r{index}"] = self.model.answers[index]
            self.gateway.ask(f"r{index}", PROMPTS[index], TOKENS)
        serving = asyncio.create_task(self.gateway.run())
        others = [asyncio.create_task(self._meanwhile(a, b)), asyncio.create_task(self._fault(a, b))]
        try:
            async with asyncio.timeout(45):
                await serving
        finally:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        await self._judge(a, b, spare)

    async def _meanwhile(self, a: Worker, b: Worker) -> None:
        """What the story is about, where it does not begin by itself."""
        if self.story == "migration":
            await self._events(self.chance.randint(1, 30))
            await a.replica.begin_drain(grace_s=5.0, destinations=[b.peer])
        moves: dict[str, asyncio.Task[bool]] = {}
        while self.story == "kv handoff" and a.alive:
            for name, seq in a.replica.desk.owned.items():
                if name not in moves:
                    moves[name] = asyncio.create_task(a.replica.mover.move(seq, b.peer))
            await asyncio.sleep(0.001)

    async def _fault(self, a: Worker, b: Worker) -> None:
        await self._events(self.chance.randint(0, 40))
        await asyncio.sleep(self.chance.choice([0.0, 0.001, 0.01, 0.1, LOAD_S]))
        victim = self.chance.choice([a, b])
        await (victim.cut() if self.chance.random() < 0.3 else victim.kill())

    async def _events(self, count: int) -> None:
        while self.gateway.events < count:
            await asyncio.sleep(0.002)

    async def _judge(self, *workers: Worker) -> None:
        for name, tokens in self.wanted.items():
            asked = self.gateway.asked[name]
            assert asked.ends == 1 and not asked.error, f"{name} ended {asked.ends} times: {asked.error}"
            assert asked.state.tokens == tokens, f"{name} has other tokens"
        for worker in workers:
            if worker.alive:
                await worker.until(lambda replica: not replica.desk.owned)
                await worker.until(lambda replica: replica.loop.view.load.kv_pages_used == 0)


@pytest.mark.parametrize("shard", range(SHARDS))
async def test_whatever_is_lost_no_request_and_no_page_is(
    small: Model, shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_host, "IDLE_SESSION_S", 1.0)
    room = asyncio.Semaphore(TOGETHER)

    async def one(seed: int) -> None:
        async with room:
            try:
                await Run(small, seed).play()
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise

    async with asyncio.TaskGroup() as group:
        for seed in range(shard, RUNS, SHARDS):
            group.create_task(one(seed))
