"""Chooses tokens so that a request gets the same ones wherever and whenever it is computed.

The randomness of a token depends on (seed, position) and nothing else: not on the batch, the worker or the attempt.
And it is used so that rounding hardly matters: every token id gets its own Gumbel noise and the best sum of
log-probability and noise wins (the Gumbel-max trick), so a logit that differs in its last bit changes a token only
when two candidates tie to that bit. Walking a cumulative distribution would change tokens far more often.

Philox is a counter-based generator whose raw stream is fixed by its paper (Salmon et al., SC'11): NumPy keeps it
stable between versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from layercast_agent.engine.sequence import SamplingParams, TokenLogprobs
from layercast_agent.engine.shaping import shape_logits

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]

NUCLEUS_FIRST = 1024
"""Candidates sorted before the whole vocabulary is; they nearly always hold the nucleus."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What a row of logits is for. `position` is the token's index among all generated tokens of its request.

    `prompt` and `generated` are the tokens before it, which penalties look at; `allowed` [vocabulary] is the guide's.
    """

    sampling: SamplingParams
    position: int
    prompt: Sequence[int] = ()
    generated: Sequence[int] = ()
    allowed: npt.NDArray[np.bool_] | None = None

    @property
    def plain(self) -> bool:
        """The largest logit wins and nobody asks for more."""
        sampling = self.sampling
        return sampling.temperature == 0 and not sampling.logprobs and not sampling.shaped


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The chosen token, with log-probabilities when asked for."""

    token_id: int
    logprobs: TokenLogprobs | None = None


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Choice]:
    """Chooses a token for each row of logits [N, vocabulary] float32. Rows do not influence each other."""
    greedy = _greedy(logits)
    return [
        Choice(token_id=greedy[row]) if draw.plain else _choose(logits[row], draw)
        for row, draw in enumerate(draws)
    ]


def _greedy(logits: torch.Tensor) -> list[int]:
    """The first of the largest logits of each row."""
    if logits.device.type == "cpu":
        # NumPy's is vectorised; torch's took a tenth of a step for 16 rows of 49,152 logits.
        best: list[int] = logits.numpy().argmax(axis=-1).tolist()
    else:
        best = logits.argmax(dim=-1).tolist()
    return best


def _choose(row: torch.Tensor, draw: Draw) -> Choice:
    sampling = draw.sampling
    logits: Floats = row.cpu().numpy().astype(np.float64)
    shaped = logits
    if sampling.shaped:
        shaped = shape_logits(
            logits, sampling, prompt=draw.prompt, generated=draw.generated, allowed=draw.allowed
        )
    token_id = _draw(shaped, draw) if sampling.temperature > 0 else int(np.argmax(shaped))
    logprobs = _logprobs(logits, token_id, sampling.top_logprobs) if sampling.logprobs else None
    return Choice(token_id=token_id, logprobs=logprobs)


def _draw(logits: Floats, draw: Draw) -> int:
    """Temperature, then min-p, then top-k, then top-p, then the noise."""
    sampling = draw.sampling
    scaled = logits / sampling.temperature
    if sampling.min_p > 0:
        # "Turning up the heat", arXiv 2407.01082: relative to the best candidate's probability.
        scaled[scaled < scaled.max() + np.log(sampling.min_p)] = -np.inf
    kept: Ids | None = None
    if 0 < sampling.top_k < len(scaled):
        kept = _best(scaled, sampling.top_k)
    if sampling.top_p < 1:
        kept = _nucleus(scaled, kept, sampling.top_p)
    noise = _gumbel(sampling.seed, draw.position, len(scaled), kept)
    if kept is None:
        return int(np.argmax(scaled + noise))
    return int(kept[np.argmax(scaled[kept] + noise)])


def _gumbel(seed: int, position: int, size: int, kept: Ids | None) -> Floats:
    """Standard Gumbel noise of the kept token ids. Element i of the stream belongs to token i, kept or not."""
    raw = np.random.Philox(key=np.array([seed, position], dtype=np.uint64)).random_raw(size)
    chosen = raw if kept is None else raw[kept]
    uniform = ((chosen >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    noise: Floats = -np.log(-np.log(uniform))
    return noise


def _best(values: Floats, count: int) -> Ids:
    """Indices of the `count` largest values, best first, ties by index."""
    # Everything that ties with the last one competes, so that the choice among equals is by index.
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    candidates = np.flatnonzero(values >= threshold)
    order = np.lexsort((candidates, -values[candidates]))
    return candidates[order][:count]


def _nucleus(scaled: Floats, kept: Ids | None, top_p: float) -> Ids:
    """The fewest best tokens whose probabilities, among the kept ones, sum up to `top_p`; at least one."""
    total = _log_sum_exp(scaled if kept is None else scaled[kept])
    size = len(scaled) if kept is None else len(kept)
    first = size if kept is not None else min(NUCLEUS_FIRST, size)
    for count in (first, size):
        candidates = _best(scaled, count) if kept is None else kept
        before = np.cumsum(np.exp(scaled[candidates] - total))
        if before[-1] >= top_p:
            break
    needed = int(np.searchsorted(before, top_p)) + 1
    return candidates[:needed]


def _logprobs(logits: Floats, token_id: int, top: int) -> TokenLogprobs:
    total = _log_sum_exp(logits)
    best = _best(logits, min(top, len(logits))) if top > 0 else ()
    return TokenLogprobs(
        logprob=float(logits[token_id] - total),
        top=tuple((int(index), float(logits[index] - total)) for index in best),
    )


def _log_sum_exp(values: Floats) -> float:
    highest = values.max()
    return float(highest + np.log(np.exp(values - highest).sum()))
