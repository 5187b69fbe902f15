"""Parts die while requests run: no request fails, no token is wrong, and the service comes back to its size."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from tests.cluster.bed import Bed

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
Right = dict[str, str]

lab = pytest.mark.skipif(
    not os.environ.get("LAYERCAST_TEST_LAB"), reason="LAYERCAST_TEST_LAB names no script that can do this"
)


def test_the_operator_dies(served: Bed, right: Right, at: Callable[[int], Bed]) -> None:
    before = served.leader()
    with served.traffic() as traffic:
        served.kubectl("delete", "pod", before, "--force", "--grace-period=0")
        took_s = served.wait(lambda: served.leader() not in {"", before}, "another one leads", deadline_s=60)
        served.note("another operator leads", took_s)
        at(2)
        served.wait(lambda: len(traffic.answers) >= 4, "requests go on")
    assert not traffic.wrong(right)


def test_an_agent_dies(served: Bed, right: Right, at: Callable[[int], Bed]) -> None:
    """With its workers: its requests are replayed at the other replica."""
    at(2)
    node = served.status()["replicas"][0]["node"]
    with served.traffic(clients=3) as traffic:
        served.wait(lambda: len(traffic.answers) >= 1, "requests run")
        before = served.replica_ids()
        served.kubectl("delete", "pod", served.pod_on(node, "agent"), "--force", "--grace-period=0")
        served.wait(lambda: served.replica_ids() != before, "the operator saw it")
        took_s = served.wait(lambda: served.serving() == 2, "two replicas serve again", deadline_s=180)
        served.note("two replicas again after an agent's death", took_s)
    assert not traffic.wrong(right)


@lab
def test_a_node_dies(served: Bed, right: Right, at: Callable[[int], Bed]) -> None:
    """One without a gateway: connections to a dead gateway are dead for whoever holds them."""
    at(3)
    gateways = {pod["spec"]["nodeName"] for pod in served.pods("gateway")}
    victim = next(r["node"] for r in served.status()["replicas"] if r["node"] not in gateways)
    try:
        with served.traffic(clients=3, without=victim) as traffic:
            served.wait(lambda: len(traffic.answers) >= 1, "requests run")
            served.in_lab("kill-node", victim.removeprefix("node-"))
            took_s = served.wait(lambda: served.serving() == 2, "the loss is seen", deadline_s=60)
            served.note("loss of a node is seen", took_s)
            count = len(traffic.answers)
            served.wait(lambda: len(traffic.answers) >= count + 3, "requests go on")
    finally:
        served.in_lab("start-node", victim.removeprefix("node-"))
    took_s = served.wait(lambda: served.serving() == 3, "three replicas serve again", deadline_s=240)
    served.note("three replicas again after a node came back", took_s)
    assert not traffic.wrong(right)


@lab
def test_the_api_server_dies(served: Bed, right: Right, at: Callable[[int], Bed]) -> None:
    with served.traffic() as traffic:
        served.kill_api_server()
        count = len(traffic.answers)
        served.wait(lambda: len(traffic.answers) >= count + 4, "requests go on without an API server")
        served.in_lab("up", "--nodes", "3", "--fast")
        took_s = served.wait(lambda: served.leader() != "", "it answers")
        at(2)
        served.note("API server answers again", took_s)
    assert not traffic.wrong(right)
