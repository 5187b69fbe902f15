"""Our engine, and transformers' generate, as processes of `python -m bench.engine`: each obeys JSON lines.

`ours` is the product's engine with its scheduler and sampler; `layerwise` is the same, stopped at every layer.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers import __version__ as transformers_version

from layercast_agent.engine.attention import BatchPlan
from layercast_agent.engine.engine import Engine, EngineLimits
from layercast_agent.engine.kv import KVCache
from layercast_agent.engine.model import LayeredModel, ModelShape, Wanted, build_model, shape_of
from layercast_agent.engine.sequence import SamplingParams, Sequence
from layercast_agent.layout import plan_segments

CPU = torch.device("cpu")
WORDS = {torch.float32: "F32", torch.bfloat16: "BF16"}
Tokens = list[list[int]]


class Layerwise:
    """A model whose every call runs one layer: what being able to stop at each boundary costs."""

    def __init__(self, model: LayeredModel) -> None:
        self._model = model
        self.shape: ModelShape = model.shape
        self.device = model.device

    @property
    def block(self) -> str:
        return self._model.block

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._model.named_tensors()

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._model.check(shapes)

    def attach(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._model.attach(tensors)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._model.embed(token_ids)

    def run_layers(self, first: int, last: int, hidden: torch.Tensor, batch: BatchPlan) -> torch.Tensor:
        for layer in range(first, last):
            hidden = self._model.run_layers(layer, layer + 1, hidden, batch)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.logits(hidden)


def load(folder: Path, dtype: str, block: str) -> LayeredModel:
    """The model over packed segments, as a worker has it."""
    config = json.loads((folder / "config.json").read_text())
    model = build_model(config=config, shape=shape_of(config, dtype), device=CPU, wanted=Wanted(block))
    wanted = {name for name, _ in model.named_tensors()}
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    stored = {n: t.to(model.shape.dtype) for file in files for n, t in file.items() if n in wanted}
    shapes = {name: (WORDS[model.shape.dtype], tuple(tensor.shape)) for name, tensor in stored.items()}
    for segment in plan_segments(shapes, model.shape.layers):
        memory = torch.empty(segment.nbytes, dtype=torch.uint8)
        views: dict[str, torch.Tensor] = {}
        for spec in segment.tensors:
            view = memory[spec.offset : spec.offset + spec.nbytes].view(model.shape.dtype).view(spec.shape)
            views[spec.name] = view.copy_(stored[spec.name])
        model.attach(views)
    return model


def engine_over(model: LayeredModel, *, context: int, step_tokens: int) -> Engine:
    """An engine with room for the largest batch here."""
    limits = EngineLimits(
        batch_size_max=32, step_tokens_max=step_tokens, waiting_max=64, context_length_max=context
    )
    return Engine(model=model, kv=KVCache(model.shape, 2 * context, device=CPU), limits=limits)


def generate(engine: Engine, prompts: Tokens, new: int) -> Tokens:
    """Greedy tokens of all prompts."""
    for index, prompt in enumerate(prompts):
        engine.add(
            Sequence(
                request_id=f"r{index}",
                attempt=1,
                gateway_id="",
                prompt=tuple(prompt),
                generated=[],
                sampling=SamplingParams(max_tokens=new),
                arrived_at=float(index),
            )
        )
    found: dict[str, list[int]] = {f"r{index}": [] for index in range(len(prompts))}
    while engine.running or engine.waiting:
        for event in engine.step():
            found[event.request_id].append(event.token_id)
    return list(found.values())


def ours(settings: dict[str, Any]) -> tuple[str, dict[str, Callable[[Tokens, int], Tokens]]]:
    """Two engines over one copy of the weights."""
    model = load(Path(settings["model"]), settings["dtype"], settings["block"])
    sizes = {"context": settings["context"], "step_tokens": settings["step_tokens"]}
    whole, layerwise = engine_over(model, **sizes), engine_over(cast(LayeredModel, Layerwise(model)), **sizes)
    return f"layercast {model.block}", {
        "ours": lambda prompts, new: generate(whole, prompts, new),
        "layerwise": lambda prompts, new: generate(layerwise, prompts, new),
    }


def theirs(settings: dict[str, Any]) -> tuple[str, dict[str, Callable[[Tokens, int], Tokens]]]:
    """transformers' generate on a batch of equally long prompts."""
    dtype = getattr(torch, settings["dtype"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype).eval()

    def run(prompts: Tokens, new: int) -> Tokens:
        ids = torch.tensor(prompts)
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
        )
        return cast(Tokens, answer[:, ids.shape[1] :].tolist())

    return f"transformers {transformers_version}", {"transformers": run}


def main() -> None:
    """Loads, says "ready", then times what each line asks for."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    name, runs = {"ours": ours, "transformers": theirs}[settings["engine"]](settings)
    print(json.dumps({"ready": name}), flush=True)
    clock = time.process_time if settings["clock"] == "cpu" else time.perf_counter
    for line in sys.stdin:
        work = json.loads(line)
        with torch.inference_mode():
            started = clock()
            tokens = runs[work["run"]](work["prompts"], work["new"])
            seconds = clock() - started
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
