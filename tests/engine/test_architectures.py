"""Every architecture of the table: what it computes equals transformers, in float32 token for token.

One lean run a family: a batch of mixed lengths in chunks, and a handoff at every layer. test_tokens.py does more with
a few of them, and with all of them when `LAYERCAST_EVERY_FAMILY` is set.
"""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch

from layercast_agent.engine.attention import BatchPlan, Span
from layercast_agent.engine.kv import KVCache
from layercast_agent.families import SUPPORTED

COUNT = 5


def test_every_supported_family_has_a_tiny_model(families: ModuleType) -> None:
    made = {families.config_of(name)["architectures"][0] for name in families.CONFIGS}
    assert made == set(SUPPORTED)
    assert len(SUPPORTED) == 36


def test_tokens(any_tiny: Any, families: ModuleType) -> None:
    prompts = families.prompts([13, 1, 22])
    taker = any_tiny.engine(step_tokens_max=7)
    for index, prompt in enumerate(prompts):
        taker.add(families.sequence(prompt, COUNT + index, name=f"r{index}", arrived_at=index))
    events = taker.step()
    for k in range(any_tiny.layers + 1):
        giver = any_tiny.engine()
        given = families.sequence(prompts[2], COUNT, name=f"k{k}", arrived_at=9)
        giver.add(given)
        giver.embed(given)
        for _ in range(k):
            giver.run_layer(given)
        taken = families.sequence(prompts[2], COUNT, name=f"k{k}", arrived_at=9)
        taker.add(taken)
        taker.import_state(taken, k, bytes(giver.export_state(given).numpy()))
    events += families.run(taker)
    for index, prompt in enumerate(prompts):
        assert families.tokens(events, f"r{index}") == any_tiny.expected(prompt, COUNT + index)
    for k in range(any_tiny.layers + 1):
        assert families.tokens(events, f"k{k}") == any_tiny.expected(prompts[2], COUNT), f"k={k}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(any_tiny: Any, families: ModuleType, dtype: str) -> None:
    """Logits as transformers' in the same precision, up to rounding: beside the judge's own rounding error."""
    prompt = families.prompts([21])[0]
    tokens = torch.tensor([prompt])
    half = copy.deepcopy(any_tiny.judge).to(getattr(torch, dtype))
    with torch.inference_mode():
        exact = any_tiny.judge(tokens).logits[0].float()
        judged = half(tokens).logits[0].float()
    model = families.attached(any_tiny.config, any_tiny.judge, dtype, any_tiny.block)
    kv = KVCache(model.shape, 8, page_size=4, device=families.CPU)
    batch = BatchPlan.of(kv, [Span(start=0, count=21, pages=kv.allocator.allocate(6))])
    hidden = model.run_layers(0, any_tiny.layers, model.embed(tokens[0]), batch)
    found = model.logits(hidden)
    assert found.dtype == torch.float32
    # Rounding may send a token to another expert: so most positions, not all.
    error = (found - exact).abs().mean(-1)
    allowed = 2 * (judged - exact).abs().mean(-1) + 0.02 * exact.std()
    assert (error <= allowed).float().mean() > 0.8
