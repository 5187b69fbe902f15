"""One replica computes prompts and another decodes, through the whole service: the same texts, whoever dies."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from tests.system.conftest import MODEL, StartCluster, answers, client_of, service

from layercast_cli.local import LocalCluster
from layercast_cli.status import ReplicaStatus, ServiceStatus

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

PROMPTS = [
    f"{number} ships sail through the night and find {number * 7} islands full of birds, which "
    for number in range(1, 9)
]
MAX_TOKENS = 120


def role(status: ServiceStatus, name: str) -> list[ReplicaStatus]:
    return [r for r in status.replicas if r.role == name and r.state.lower() == "serving"]


def one_of_each(status: ServiceStatus) -> bool:
    return bool(role(status, "Prefill") and role(status, "Decode"))


async def wait(cluster: LocalCluster, **arguments: object) -> ServiceStatus:
    return await asyncio.to_thread(lambda: cluster.wait(MODEL, **arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("victim", ["Prefill", "Decode"])
async def test_texts_are_those_of_one_replica_whoever_dies(
    model_folder: Path, start_cluster: StartCluster, victim: str
) -> None:
    with start_cluster(service(model_folder), agents=2) as cluster:
        await asyncio.to_thread(cluster.wait_ready, MODEL, deadline_s=90)
        async with client_of(cluster) as client:
            reference = await answers(client, PROMPTS, max_tokens=MAX_TOKENS)
            cluster.edit(MODEL, lambda changed: changed["spec"].update(replicas=2, disaggregation={}))
            await wait(cluster, reached=one_of_each, deadline_s=60, what="have a replica of each role")
            assert await answers(client, PROMPTS, max_tokens=MAX_TOKENS) == reference
            status = await wait(
                cluster,
                reached=lambda seen: any(r.requests_moved for r in seen.replicas),
                deadline_s=30,
                what="tell that its requests moved",
            )
            assert all(r.requests_moved == 0 for r in role(status, "Decode"))
            under_way = asyncio.create_task(answers(client, PROMPTS * 3, max_tokens=MAX_TOKENS))
            await wait(
                cluster,
                reached=lambda seen: sum(r.requests_running + r.requests_waiting for r in seen.replicas) > 0,
                deadline_s=30,
                what="have requests under way",
            )
            place = role(status, victim)[0]
            cluster.kill(f"{place.node}/worker-{place.device}", signal.SIGKILL)
            assert await under_way == reference * 3
            await wait(cluster, reached=one_of_each, deadline_s=90, what="have one of each role again")
            assert await answers(client, PROMPTS, max_tokens=MAX_TOKENS) == reference
