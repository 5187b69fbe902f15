"""Gives the tests the world made of values, and waiting with a deadline."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest


def _load(name: str) -> Any:
    """A file beside this one as a module: tests are no package, so it cannot be imported by name."""
    spec = importlib.util.spec_from_file_location(f"control_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def worlds() -> Any:
    """The module `world`."""
    return _load("world")


@pytest.fixture(scope="session")
def wire() -> Any:
    """The module `scripted_agent`."""
    return _load("scripted_agent")


@pytest.fixture
def eventually() -> Callable[..., Awaitable[None]]:
    """Wait until a condition holds; looked at whenever the loop turns, with a deadline."""

    async def wait(condition: Callable[[], object], *, within_s: float = 10.0, what: str = "") -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within_s
        while not condition():
            assert loop.time() < deadline, f"not within {within_s} s: {what or condition}"
            turned = asyncio.Event()
            loop.call_later(0.01, turned.set)
            await turned.wait()

    return wait
