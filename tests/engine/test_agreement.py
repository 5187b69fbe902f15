"""bfloat16 on the real model: where the best token is clear of the rounding noise, it is the same as in float32.

Tokens cannot be compared one by one in bfloat16: rounding depends on the shapes of batches, in every engine. What can
be promised is the choice at positions whose margin is larger than the noise. The noise is measured, not assumed: the
root mean square of what rounding does to transformers' own logits. A margin is the difference of two logits, so clear
means more than twice the noise.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from layercast_agent.engine.attention import BatchPlan, Span
from layercast_agent.engine.kv import KVCache
from layercast_agent.engine.model import Wanted, build_model, shape_of

AGREEMENT_MIN = 0.99
CLEAR = 2.0
TOKENS_MAX = 208
CHUNK = 80

TEXT = Path(__file__).resolve().parent.parent.parent / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def judged(smollm2_folder: Path) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Token ids of a text, transformers' logits in float32, and what bfloat16 does to them: (ids, logits, noise)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.tensor(
        AutoTokenizer.from_pretrained(smollm2_folder)(TEXT.read_text())["input_ids"][:TOKENS_MAX]
    )
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        judge = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=dtype).eval()
        with torch.inference_mode():
            logits.append(judge(ids[None]).logits[0].float())
    return ids, logits[0], (logits[1] - logits[0]).square().mean().sqrt().item()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("wanted", [Wanted.GENERIC, Wanted.FAST])
def test_top_token_in_bfloat16(
    smollm2_folder: Path, judged: tuple[torch.Tensor, torch.Tensor, float], wanted: Wanted
) -> None:
    from safetensors.torch import load_file

    ids, exact, noise = judged
    best = exact.topk(2, dim=-1)
    clear = best.values[:, 0] - best.values[:, 1] > CLEAR * noise

    config = json.loads((smollm2_folder / "config.json").read_text())
    shape = shape_of(config, "bfloat16")
    device = torch.device("cpu")
    model = build_model(config=config, shape=shape, device=device, wanted=wanted)
    model.attach({n: t.bfloat16() for n, t in load_file(smollm2_folder / "model.safetensors").items()})
    kv = KVCache(shape, TOKENS_MAX // 16, page_size=16, device=device)
    pages = kv.allocator.allocate(TOKENS_MAX // 16)
    found = []
    for start in range(0, len(ids), CHUNK):
        count = min(CHUNK, len(ids) - start)
        batch = BatchPlan.of(kv, [Span(start=start, count=count, pages=pages)])
        hidden = model.run_layers(0, shape.layers, model.embed(ids[start : start + count]), batch)
        found.append(model.logits(hidden).argmax(-1))
    same = torch.cat(found) == best.indices[:, 0]
    agreement = same[clear].float().mean().item()
    print(
        f"{wanted.value}: noise {noise:.3f}, {int(clear.sum())} of {len(ids)} positions are clear, agreement there "
        f"{agreement:.4f}, everywhere {same.float().mean():.4f}"
    )
    assert clear.float().mean() > 0.5, "a noise that hides most positions would prove nothing"
    assert agreement >= AGREEMENT_MIN
