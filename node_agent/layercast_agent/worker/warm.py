"""Pays before a scale-up what the first use of a library, a device and a kernel costs.

Imports of model code, the device's context, the memory allocator and the first attention call take seconds together;
a worker that has done them once executes its first real layer in milliseconds.
"""

from __future__ import annotations

import time

import torch

from layercast_agent.engine.engine import Engine, EngineLimits
from layercast_agent.engine.kv import KVCache
from layercast_agent.engine.model import build_model, shape_of
from layercast_agent.engine.sequence import SamplingParams, Sequence

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
"""Smallest model that goes through every line that a large one goes through."""


def warm_up(device: torch.device) -> None:
    """Runs a prompt and some tokens of a tiny random model."""
    shape = shape_of(TINY, "F32")
    model = build_model(config=TINY, shape=shape, device=device)
    generator = torch.Generator().manual_seed(0)
    model.attach(
        {
            name: torch.randn(parameter.shape, generator=generator).to(device, parameter.dtype)
            for name, parameter in model.named_tensors()
        }
    )
    engine = Engine(
        model=model,
        kv=KVCache(shape, 8, page_size=16, device=device),
        limits=EngineLimits(batch_size_max=2, step_tokens_max=16, waiting_max=2, context_length_max=64),
    )
    engine.add(
        Sequence(
            request_id="warm-up",
            attempt=1,
            gateway_id="",
            prompt=tuple(range(1, 9)),
            generated=[],
            sampling=SamplingParams(max_tokens=4),
            arrived_at=time.time(),
        )
    )
    with torch.inference_mode():
        while engine.running or engine.waiting:
            engine.step()
