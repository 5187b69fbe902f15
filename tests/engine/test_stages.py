"""Layers of one request on several engines: the same tokens for every cut, and when one of them goes on alone."""

from __future__ import annotations

import itertools
import random
from types import ModuleType
from typing import Any

import pytest
import torch

from layercast_agent.engine.stages import UnknownSessionError
from layercast_agent.errors import NoCapacityError, PeerError

TOKENS = 6


def cut(layers: int, chance: random.Random) -> list[tuple[int, int, int]]:
    """Random stages: (engine, first layer, one after the last); an engine may have several."""
    bounds = sorted({0, layers, *(chance.randint(0, layers) for _ in range(2))})
    return [(chance.randrange(3), a, b) for a, b in itertools.pairwise(bounds)]


def through(engines: list[Any], stages: list[tuple[int, int, int]], seq: Any, start: int) -> torch.Tensor:
    """Hidden states of the last known position after all layers; the first engine leads."""
    hidden = engines[0].embedding(seq, start)
    longest = len(seq.prompt) + seq.sampling.max_tokens
    for place, first, last in stages:
        hidden = engines[place].stages.run(
            "s", hidden, first=first, last=last, start=start, positions_max=longest
        )
    result: torch.Tensor = hidden[-1:]
    return result


def gathered(engines: list[Any], stages: list[tuple[int, int, int]], positions: int) -> torch.Tensor:
    """KV of all layers, from where it lies."""
    return torch.cat(
        [
            engines[place].stages.read("s", first=first, last=last, positions=positions)
            for place, first, last in stages
        ]
    )


@pytest.mark.parametrize("seed", range(4))
def test_tokens_do_not_depend_on_the_cut(tiny: Any, families: ModuleType, seed: int) -> None:
    chance = random.Random(seed)
    engines = [tiny.engine() for _ in range(3)]
    stages = cut(engines[0].model.shape.layers, chance)
    prompt = families.prompts([7])[0]
    seq = families.sequence(prompt, TOKENS)
    start, tokens = 0, []
    for _ in range(TOKENS):
        hidden = through(engines, stages, seq, start)
        start = seq.prefix_length
        tokens.append(engines[0].choose(seq, hidden).token_id)
    assert tokens == tiny.expected(prompt, TOKENS)
    for engine in engines:
        engine.stages.end("s")
        assert engine.load().kv_pages_used == 0


@pytest.mark.parametrize("after", range(1, TOKENS))
def test_the_leader_goes_on_alone_after_any_token(tiny: Any, families: ModuleType, after: int) -> None:
    """With the KV of the stages, at each possible moment."""
    engines = [tiny.engine() for _ in range(3)]
    stages = cut(engines[0].model.shape.layers, random.Random(after))
    prompt = families.prompts([7])[0]
    seq = families.sequence(prompt, TOKENS)
    start, tokens = 0, []
    for _ in range(after):
        hidden = through(engines, stages, seq, start)
        start = seq.prefix_length
        tokens.append(engines[0].choose(seq, hidden).token_id)
    state = gathered(engines, stages, start)
    engines[0].stages.end("s")
    engines[0].adopt(seq, state, start)
    tokens += families.tokens(families.run(engines[0]))
    assert tokens == tiny.expected(prompt, TOKENS)
    assert engines[0].load().kv_pages_used == 0


def test_what_is_not_here_is_refused(llama: Any, families: ModuleType) -> None:
    """A session that begins in the middle, KV that was never computed, too much for the pages."""
    engine = llama.engine()
    seq = families.sequence(families.prompts([7])[0], TOKENS)
    hidden = engine.embedding(seq, 0)
    with pytest.raises(UnknownSessionError):
        engine.stages.run("s", hidden, first=0, last=1, start=3, positions_max=20)
    with pytest.raises(NoCapacityError):
        engine.stages.run("s", hidden, first=0, last=1, start=0, positions_max=1 << 20)
    engine.stages.run("s", hidden, first=0, last=1, start=0, positions_max=20)
    with pytest.raises(UnknownSessionError):
        engine.stages.read("s", first=0, last=2, positions=7)
    with pytest.raises(UnknownSessionError):
        engine.stages.read("s", first=0, last=1, positions=8)
    with pytest.raises(PeerError):
        engine.adopt(seq, torch.zeros(5, dtype=torch.uint8), 3)
    engine.stages.end("s")
    engine.stages.end("never there")
    assert engine.load().kv_pages_used == 0
