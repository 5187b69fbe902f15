"""Bad input reaches a person as one clear sentence, and what already serves goes on."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.system.conftest import MODEL, StartCluster, answers, client_of, service

from layercast_cli.local import LocalCluster

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]


def _told(cluster: LocalCluster) -> str:
    status = cluster.status(MODEL)
    assert status is not None
    return "\n".join(f"{each.type}={each.status} {each.reason}: {each.message}" for each in status.conditions)


async def _until_told(cluster: LocalCluster, *words: str) -> str:
    """Waits until the conditions contain all words."""
    await asyncio.to_thread(
        lambda: cluster.wait(
            MODEL,
            lambda status: all(word in _told(cluster) for word in words),
            deadline_s=60,
            what=f"say {words}",
        )
    )
    return _told(cluster)


def _unsupported(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(architectures=["FancyNewForCausalLM"], model_type="fancy_new")
    (folder / "config.json").write_text(json.dumps(config))


def _truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _header_lies(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:40] = b"\xff" * 32
    file.write_bytes(content)


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "settings", "words"),
    [
        pytest.param(_unsupported, {}, ["FancyNewForCausalLM"], id="architecture"),
        pytest.param(_truncated, {}, ["model.safetensors", "tensor"], id="truncated"),
        pytest.param(_header_lies, {}, ["model.safetensors"], id="header"),
        pytest.param(_pickle, {}, ["pickle"], id="pickle"),
        pytest.param(
            lambda folder: None, {"device_memory_bytes": 21_000_000}, ["MiB", "KV cache"], id="memory"
        ),
    ],
)
async def test_a_model_that_cannot_be_served_says_why(
    *,
    model_folder: Path,
    tmp_path: Path,
    start_cluster: StartCluster,
    damage: Any,
    settings: dict[str, Any],
    words: list[str],
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(model_folder, folder)
    damage(folder)
    with start_cluster(service(folder), agents=1, **settings) as cluster:
        told = await _until_told(cluster, *words)
        assert "Ready=False" in told


async def test_bad_requests_and_a_bad_edit_lose_nothing(
    model_folder: Path, start_cluster: StartCluster
) -> None:
    with start_cluster(service(model_folder), agents=1) as cluster:
        await asyncio.to_thread(cluster.wait_ready, MODEL, deadline_s=90)
        async with client_of(cluster) as client:
            before = await answers(client, ["the quick brown fox"], max_tokens=8)
            with pytest.raises(openai.NotFoundError, match="nobody"):
                await client.completions.create(model="nobody", prompt="hello")
            with pytest.raises(openai.BadRequestError, match="256"):
                await client.completions.create(model=MODEL, prompt="too long " * 400)
            file = next(cluster.state.services.glob("*.yaml"))
            good = file.read_text()
            file.write_text(good + "\n  nonsense: [")
            await _until_told(cluster, file.name)
            assert await answers(client, ["the quick brown fox"], max_tokens=8) == before
            file.write_text(good)
            await asyncio.to_thread(
                lambda: cluster.wait(
                    MODEL, lambda status: "Ready=True" in _told(cluster), deadline_s=30, what="be ready again"
                )
            )
