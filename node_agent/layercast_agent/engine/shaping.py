"""What a request's own wishes and tokens do to its logits before a token is chosen: biases, penalties, a guide. Pure.

Everything here depends on the request and its tokens so far, so a replayed or moved request is shaped alike. The order
is vLLM's: what a guide forbids, biases, penalties, then the tokens that may not come yet. References: repetition
penalty, CTRL (arXiv 1909.05858, section 4.1); presence and frequency penalties, OpenAI's API.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from layercast_agent.engine.sequence import SamplingParams

Floats = npt.NDArray[np.float64]
Allowed = npt.NDArray[np.bool_]


def shape_logits(
    logits: Floats,
    sampling: SamplingParams,
    *,
    prompt: Sequence[int],
    generated: Sequence[int],
    allowed: Allowed | None,
) -> Floats:
    """A copy of `logits` [vocabulary] with everything applied that does not need chance."""
    shaped = logits.copy()
    if allowed is not None:
        shaped[~allowed] = -np.inf
    for token_id, bias in sampling.logit_bias:
        shaped[token_id] += bias
    if sampling.repetition_penalty != 1:
        seen = np.unique(np.array((*prompt, *generated), dtype=np.intp))
        values = shaped[seen]
        penalty = sampling.repetition_penalty
        shaped[seen] = np.where(values > 0, values / penalty, values * penalty)
    if generated and (sampling.presence_penalty or sampling.frequency_penalty):
        ids, counts = np.unique(np.array(generated, dtype=np.intp), return_counts=True)
        shaped[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    if len(generated) < sampling.min_tokens:
        _forbid_ends(shaped, sampling)
    return shaped


def _forbid_ends(shaped: Floats, sampling: SamplingParams) -> None:
    """Tokens that would end the request, unless a guide leaves nothing else."""
    ends = [token_id for token_id in sampling.stop_token_ids if token_id < len(shaped)]
    kept = shaped[ends]
    shaped[ends] = -np.inf
    if not np.isfinite(shaped).any():
        shaped[ends] = kept
