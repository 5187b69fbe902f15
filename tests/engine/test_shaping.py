"""Biases, penalties and minimum lengths: what they do to logits, and that they depend on tokens alone."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
)

from layercast_agent.engine.sampler import Draw, sample
from layercast_agent.engine.sequence import SamplingParams
from layercast_agent.engine.shaping import shape_logits

LOGITS = np.array([1.0, -1.0, 2.0, 0.5, -3.0, 0.0])


def shaped(prompt: tuple[int, ...] = (), generated: tuple[int, ...] = (), **sampling: Any) -> list[float]:
    params = SamplingParams(max_tokens=9, **sampling)
    found = shape_logits(LOGITS, params, prompt=prompt, generated=generated, allowed=None)
    return [float(value) for value in found]


def test_penalties_of_the_output() -> None:
    assert shaped((0, 1), (2, 2, 3), presence_penalty=1.0) == [1.0, -1.0, 1.0, -0.5, -3.0, 0.0]
    assert shaped((0, 1), (2, 2, 3), frequency_penalty=0.5) == [1.0, -1.0, 1.0, 0.0, -3.0, 0.0]
    assert shaped((0, 1), (), presence_penalty=1.0, frequency_penalty=1.0) == list(LOGITS)


def test_repetition_is_transformers() -> None:
    ids = torch.tensor([[0, 4, 2, 2]])
    processor = RepetitionPenaltyLogitsProcessor(penalty=1.7)
    wanted = processor(ids, torch.tensor(LOGITS[None]))[0].tolist()
    assert shaped((0, 4), (2, 2), repetition_penalty=1.7) == pytest.approx(wanted)


def test_bias_and_minimum_length() -> None:
    biased = shaped((), (), logit_bias=((5, 9.0), (0, -100.0)))
    assert biased == [-99.0, -1.0, 2.0, 0.5, -3.0, 9.0]
    short = shaped((), (1,), min_tokens=2, stop_token_ids=frozenset({2, 900}))
    assert short[2] == -np.inf and short[0] == 1.0
    assert shaped((), (1, 1), min_tokens=2, stop_token_ids=frozenset({2})) == list(LOGITS)


def test_a_guide_that_wants_the_end_gets_it() -> None:
    params = SamplingParams(max_tokens=9, min_tokens=5, stop_token_ids=frozenset({2}))
    allowed = np.arange(6) == 2
    found = shape_logits(LOGITS, params, prompt=(), generated=(), allowed=allowed)
    assert np.flatnonzero(np.isfinite(found)).tolist() == [2]


def test_min_p_keeps_what_transformers_keeps() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(3)) * 2
    kept = MinPLogitsWarper(min_p=0.2)(torch.zeros(1, 1, dtype=torch.long), logits.clone())[0]
    wanted = set(torch.isfinite(kept).nonzero().flatten().tolist())
    params = SamplingParams(max_tokens=9999, temperature=1.0, min_p=0.2, seed=5)
    draws = [Draw(sampling=params, position=position) for position in range(400)]
    chosen = {choice.token_id for choice in sample(logits.expand(400, -1), draws)}
    assert chosen == wanted


def test_greedy_with_penalties_is_transformers(llama: Any, families: ModuleType) -> None:
    prompt = families.prompts([12])[0]
    tokens = torch.tensor([prompt])
    judged = llama.judge.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=10,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty=1.5)]),
    )[0, 12:].tolist()
    seq = families.sequence(prompt, 10, repetition_penalty=1.5)
    assert families.answer(llama.engine(step_tokens_max=5), seq) == judged
    assert judged != llama.expected(prompt, 10)


EVERYTHING: dict[str, Any] = {
    "temperature": 0.9,
    "seed": 11,
    "top_p": 0.95,
    "top_k": 40,
    "min_p": 0.01,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "logit_bias": ((7, 1.5), (9, -2.0)),
    "min_tokens": 4,
    "stop_token_ids": frozenset({3, 5}),
}


def test_everything_survives_replays_and_preemption(llama: Any, families: ModuleType) -> None:
    """Penalties look at the tokens so far, wherever these were computed."""
    prompt, company = families.prompts([14, 21])
    whole = families.answer(llama.engine(), families.sequence(prompt, 10, **EVERYTHING))
    assert whole != families.answer(llama.engine(), families.sequence(prompt, 10, temperature=0.9, seed=11))
    for have in range(len(whole)):
        seq = families.sequence(prompt, 10, generated=whole[:have], **EVERYTHING)
        assert families.answer(llama.engine(step_tokens_max=6), seq) == whole[have:]
    engine = llama.engine(pages=9)
    engine.add(families.sequence(company, 9, name="company", arrived_at=-1))
    engine.add(families.sequence(prompt, 10, **EVERYTHING))
    assert families.tokens(families.run(engine)) == whole


def test_nothing_ends_before_the_minimum(llama: Any, families: ModuleType) -> None:
    prompt = families.prompts([9])[0]
    stops = frozenset(llama.expected(prompt, 4))
    early = families.answer(llama.engine(), families.sequence(prompt, 9, stop_token_ids=stops))
    late = families.answer(llama.engine(), families.sequence(prompt, 9, stop_token_ids=stops, min_tokens=6))
    assert len(early) == 1 and len(late) >= 6
    assert not stops & set(late[:5])
