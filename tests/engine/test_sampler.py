"""Sampling: the right distribution, and the same token wherever and whenever it is computed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layercast_agent.engine.sampler import Draw, sample
from layercast_agent.engine.sequence import SamplingParams

VOCABULARY = 50


def logits_of(seed: int, rows: int = 1, size: int = VOCABULARY) -> torch.Tensor:
    return 2 * torch.randn((rows, size), generator=torch.Generator().manual_seed(seed))


def draw(position: int = 0, **sampling: Any) -> Draw:
    return Draw(sampling=SamplingParams(max_tokens=1, **sampling), position=position)


def frequencies(logits: torch.Tensor, count: int, **sampling: Any) -> np.ndarray:
    draws = [draw(position, seed=7, **sampling) for position in range(count)]
    chosen = sample(logits.expand(count, -1), draws)
    counted = Counter(choice.token_id for choice in chosen)
    return np.array([counted[token] for token in range(logits.shape[-1])]) / count


def test_distribution() -> None:
    """Each frequency lies within five standard deviations of its probability."""
    logits, count, temperature = logits_of(0), 6000, 0.7
    expected = torch.softmax(logits[0].double() / temperature, dim=-1).numpy()
    found = frequencies(logits, count, temperature=temperature)
    assert np.all(np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / count) + 1e-3)


def test_top_k() -> None:
    logits = logits_of(1)
    best = set(logits[0].topk(4).indices.tolist())
    found = set(np.flatnonzero(frequencies(logits, 500, temperature=2.0, top_k=4)).tolist())
    assert found == best
    assert frequencies(logits, 20, temperature=5.0, top_k=1)[logits.argmax()] == 1


@pytest.mark.parametrize("size", [VOCABULARY, 5000])
def test_top_p(size: int) -> None:
    """Exactly the smallest set of best tokens whose probabilities sum up to top_p; small and large vocabularies."""
    logits, temperature, top_p = logits_of(2, size=size), 1.5, 0.4
    ordered = torch.softmax(logits[0].double() / temperature, dim=-1).sort(descending=True)
    needed = int((ordered.values.cumsum(0) < top_p).sum()) + 1
    nucleus = set(ordered.indices[:needed].tolist())
    found = set(np.flatnonzero(frequencies(logits, 800, temperature=temperature, top_p=top_p)).tolist())
    assert found <= nucleus
    assert len(found) > 0.6 * len(nucleus)


def test_flat_distributions_need_more_than_the_first_candidates() -> None:
    """The nucleus of 5,000 equal tokens is 4,500 of them, ties by id."""
    found = np.flatnonzero(frequencies(torch.zeros((1, 5000)), 3000, temperature=1.0, top_p=0.9))
    assert found.max() < 4500
    assert found.max() > 4000


def test_top_k_then_top_p() -> None:
    """top_p counts among the tokens that top_k kept: the first has 55 % of two and 31 % of four."""
    logits = torch.tensor([[1.2, 1.0, 0.9, 0.8]])
    assert frequencies(logits, 300, temperature=1.0, top_k=2, top_p=0.5)[0] == 1
    assert 0 < frequencies(logits, 300, temperature=1.0, top_p=0.5)[0] < 1


@given(
    rows=st.permutations(list(range(6))),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.1, 0.9, 1.0]),
    top_k=st.sampled_from([0, 3, VOCABULARY, 1000]),
)
def test_company_and_place_do_not_matter(
    rows: list[int], temperature: float, top_p: float, top_k: int
) -> None:
    logits = logits_of(3, rows=6)
    draws = [
        draw(
            position, seed=position + 2**63, temperature=temperature, top_p=top_p, top_k=top_k, logprobs=True
        )
        for position in range(6)
    ]
    together = sample(logits[rows], [draws[row] for row in rows])
    for place, row in enumerate(rows):
        assert together[place] == sample(logits[row : row + 1], [draws[row]])[0]


def test_rounding_does_not_matter() -> None:
    """Logits of another batch shape differ in the last bits; tokens do not."""
    logits = logits_of(4, rows=400, size=1000)
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)) * 1e-6
    for sampling in ({}, {"top_p": 0.9}, {"top_k": 50}):
        draws = [draw(position, seed=1, temperature=1.0, **sampling) for position in range(400)]
        assert sample(logits, draws) == sample(logits + noise, draws)


@pytest.mark.parametrize("sampling", [{}, {"top_k": 3}, {"top_p": 0.99}])
def test_noise_belongs_to_tokens_not_to_ranks(sampling: dict[str, Any]) -> None:
    """Two candidates that rounding swaps keep their noise."""
    logits = torch.tensor([[2.0, 2.0, 1.0, -20.0]])
    swapped = logits + torch.tensor([[0.0, 1e-6, 0.0, 0.0]])
    draws = [draw(position, seed=3, temperature=1.0, **sampling) for position in range(60)]
    assert sample(logits.expand(60, -1), draws) == sample(swapped.expand(60, -1), draws)


def test_seed_and_position_matter() -> None:
    logits = torch.zeros((1, 1000))
    by_seed = {sample(logits, [draw(0, seed=seed, temperature=1.0)])[0].token_id for seed in range(40)}
    by_position = {sample(logits, [draw(place, seed=0, temperature=1.0)])[0].token_id for place in range(40)}
    assert len(by_seed) > 30
    assert len(by_position) > 30


def test_golden_tokens() -> None:
    """Other versions of this code, of NumPy and of torch on other workers must choose these, too."""
    logits = torch.linspace(0, 3, VOCABULARY)[None]
    chosen = [sample(logits, [draw(place, seed=42, temperature=1.0)])[0].token_id for place in range(8)]
    assert chosen == [16, 29, 35, 31, 42, 47, 49, 48]


def test_greedy_ties_go_to_the_first() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0]])
    assert sample(logits, [draw()])[0].token_id == 1


def test_logprobs() -> None:
    logits = logits_of(6)
    expected = torch.log_softmax(logits[0].double(), dim=-1)
    for temperature in (0.0, 0.5):
        choice = sample(logits, [draw(temperature=temperature, logprobs=True, top_logprobs=3, top_p=0.5)])[0]
        assert choice.logprobs is not None
        assert choice.logprobs.logprob == pytest.approx(float(expected[choice.token_id]), abs=1e-5)
        best = expected.topk(3)
        assert [token for token, _ in choice.logprobs.top] == best.indices.tolist()
        assert [value for _, value in choice.logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert sample(logits, [draw()])[0].logprobs is None
    bare = sample(logits, [draw(logprobs=True)])[0].logprobs
    assert bare is not None and bare.top == ()
