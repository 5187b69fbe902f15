"""What every part of the GPU benchmark needs: its mode, its device, clocks, and models of random parameters."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from layercast_agent.engine.engine import Engine, EngineLimits
from layercast_agent.engine.kv import KVCache
from layercast_agent.engine.model import LayeredModel, build_model, shape_of
from layercast_agent.engine.sequence import SamplingParams, Sequence
from layercast_agent.layout import SegmentSpec, plan_segments

Figures = dict[str, float | str]
"""What a part measured, by name; under "wrong", where there is such a name, what makes the part fail."""

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
"""The shape of Llama 3.1 8B."""

TINY: dict[str, Any] = LLAMA_8B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """`mode`: full, shake or small. `known`: figures of the parts before this one."""

    mode: str
    device: torch.device
    known: Mapping[str, Any]

    @property
    def small(self) -> bool:
        return self.mode == "small"

    def config(self) -> dict[str, Any]:
        """The model that is measured."""
        return dict(TINY if self.small else LLAMA_8B)

    def choose(self, *, full: int, shake: int, small: int) -> int:
        """A number by mode."""
        return {"full": full, "shake": shake, "small": small}[self.mode]


def main(measure: Callable[[Setting], Figures]) -> None:
    """Entry point of a part: imports are done, so it waits to be let go."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", default="full", choices=["full", "shake", "small"])
    mode = parser.parse_args().mode
    known = json.loads(sys.stdin.readline() or "{}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and mode != "small":
        sys.exit("no GPU here: --small runs everywhere")
    figures = measure(Setting(mode=mode, device=device, known=known))
    wrong = figures.pop("wrong", "")
    print("RESULT " + json.dumps(figures), flush=True)
    if wrong:
        sys.exit(f"WRONG: {wrong}")


def synchronize(device: torch.device) -> None:
    """Waits for everything that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(
    function: Callable[[], object], device: torch.device, *, repeat: int = 10, warm: int = 3
) -> float:
    """Median time of a call, by device events on a GPU."""
    for _ in range(warm):
        function()
    synchronize(device)
    times = []
    for _ in range(repeat):
        if device.type == "cuda":
            begin, end = _event(), _event()
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) / 1e3)
        else:
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch says nothing of it


def segments_of(model: LayeredModel) -> tuple[SegmentSpec, ...]:
    """Where a packed checkpoint has the model's parameters."""
    word = {torch.float32: "F32", torch.bfloat16: "BF16"}[model.shape.dtype]
    shapes = {name: (word, tuple(parameter.shape)) for name, parameter in model.named_tensors()}
    return plan_segments(shapes, model.shape.layers)


def views(segment: SegmentSpec, memory: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A segment's parameters in its memory, uint8."""
    return {
        spec.name: memory[spec.offset : spec.offset + spec.nbytes].view(dtype).view(spec.shape)
        for spec in segment.tensors
    }


def fill(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Random values that keep hidden states of order one through any number of layers."""
    if "norm" in name:
        tensor.fill_(1.0)
    elif "embed" in name:
        tensor.normal_(generator=generator)
    else:
        tensor.normal_(std=1 / math.sqrt(tensor.shape[-1]), generator=generator)


def random_memories(
    model: LayeredModel, segments: tuple[SegmentSpec, ...], seed: int = 0
) -> list[torch.Tensor]:
    """Random parameters on the model's device, one memory a segment."""
    generator = torch.Generator(model.device).manual_seed(seed)
    memories = []
    for segment in segments:
        memory = torch.zeros(segment.nbytes, dtype=torch.uint8, device=model.device)
        for name, tensor in views(segment, memory, model.shape.dtype).items():
            fill(name, tensor, generator)
        memories.append(memory)
    return memories


def random_model(config: dict[str, Any], device: torch.device) -> LayeredModel:
    """A complete model of random parameters."""
    model = build_model(config=config, shape=shape_of(config, "bfloat16"), device=device)
    segments = segments_of(model)
    for segment, memory in zip(segments, random_memories(model, segments), strict=True):
        model.attach(views(segment, memory, model.shape.dtype))
    return model


def engine_of(model: LayeredModel, *, positions: int, batch_size: int, step_tokens: int) -> Engine:
    """An engine with KV for that many positions in all."""
    return Engine(
        model=model,
        kv=KVCache(model.shape, -(-positions // 16), page_size=16, device=model.device),
        limits=EngineLimits(
            batch_size_max=batch_size,
            step_tokens_max=step_tokens,
            waiting_max=1024,
            context_length_max=model.shape.context_length_max,
        ),
    )


def request(
    name: str, length: int, tokens: int, *, vocabulary: int, seed: int, arrived_at: float = 0.0
) -> Sequence:
    """A request with a random prompt."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
    return Sequence(
        request_id=name,
        attempt=1,
        gateway_id="bench",
        prompt=tuple(prompt),
        generated=[],
        sampling=SamplingParams(max_tokens=tokens),
        arrived_at=arrived_at,
    )
