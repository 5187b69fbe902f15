"""The block made of Triton kernels produces transformers' tokens, however the work is cut."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from layercast_agent.engine.cuda import CudaModel, triton_missing
from layercast_agent.engine.engine import Engine, EngineLimits
from layercast_agent.engine.kv import KVCache
from layercast_agent.engine.model import shape_of

CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

COUNT = 6 if CUDA else 2  # a launch in the interpreter takes 20 ms
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def _load_families() -> ModuleType:
    path = Path(__file__).parents[1] / "engine" / "families.py"
    spec = importlib.util.spec_from_file_location("layercast_test_gpu_families", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    for name in FAMILIES:
        module.CONFIGS[name]["head_dim"] = 16  # the kernels' least
    return module


@pytest.fixture(scope="module")
def families() -> ModuleType:
    """The tiny models of tests/engine, with heads as wide as the kernels need them."""
    return _load_families()


@pytest.fixture(params=FAMILIES)
def tiny(request: pytest.FixtureRequest, families: ModuleType, device: torch.device) -> Any:
    """A tiny model whose `model` is the CUDA block."""
    found = families.build(request.param, "generic")
    parameters = families.packed(families.parameters(found.judge, found.model))
    model = CudaModel(config=found.config, shape=shape_of(found.config, "float32"), device=device)
    assert triton_missing(model.sizes) is None
    if device.type == "cuda":
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in parameters.values()}
        there = {at: storage.cuda() for at, storage in storages.items()}
        parameters = {
            name: torch.empty(0, dtype=t.dtype, device=device).set_(
                there[t.untyped_storage().data_ptr()], t.storage_offset(), t.shape, t.stride()
            )
            for name, t in parameters.items()
        }
    model.attach(parameters)
    found.model = model
    return found


def _engine(tiny: Any, device: torch.device, *, step_tokens_max: int = 64) -> Engine:
    return Engine(
        model=tiny.model,
        kv=KVCache(tiny.model.shape, 64, page_size=4, device=device),
        limits=EngineLimits(
            batch_size_max=8, step_tokens_max=step_tokens_max, waiting_max=32, context_length_max=128
        ),
    )


def test_batch_in_chunks(tiny: Any, families: ModuleType, device: torch.device) -> None:
    """Prompts of mixed lengths in chunks beside others that decode: both attention kernels in one step."""
    engine = _engine(tiny, device, step_tokens_max=17)
    prompts = families.prompts((30, 3, 13)) if CUDA else families.prompts((20, 3))
    for index, prompt in enumerate(prompts):
        engine.add(families.sequence(prompt, COUNT, name=f"r{index}", arrived_at=index))
    events = families.run(engine)
    for index, prompt in enumerate(prompts):
        assert families.tokens(events, f"r{index}") == tiny.expected(prompt, COUNT)


def test_every_split_of_a_handoff(families: ModuleType, device: torch.device, tiny: Any) -> None:
    prompt = families.prompts([11])[0]
    for k in range(1, tiny.layers) if CUDA else (2,):
        giver, taker = _engine(tiny, device), _engine(tiny, device)
        given, taken = families.sequence(prompt, COUNT), families.sequence(prompt, COUNT)
        giver.add(given)
        for _ in range(k):
            giver.run_layer(given)
        taker.add(taken)
        taker.import_state(taken, k, bytes(giver.export_state(given).numpy()))
        assert families.tokens(families.run(taker)) == tiny.expected(prompt, COUNT), f"k={k}"


@pytest.mark.skipif(not CUDA, reason="CUDA graphs need a GPU")
def test_graphs_replay_the_same_tokens(tiny: Any, families: ModuleType, device: torch.device) -> None:
    """Batches that shrink from five to one, eager first, then as graphs of larger sizes."""
    prompts = families.prompts((30, 3, 13, 7, 21))
    states = []
    for _ in range(3):
        engine = _engine(tiny, device)
        for index, prompt in enumerate(prompts):
            engine.add(families.sequence(prompt, COUNT + index, name=f"r{index}", arrived_at=index))
        events = families.run(engine)
        for index, prompt in enumerate(prompts):
            assert families.tokens(events, f"r{index}") == tiny.expected(prompt, COUNT + index)
        tiny.model._graphs.wait(60)
        states.append(tiny.model.block)
    assert states[-1].endswith("graphs of 1 2 4 8"), states
