"""Whole local clusters, made of the very processes that `layercast up` starts, with tiny random models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
import pytest

from layercast_cli.local import LocalCluster
from layercast_cli.programs import ClusterSettings

MODEL = "tiny"

StartCluster = Callable[..., AbstractContextManager[LocalCluster]]


@pytest.fixture(scope="session")
def model_folder(tinymodels: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty megabytes in eight layers: enough for a load over a slow link to take seconds."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    made: Path = tinymodels.make(folder, "llama", layers=8, hidden=256)
    return made


def service(folder: Path, **spec: Any) -> dict[str, Any]:
    """A ModelService for a folder; `spec` adds to it or replaces parts of it."""
    return {
        "apiVersion": "layercast.dev/v1alpha1",
        "kind": "ModelService",
        "metadata": {"name": MODEL},
        "spec": {
            "model": {"source": f"file://{folder}", "dtype": "float32"},
            "replicas": 1,
            "serving": {"contextLength": 256, "batchSize": 8},
            **spec,
        },
    }


@pytest.fixture
def start_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartCluster]:
    """Starts a local cluster on a folder of its own; the log of every process is shown when the test fails."""
    folder = tmp_path_factory.mktemp("lc")  # short: Unix sockets lie in it

    @contextmanager
    def start(document: dict[str, Any], **settings: Any) -> Iterator[LocalCluster]:
        wanted = ClusterSettings(
            state_dir=folder, services=(document,), **{"host_pool_bytes": 64 << 20, **settings}
        )
        with LocalCluster(wanted) as cluster:
            yield cluster

    yield start
    for log in sorted(folder.rglob("*.log")):
        print(f"=== {log.name}\n{log.read_text()[-6000:]}")


@asynccontextmanager
async def client_of(cluster: LocalCluster) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, which is not to hide a failure by trying again."""
    async with openai.AsyncOpenAI(
        base_url=f"{cluster.gateway_url}/v1", api_key="unused", max_retries=0, timeout=120.0
    ) as client:
        yield client


async def answers(client: openai.AsyncOpenAI, prompts: list[str], *, max_tokens: int) -> list[str]:
    """Greedy answers of all prompts, asked at once and streamed."""

    async def ask(prompt: str) -> str:
        stream = await client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])

    return list(await asyncio.gather(*(ask(prompt) for prompt in prompts)))
