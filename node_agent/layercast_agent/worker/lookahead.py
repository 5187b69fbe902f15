"""What the next step of an engine will compute and what the one after it has room for: foreseen, not decided. Pure.

The scheduler decides when a step begins. Whoever shares a source's queue must know before that how much to bring, and
how long the step will take. The same rules in the same order, as far as pages do not run out and nothing is found in
the prefix cache: `engine.scheduler`.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from itertools import chain

from layercast_agent.engine.scheduler import EngineLimits
from layercast_agent.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookahead:
    """Of the next step, and of the one after it.

    `prompt_tokens`: what the next step computes; a token through some of the layers counts in proportion. `room`: how
    many more prompt tokens the one after it can compute beside its decodes and what the next one leaves over; below 1,
    none.
    """

    prompt_tokens: float
    room: int


def look_ahead(
    running: Ordered[Sequence], waiting: Ordered[Sequence], *, limits: EngineLimits, layers: int
) -> Lookahead:
    """From the queues of an engine between two steps, each by arrival."""
    budget = limits.step_tokens_max - sum(not seq.prefilling for seq in running)
    work, left_over = 0.0, 0
    for place, seq in enumerate(chain(running, waiting)):
        if left_over >= limits.step_tokens_max:
            break  # a long queue: no room, however much longer it is
        if seq.prefilling:
            wanted = 1 if seq.layers_done == layers else seq.remaining
            tokens = min(wanted, max(0, budget)) if place < limits.running_max else 0
            budget -= tokens
            left_over += wanted - tokens
            work += tokens * (1 - seq.layers_done / layers)
    decodes = min(len(running) + len(waiting), limits.running_max)
    return Lookahead(prompt_tokens=work, room=limits.step_tokens_max - decodes - left_over)
