"""20,000 random steps of the scheduler with arrivals, cancellations, quanta, handoffs and preemptions.

What the pages would hold is written down for every slot, so a page that leaks, is shared wrongly or is reused too
early is found where it happens, and the tokens of each request are those that it would have got alone.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from typing import Any

from layercast_agent.engine.pages import PageAllocator
from layercast_agent.engine.scheduler import EngineLimits, Scheduler, Work
from layercast_agent.engine.sequence import SamplingParams, Sequence

STEPS = int(os.environ.get("LAYERCAST_SCHEDULER_STEPS", "20000"))
LAYERS, PAGE, PAGES, CONTEXT = 3, 4, 20, 64
STARVED_AFTER = 3000
"""Steps that no request may take: some forty others of full length before it, one token a step."""

START = 17


def digest(before: int, token: int) -> int:
    """What a layer's KV at one position depends on: all tokens up to there. `before` is that of the last position."""
    return hash((before, token))


def next_token(last: int) -> int:
    """The model: a token that depends on every token before it. Few values, so that prefixes repeat."""
    return last % 3


@dataclass(slots=True)
class World:
    """A scheduler, an engine's memory as plain values, and random traffic."""

    chance: random.Random
    subject: Scheduler
    kv: list[list[int]] = field(default_factory=lambda: [[0] * (PAGES * PAGE) for _ in range(LAYERS)])
    digests: dict[str, list[int]] = field(default_factory=dict)
    added_in: dict[str, int] = field(default_factory=dict)
    finished: int = 0
    cancelled: int = 0
    shared_most: int = 0

    def arrive(self, step: int) -> None:
        if len(self.subject.waiting) >= self.subject.limits.waiting_max:
            return
        beginning = [0, 1, 2, 0, 1, 2, 2, 1, 0, 0, 1, 1][: self.chance.choice((0, 4, 8, 12))]
        ending = [self.chance.randrange(3) for _ in range(self.chance.randrange(1, 30))]
        prompt = tuple(beginning + ending)
        output = self.chance.randrange(1, 20)
        generated: list[int] = []
        name = f"{step}-{self.chance.random()}"
        digests = self.digests[name] = []
        for token in prompt:
            digests.append(digest(digests[-1] if digests else START, token))
        for _ in range(self.chance.choice((0, 0, 0, output - 1))):  # a replay
            generated.append(next_token(digests[-1]))
            digests.append(digest(digests[-1], generated[-1]))
        seq = Sequence(
            request_id=name,
            attempt=1,
            gateway_id="g",
            prompt=prompt,
            generated=generated,
            sampling=SamplingParams(max_tokens=output),
            arrived_at=step - self.chance.choice((0, 0, 40)),  # a handoff comes late
        )
        self.subject.add(seq)
        self.added_in[seq.request_id] = step

    def quantum(self) -> None:
        """One layer of one waiting request, as a live target runs it."""
        able = [
            s
            for s in self.subject.waiting
            if s.layers_done < LAYERS and (s.pages or self.subject.has_room(s))
        ]
        if not able:
            return
        seq = self.chance.choice(able)
        self.subject.reserve(seq)
        hidden: Any = "hidden states"
        seq.hidden = hidden
        self.write(seq, 0, seq.prefix_length, seq.layers_done)
        seq.layers_done += 1

    def cancel(self) -> None:
        everyone = (*self.subject.running, *self.subject.waiting)
        if everyone:
            self.cancelled += 1
            self.subject.remove(self.chance.choice(everyone))

    def slots(self, seq: Sequence, start: int, stop: int) -> list[int]:
        return [seq.pages[position // PAGE] * PAGE + position % PAGE for position in range(start, stop)]

    def write(self, seq: Sequence, start: int, stop: int, layer: int) -> None:
        for slot, value in zip(
            self.slots(seq, start, stop), self.digests[seq.request_id][start:stop], strict=True
        ):
            self.kv[layer][slot] = value

    def step(self) -> None:
        works = self.subject.plan()
        assert sum(work.count for work in works) <= self.subject.limits.step_tokens_max
        for work in works:
            for layer in range(work.first_layer, LAYERS):
                self.write(work.seq, work.start, work.stop, layer)
        for work in works:
            self.read(work)
            self.subject.advance(work)
        for work in works:
            if work.seq.computed == work.seq.prefix_length:
                self.accept(work.seq)

    def read(self, work: Work) -> None:
        """Attention of the chunk's last token reads every position before it, in every layer."""
        wanted = self.digests[work.seq.request_id][: work.stop]
        slots = self.slots(work.seq, 0, work.stop)
        for layer in self.kv:
            assert [layer[slot] for slot in slots] == wanted, "a request reads what is not its own"

    def accept(self, seq: Sequence) -> None:
        digests = self.digests[seq.request_id]
        seq.generated.append(next_token(digests[-1]))
        digests.append(digest(digests[-1], seq.generated[-1]))
        if seq.finish(CONTEXT) is not None:
            self.finished += 1
            self.subject.remove(seq)
            assert seq.generated == alone(seq), "a token changed"

    def check(self, step: int) -> None:
        everyone = (*self.subject.running, *self.subject.waiting)
        pages = self.subject.pages
        held = {page for seq in everyone for page in seq.pages}
        assert len(held) == pages.used, "a page leaked"
        assert pages.cached <= pages.total
        owners: dict[int, list[bool]] = {}
        for seq in everyone:
            assert len(seq.pages) == len(set(seq.pages))
            for index, page in enumerate(seq.pages):
                owners.setdefault(page, []).append((index + 1) * PAGE <= seq.computed)
        assert all(len(full) == 1 or all(full) for full in owners.values()), (
            "a page is shared before it is full"
        )
        self.shared_most = max((self.shared_most, *map(len, owners.values())))
        for seq in everyone:
            assert step - self.added_in[seq.request_id] < STARVED_AFTER, "a request starves"


def alone(seq: Sequence) -> list[int]:
    """The tokens that the request would have got by itself."""
    last = START
    for token in seq.prompt:
        last = digest(last, token)
    tokens: list[int] = []
    while len(tokens) < len(seq.generated):
        tokens.append(next_token(last))
        last = digest(last, tokens[-1])
    return tokens


def test_random_steps() -> None:
    limits = EngineLimits(batch_size_max=6, step_tokens_max=24, waiting_max=12, context_length_max=CONTEXT)
    subject = Scheduler(pages=PageAllocator(PAGES), page_size=PAGE, layers=LAYERS, limits=limits)
    world = World(chance=random.Random(7), subject=subject)
    for step in range(STEPS):
        if world.chance.random() < 0.35:
            world.arrive(step)
        if world.chance.random() < 0.05:
            world.quantum()
        if world.chance.random() < 0.03:
            world.cancel()
        world.step()
        world.check(step)
    while subject.waiting or subject.running:
        step += 1
        world.step()
        world.check(step)
    assert subject.pages.used == 0
    counts = subject.counts
    assert world.finished > STEPS / 20 and world.cancelled > STEPS / 100
    assert counts.preemptions > STEPS / 100 and counts.prefix_tokens_hit > STEPS / 10
    assert world.shared_most >= 3
    print(f"{STEPS} steps: {world.finished} finished, {world.cancelled} cancelled, {counts}")
