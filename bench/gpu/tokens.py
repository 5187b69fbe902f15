"""The engine's tokens against transformers on this device: every tiny family in fp32, SmolLM2's shape in bf16."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from bench.gpu.part import Figures, Setting, main, segments_of, views

from layercast_agent.engine.attention import BatchPlan, Span
from layercast_agent.engine.engine import Engine, EngineLimits
from layercast_agent.engine.kv import KVCache
from layercast_agent.engine.model import Wanted, build_model, shape_of

COUNT = 8
LENGTHS = (13, 1, 7, 30, 2, 18)
SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}


def measure(setting: Setting) -> Figures:
    """Families whose tokens are all equal, and bf16's agreement where the margin is above the noise."""
    families = _families()
    names = list(families.CONFIGS) if not setting.small else ["llama", "qwen3"]
    runs = [(name, block) for name in names for block in families.blocks(name)]
    equal = []
    for name, block in runs:
        try:
            wrong = _compare(families, name, block, setting.device)
        except Exception:
            wrong = traceback.format_exc()
        equal.append(not wrong)
        print(f"{name} {block}: " + (wrong or "tokens equal"), flush=True)
    figures: Figures = {"fp32_families_equal": float(sum(equal)), "fp32_families_tried": float(len(equal))}
    if not setting.small:
        for block in ("generic", "fast"):
            figures[f"bf16_top1_agreement_{block}"] = _agreement(setting.device, Wanted(block))
    unequal = [run for run, same in zip(runs, equal, strict=True) if not same]
    return figures | ({"wrong": f"tokens of {unequal}"} if unequal else {})


def _families() -> ModuleType:
    path = Path(__file__).parents[2] / "tests" / "engine" / "families.py"
    spec = importlib.util.spec_from_file_location("layercast_bench_families", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _on(device: torch.device, model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Attaches parameters as a packed checkpoint has them, on the device."""
    for segment in segments_of(model):
        memory = torch.zeros(segment.nbytes, dtype=torch.uint8, device=device)
        found = views(segment, memory, model.shape.dtype)
        for name, tensor in found.items():
            tensor.copy_(tensors[name])
        model.attach(found)


def _compare(families: Any, name: str, block: str, device: torch.device) -> str:
    """What differs; empty when nothing does."""
    tiny = families.build(name, "generic")
    model = families.bare(tiny.config, "float32", block, device)
    _on(device, model, families.parameters(tiny.judge, tiny.model))
    engine = Engine(
        model=model,
        kv=KVCache(model.shape, 64, page_size=4, device=device),
        limits=EngineLimits(batch_size_max=8, step_tokens_max=19, waiting_max=32, context_length_max=128),
    )
    prompts = families.prompts(LENGTHS)
    for index, prompt in enumerate(prompts):
        engine.add(families.sequence(prompt, COUNT, name=f"r{index}", arrived_at=index))
    events = families.run(engine)
    wrong = [
        f"prompt of {len(prompt)}: {families.tokens(events, f'r{index}')} for {tiny.expected(prompt, COUNT)}"
        for index, prompt in enumerate(prompts)
        if families.tokens(events, f"r{index}") != tiny.expected(prompt, COUNT)
    ]
    return "; ".join(wrong) and f"({model.block}) " + "; ".join(wrong)


@torch.inference_mode()
def _agreement(device: torch.device, wanted: Wanted) -> float:
    """Share of positions with the judge's best token, where its lead is clearly above the noise."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    values = {key: value for key, value in SMOLLM2.items() if key != "architectures"}
    torch.manual_seed(0)
    with torch.inference_mode(mode=False):
        judge = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING["llama"].from_dict(values), dtype=torch.bfloat16, attn_implementation="eager"
        ).eval()
    judge = judge.to(device)
    model = build_model(config=SMOLLM2, shape=shape_of(SMOLLM2, "bfloat16"), device=device, wanted=wanted)
    stored = judge.state_dict()
    _on(device, model, {name: stored[name] for name, _ in model.named_tensors()})
    tokens = torch.randint(0, SMOLLM2["vocab_size"], (512,), device=device)
    kv = KVCache(model.shape, 33, page_size=16, device=device)
    spans = [Span(start=0, count=512, pages=kv.allocator.allocate(32))]
    ours = model.logits(model.run_layers(0, model.shape.layers, model.embed(tokens), BatchPlan.of(kv, spans)))
    exact = judge.float()(tokens[None]).logits[0]
    noise = float((ours - exact).std())
    best = exact.topk(2, dim=-1)
    clear = best.values[:, 0] - best.values[:, 1] > 3 * noise
    same = ours.argmax(-1) == best.indices[:, 0]
    there, overall = float(same[clear].float().mean()), float(same.float().mean())
    print(f"bf16 {model.block}: noise {noise:.4f}, {int(clear.sum())} of 512 positions clear", end=", ")
    print(f"agreement {there:.4f} there, {overall:.4f} overall")
    return there


if __name__ == "__main__":
    main(measure)
