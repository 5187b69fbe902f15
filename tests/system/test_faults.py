"""Any process may die in the middle of a scale-up: no request is lost, no token changes, the service heals."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from tests.system.conftest import MODEL, StartCluster, answers, client_of, service

from layercast_cli.local import LocalCluster
from layercast_cli.status import ReplicaStatus, ServiceStatus

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("clusters"), pytest.mark.timeout(240)]

PROMPTS = [
    f"{number} ships sail through the night and find {number * 7} islands full of birds, which "
    for number in range(1, 13)
]
MAX_TOKENS = 12
LINK_BYTES_PER_S = 3_000_000
CPU_SHARE = 0.08


def _arriving(status: ServiceStatus) -> list[ReplicaStatus]:
    return [r for r in status.replicas if 0 < r.layers_resident < r.layers_total]


def _serving(status: ServiceStatus) -> list[ReplicaStatus]:
    whole = (r for r in status.replicas if 0 < r.layers_total <= r.layers_resident)
    return [r for r in whole if r.state.lower() == "serving"]


def _victim(role: str, status: ServiceStatus) -> str:
    """The name of the process to kill, at a moment when one replica serves and others arrive."""
    source, target = _serving(status)[0], _arriving(status)[0]
    return {
        "source": f"{source.node}/worker-{source.device}",
        "target": f"{target.node}/worker-{target.device}",
        "agent of the source": source.node,
        "agent of the target": target.node,
        "operator": "operator",
    }[role]


async def _wait(cluster: LocalCluster, **arguments: object) -> ServiceStatus:
    return await asyncio.to_thread(lambda: cluster.wait(MODEL, **arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("role", "number"),
    [
        pytest.param("source", signal.SIGKILL, id="source"),
        pytest.param("target", signal.SIGKILL, id="target"),
        pytest.param("agent of the source", signal.SIGKILL, id="agent-of-the-source"),
        pytest.param("agent of the target", signal.SIGKILL, id="agent-of-the-target"),
        pytest.param("operator", signal.SIGKILL, id="operator"),
        pytest.param("source", signal.SIGSTOP, id="source-hangs"),
    ],
)
async def test_a_death_in_the_middle_of_a_scale_up(
    model_folder: Path, start_cluster: StartCluster, role: str, number: signal.Signals
) -> None:
    # Recommend: the test itself says when to scale, by spec.replicas, as `layercast scale` does.
    document = service(model_folder, scaling={"min": 1, "max": 3, "mode": "Recommend", "policy": "live"})
    with start_cluster(
        document, agents=3, link_bytes_per_s=LINK_BYTES_PER_S, cpu_share=CPU_SHARE, host_pool_bytes=0
    ) as cluster:
        await asyncio.to_thread(cluster.wait_ready, MODEL, deadline_s=90)
        async with client_of(cluster) as client:
            reference = await answers(client, PROMPTS, max_tokens=MAX_TOKENS)
            asked = [*PROMPTS, *PROMPTS, *PROMPTS]
            under_way = asyncio.create_task(answers(client, asked, max_tokens=MAX_TOKENS))
            cluster.edit(MODEL, lambda changed: changed["spec"].update(replicas=3))
            status = await _wait(
                cluster,
                reached=lambda seen: bool(_arriving(seen) and _serving(seen)),
                deadline_s=30,
                what="have a replica in the middle of its load",
            )
            victim = _victim(role, status)
            cluster.kill(victim, number)
            assert await under_way == reference * 3
            after = await _wait(
                cluster,
                reached=lambda seen: seen.serving == 3,
                deadline_s=90,
                what="reach three serving replicas again",
            )
            assert after.desired == 3
            assert await answers(client, PROMPTS, max_tokens=MAX_TOKENS) == reference


async def test_a_scale_up_that_nobody_disturbs_is_a_live_chain(
    model_folder: Path, start_cluster: StartCluster
) -> None:
    document = service(model_folder, scaling={"min": 1, "max": 3, "mode": "Recommend", "policy": "live"})
    with start_cluster(
        document, agents=3, link_bytes_per_s=LINK_BYTES_PER_S, cpu_share=CPU_SHARE, host_pool_bytes=0
    ) as cluster:
        await asyncio.to_thread(cluster.wait_ready, MODEL, deadline_s=90)
        async with client_of(cluster) as client:
            reference = await answers(client, PROMPTS, max_tokens=MAX_TOKENS)
            cluster.edit(MODEL, lambda changed: changed["spec"].update(replicas=3))
            scaled = asyncio.create_task(
                _wait(
                    cluster,
                    reached=lambda seen: seen.serving == 3,
                    deadline_s=60,
                    what="reach three replicas",
                )
            )
            while not scaled.done():  # there is work for whoever arrives, until the last of them is there
                assert await answers(client, PROMPTS * 2, max_tokens=MAX_TOKENS) == reference * 2
            status = await scaled
            assert sum(replica.handoffs_taken for replica in status.replicas) > 0
            scale = status.scales[-1]
            assert (scale.replicas_from, scale.replicas_to, scale.policy) == (1, 3, "live")
            for replica in scale.replicas:
                assert replica.complete_at is not None and replica.first_layer_at is not None
                assert scale.decided_at <= replica.first_layer_at < replica.complete_at
            sources = {replica.source for replica in scale.replicas}
            assert len(sources) == 2, "the new replicas form a chain, not a star"
            cluster.edit(MODEL, lambda changed: changed["spec"].update(replicas=1))
            under_way = asyncio.create_task(answers(client, PROMPTS * 2, max_tokens=MAX_TOKENS))
            await _wait(
                cluster,
                reached=lambda seen: seen.serving == 1 and len(seen.replicas) == 1,
                deadline_s=60,
                what="drain back to one replica",
            )
            assert await under_way == reference * 2
