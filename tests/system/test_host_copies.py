"""The pool invariant with real processes: the machine that holds the only host copy dies, and the copy comes back."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tests.system.conftest import MODEL, StartCluster, answers, client_of, service

from layercast_cli.local import LocalCluster
from layercast_cli.status import ServiceStatus

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("clusters"), pytest.mark.timeout(240)]

PROMPTS = [
    f"{number} ships sail through the night and find {number * 7} islands, which " for number in range(8)
]
MAX_TOKENS = 12
DISK_BYTES_PER_S = 10_000_000
"""Slower than a link: what is in memory somewhere is read from there."""


def copies(status: ServiceStatus) -> list[str]:
    """Nodes with a complete copy in host memory."""
    return [copy.node for copy in status.host_copies if copy.complete]


def is_safe(status: ServiceStatus) -> bool:
    """One host copy, on another machine than the replica: no single death takes both."""
    return len(copies(status)) == 1 and copies(status)[0] not in {r.node for r in status.replicas}


async def wait(cluster: LocalCluster, **arguments: Any) -> ServiceStatus:
    return await asyncio.to_thread(lambda: cluster.wait(MODEL, **{"deadline_s": 60, **arguments}))


async def test_a_host_copy_that_was_lost_comes_back_on_another_node(
    model_folder: Path, start_cluster: StartCluster
) -> None:
    with start_cluster(service(model_folder), agents=3, disk_bytes_per_s=DISK_BYTES_PER_S) as cluster:
        await asyncio.to_thread(cluster.wait_ready, MODEL, deadline_s=90)
        status = await wait(cluster, reached=is_safe, what="keep a host copy away from the replica")
        (keeper,) = copies(status)
        async with client_of(cluster) as client:
            reference = await answers(client, PROMPTS, max_tokens=MAX_TOKENS)

            # A device still has the parameters: they come from there.
            under_way = asyncio.create_task(answers(client, PROMPTS * 3, max_tokens=MAX_TOKENS))
            again = await killed_and_back(cluster, keeper, "from a device")
            assert await under_way == reference * 3

            # Down to zero: the last device copy goes, the host copy is all that is left in memory.
            cluster.edit(MODEL, lambda changed: changed["spec"].update(replicas=0))
            status = await wait(cluster, reached=lambda seen: not seen.replicas, what="scale to zero")
            assert copies(status) == [again]
            last = await killed_and_back(cluster, again, "from a disk")

            # From zero the replica is fed from host memory, and says what the first one said.
            cluster.edit(MODEL, lambda changed: changed["spec"].update(replicas=1))
            status = await wait(cluster, reached=lambda seen: seen.serving == 1, what="serve again")
            assert await answers(client, PROMPTS, max_tokens=MAX_TOKENS) == reference
            assert status.scales[-1].replicas[0].source == last


async def killed_and_back(cluster: LocalCluster, keeper: str, how: str) -> str:
    """Kills the agent of a node and waits for its host copy on another; returns which."""
    began = time.monotonic()
    cluster.kill(keeper, signal.SIGKILL)
    status = await wait(
        cluster,
        reached=lambda seen: is_safe(seen) and keeper not in copies(seen),
        what=f"have a host copy elsewhere than on {keeper}",
    )
    print(f"the host copy of {keeper} came back {how} in {time.monotonic() - began:.1f} s")
    (found,) = copies(status)
    return found


@pytest.mark.parametrize("policy", ["host-cache", "ttl-cache"])
async def test_with_a_cache_every_replica_loads_from_its_own_node(
    model_folder: Path, start_cluster: StartCluster, policy: str
) -> None:
    document = service(model_folder, scaling={"min": 1, "max": 2, "mode": "Recommend", "policy": policy})
    with start_cluster(document, agents=2) as cluster:
        await asyncio.to_thread(cluster.wait_ready, MODEL, deadline_s=90)
        async with client_of(cluster) as client:
            reference = await answers(client, PROMPTS, max_tokens=MAX_TOKENS)
            cluster.edit(MODEL, lambda changed: changed["spec"].update(replicas=2))
            status = await wait(
                cluster,
                reached=lambda seen: seen.serving == 2 and len(copies(seen)) == 2,
                what="have two replicas, each beside its copy",
            )
            for replica in status.replicas:
                assert replica.source in ("disk", replica.node)
            assert await answers(client, PROMPTS, max_tokens=MAX_TOKENS) == reference
