"""What the agent's tests share: settings in a temporary folder, waiting with a deadline, calling a running agent."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import shutil
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from layercast_agent.agent import CommandDeadlines
from layercast_agent.health import WorkerLimits
from layercast_agent.settings import AgentSettings
from layercast_agent.store import Store

SCRIPTED_WORKER = (sys.executable, str(Path(__file__).parent / "scripted_worker.py"))

Settings = Callable[..., AgentSettings]
Eventually = Callable[..., Awaitable[Any]]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of an agent with one CPU device and scripted workers; keyword arguments change some."""
    token = tmp_path / "token"
    token.write_bytes(b"secret\n")

    def make(**changes: Any) -> AgentSettings:
        values: dict[str, Any] = {
            "node": "node-0",
            "listen": "127.0.0.1:0",
            "data_listen": "127.0.0.1:0",
            "store_dir": tmp_path / "store",
            "run_dir": tmp_path / "run",
            "devices": "cpu:1",
            "device_memory_bytes": 1_000_000,
            "token_file": token,
            "stop_grace_s": 5.0,
            "worker_command": SCRIPTED_WORKER,
        }
        return AgentSettings(**{**values, **changes})

    return make


@pytest.fixture
def limits() -> WorkerLimits:
    """An impatient agent."""
    return WorkerLimits(
        poll_interval_s=0.02, idle_interval_s=0.02, poll_deadline_s=0.3, silent_s=2.0, restart_delay_s=0.05
    )


@pytest.fixture
def deadlines() -> CommandDeadlines:
    """Impatient commands."""
    return CommandDeadlines(manifest_s=2.0, assign_s=1.0, command_s=2.0, unassign_s=1.0)


@pytest.fixture
def eventually() -> Eventually:
    """Waits until a probe gives something true, and returns that. Another process's state has no event to await."""

    async def wait(probe: Callable[[], Any], *, within_s: float = 15.0) -> Any:
        clock = asyncio.get_running_loop().time
        give_up_at = clock() + within_s
        never = asyncio.Event()
        while True:
            value = probe()
            if inspect.isawaitable(value):
                value = await value
            if value:
                return value
            assert clock() < give_up_at, (
                f"did not happen within {within_s} s: {inspect.getsource(probe).strip()}"
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(never.wait(), 0.02)

    return wait


@pytest.fixture(scope="session")
def tiny_model(tinymodels: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama as a Hugging Face folder."""
    return Path(tinymodels.make(tmp_path_factory.mktemp("model") / "tiny", "llama", layers=2))


@pytest.fixture(scope="session")
def packed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that holds the tiny model under the key `tiny`; not to be changed."""
    root = tmp_path_factory.mktemp("packed")
    Store(root).prepare(
        key="tiny", source=f"file://{tiny_model}", revision="", dtype="", progress=lambda progress: None
    )
    return root


@pytest.fixture
def packed_store(packed: Path, tmp_path: Path) -> Path:
    """A store of this test's own that holds the tiny model."""
    return Path(shutil.copytree(packed, tmp_path / "packed"))
