"""A service without a replica wakes up: tokens before anybody is complete, from k disks and from one host copy."""

from __future__ import annotations

import asyncio
from datetime import datetime
from pathlib import Path

import pytest
from tests.system.conftest import MODEL, StartCluster, answers, client_of, service

from layercast_cli.local import LocalCluster
from layercast_cli.status import ServiceStatus

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("clusters"), pytest.mark.timeout(240)]

PROMPTS = [f"{number} ships sail through the night and find " for number in range(1, 5)]
MAX_TOKENS = 12
DISK_BYTES_PER_S = 2_500_000  # 20 MB: eight seconds


async def _wait(cluster: LocalCluster, **arguments: object) -> ServiceStatus:
    return await asyncio.to_thread(lambda: cluster.wait(MODEL, **arguments))  # type: ignore[arg-type]


def _moments(status: ServiceStatus, name: str) -> list[datetime]:
    scaled = status.raw["lastScale"]["replicas"]
    return [datetime.fromisoformat(replica[name]) for replica in scaled if replica.get(name)]


async def wake(cluster: LocalCluster) -> ServiceStatus:
    """From one replica to none to two, with requests that wait for them; their answers do not change."""
    await asyncio.to_thread(cluster.wait_ready, MODEL, deadline_s=120)
    async with client_of(cluster) as client:
        reference = await answers(client, PROMPTS, max_tokens=MAX_TOKENS)
        cluster.edit(MODEL, lambda changed: changed["spec"].update(replicas=0))
        await _wait(
            cluster,
            reached=lambda seen: not seen.replicas and packed_everywhere(cluster),
            deadline_s=60,
            what="come to zero, packed on every disk",
        )
        cluster.edit(MODEL, lambda changed: changed["spec"].update(replicas=2))
        both = asyncio.create_task(
            _wait(
                cluster, reached=lambda seen: seen.serving == 2, deadline_s=60, what="serve with two replicas"
            )
        )
        while not both.done():  # until then there is always something to do for those that load
            assert await answers(client, PROMPTS, max_tokens=MAX_TOKENS) == reference
        return await both


def packed_everywhere(cluster: LocalCluster) -> bool:
    """Both nodes have the model on disk, each by itself."""
    assert cluster.layout is not None
    folders = [cluster.state.node(node.name) / "store" for node in cluster.layout.nodes]
    return all(list(folder.rglob("manifest.json")) for folder in folders)


async def test_two_disks_make_tokens_before_anybody_is_complete(
    model_folder: Path, start_cluster: StartCluster
) -> None:
    document = service(model_folder, scaling={"min": 0, "max": 2, "mode": "Recommend", "policy": "live"})
    with start_cluster(document, agents=2, disk_bytes_per_s=DISK_BYTES_PER_S, host_pool_bytes=0) as cluster:
        status = await wake(cluster)
    assert min(_moments(status, "firstTokenAt")) < min(_moments(status, "completeAt"))


async def test_one_host_copy_is_executed_while_it_arrives(
    model_folder: Path, start_cluster: StartCluster
) -> None:
    """Who has the copy beside it is complete first; the other shares its queue while it loads."""
    document = service(model_folder, scaling={"min": 0, "max": 2, "mode": "Recommend", "policy": "live"})
    with start_cluster(
        document, agents=2, disk_bytes_per_s=DISK_BYTES_PER_S, link_bytes_per_s=DISK_BYTES_PER_S
    ) as cluster:
        status = await wake(cluster)
    slow = max(status.raw["lastScale"]["replicas"], key=lambda replica: replica["completeAt"])
    assert datetime.fromisoformat(slow["firstLayerAt"]) < datetime.fromisoformat(slow["completeAt"])
