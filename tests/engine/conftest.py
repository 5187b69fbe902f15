"""What the engine's tests share: tiny models, each built once."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest
import torch

FOLDER = Path(__file__).parent

# Tiny matrices: more threads only wait for each other.
torch.set_num_threads(1)

# Machines are shared: how long one example takes says nothing.
hypothesis.settings.register_profile("engine", deadline=None, max_examples=80)
hypothesis.settings.load_profile("engine")


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"layercast_test_engine_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_FAMILIES = _load("families")
_built: dict[str, Any] = {}


_EVERY = [f"{family}:{block}" for family in _FAMILIES.CONFIGS for block in _FAMILIES.blocks(family)]


def _tiny(name: str) -> Any:
    if name not in _built:
        _built[name] = _FAMILIES.build(*name.split(":"))
    return _built[name]


@pytest.fixture(scope="session")
def families() -> ModuleType:
    """tests/engine/families.py, which is no package's member."""
    return _FAMILIES


DIFFERENT = [
    "llama-tied-biased:generic",
    "llama-tied-biased:fast",
    "mistral:fast",
    "qwen2-windowed:generic",
    "qwen2-windowed:fast",
    "qwen2-windowed:torch",
    "qwen3:fast",
    "gemma3_text:generic",
    "gpt_oss:generic",
    "granite:generic",
    "deepseek_v3:generic",
    "gpt_neox:generic",
]
"""Families that differ in what the engine does, not only in what their layers compute."""


@pytest.fixture(params=_EVERY if os.environ.get("LAYERCAST_EVERY_FAMILY") else DIFFERENT)
def tiny(request: pytest.FixtureRequest) -> Any:
    """A tiny model of each of some families; of all when `LAYERCAST_EVERY_FAMILY` is set."""
    return _tiny(request.param)


@pytest.fixture(params=_EVERY)
def any_tiny(request: pytest.FixtureRequest) -> Any:
    """A tiny model of each family, by each block implementation that runs it."""
    return _tiny(request.param)


@pytest.fixture(params=[name for name in _EVERY if name.endswith((":fast", ":torch"))])
def fast(request: pytest.FixtureRequest) -> Any:
    """A tiny model of each family that the fast block runs."""
    return _tiny(request.param)


@pytest.fixture(params=["llama:generic", "llama:fast", "llama:torch"])
def either_llama(request: pytest.FixtureRequest) -> Any:
    """A tiny Llama by each block implementation."""
    return _tiny(request.param)


@pytest.fixture
def tiny_of() -> Any:
    """A tiny model by "family:block"."""
    return _tiny


@pytest.fixture
def llama() -> Any:
    """A tiny Llama: for what does not depend on the family."""
    return _tiny("llama")


@pytest.fixture
def gemma() -> Any:
    """A tiny Gemma 2: windows on every other layer, soft-capping, tied embeddings."""
    return _tiny("gemma2")


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The real model as a Hugging Face folder, where `LAYERCAST_SMOLLM2` or the cache of the demo has it."""
    folder = Path(
        os.environ.get("LAYERCAST_SMOLLM2", "~/.cache/layercast/models/SmolLM2-135M-Instruct")
    ).expanduser()
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"no SmolLM2-135M-Instruct at {folder}: python -m layercast_cli.smollm2 {folder}")
    return folder
