"""What is foreseen of a step is what the scheduler then does."""

from __future__ import annotations

import random

import pytest
import torch

from layercast_agent.engine.pages import PageAllocator
from layercast_agent.engine.scheduler import EngineLimits, Scheduler, Work
from layercast_agent.engine.sequence import SamplingParams, Sequence
from layercast_agent.worker.lookahead import look_ahead

LAYERS = 6
LIMITS = EngineLimits(
    batch_size_max=6, step_tokens_max=32, waiting_max=64, context_length_max=256, prefix_caching=False
)


def request(chance: random.Random, number: int) -> Sequence:
    """A new one, or one that comes with some of its layers done."""
    seq = Sequence(
        request_id=f"r{number:04d}",
        attempt=1,
        gateway_id="g",
        prompt=(1,) * chance.choice([2, 5, 11, 40, 90]),
        generated=[],
        sampling=SamplingParams(max_tokens=chance.randint(1, 12)),
        arrived_at=float(number),
    )
    if chance.random() < 0.5:
        seq.layers_done = chance.randint(0, LAYERS)
        seq.hidden = torch.zeros(len(seq.prompt), 1)
    return seq


def compute(scheduler: Scheduler, works: list[Work]) -> None:
    """A step, and the end of those who have their tokens."""
    for work in works:
        scheduler.advance(work)
        if work.completes_prefix:
            work.seq.generated.append(1)
            if len(work.seq.generated) == work.seq.sampling.max_tokens:
                scheduler.remove(work.seq)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_foreseen_is_what_the_scheduler_does(seed: int) -> None:
    chance = random.Random(seed)
    scheduler = Scheduler(pages=PageAllocator(512), page_size=4, layers=LAYERS, limits=LIMITS)
    full = 0
    for step in range(200):
        for number in range(chance.choice([0, 0, 0, 1, 2])):
            seq = request(chance, 10 * step + number)
            if seq.layers_done:
                scheduler.add(seq)
                scheduler.reserve(seq)
            elif len(scheduler.waiting) < LIMITS.waiting_max:
                scheduler.add(seq)
        foreseen = look_ahead(scheduler.running, scheduler.waiting, limits=LIMITS, layers=LAYERS)
        prefilling = {seq.request_id for seq in (*scheduler.running, *scheduler.waiting) if seq.prefilling}
        works = scheduler.plan()
        assert foreseen.prompt_tokens == pytest.approx(
            sum(
                work.count * (1 - work.first_layer / LAYERS)
                for work in works
                if work.seq.request_id in prefilling
            )
        )
        compute(scheduler, works)
        left = (*scheduler.running, *scheduler.waiting)
        left_over = sum(1 if seq.layers_done == LAYERS else seq.remaining for seq in left if seq.prefilling)
        decodes = sum(not seq.prefilling for seq in scheduler.running)
        assert foreseen.room <= max(0, LIMITS.step_tokens_max - decodes - left_over)
        full += foreseen.room < 1
    assert 0 < full < 200, "both a full and an open next step were seen"
