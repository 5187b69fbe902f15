"""What people and clusters do to a service that works: bounds, deletion, pods that go, nodes that are emptied."""

from __future__ import annotations

import json
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from tests.cluster.bed import PROMPTS, SERVICE, Bed
from tests.cluster.conftest import EXACT

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
Right = dict[str, str]


def test_bounds_are_edited(served: Bed, right: Right, at: Callable[[int], Bed]) -> None:
    with served.traffic() as traffic:
        for bounds, wanted in ((2, 2), (1, 1)):
            served.patch({"scaling": {"min": bounds, "max": bounds}})
            took_s = served.wait(partial(served.settled, wanted), f"{wanted} serve")
            served.note(f"{wanted} replicas after min and max were edited, under load", took_s)
        served.wait(lambda: len(traffic.answers) >= 4, "requests go on")
    assert not traffic.wrong(right)


def test_requests_that_run_outlive_their_modelservice(served: Bed, right: Right) -> None:
    name = "leaving"
    model = {**served.get("modelservice", SERVICE)["spec"]["model"], **EXACT["model"]}
    body = {"apiVersion": "layercast.dev/v1alpha1", "kind": "ModelService", "metadata": {"name": name}}
    served.kubectl("create", "-f", "-", given=json.dumps({**body, "spec": {**EXACT, "model": model}}))
    served.wait(lambda: served.serving(name) == 1, "it serves")
    long = served.ask(PROMPTS[0], max_tokens=48)
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(served.ask, PROMPTS[0], model=name, max_tokens=48) for _ in range(3)]
        served.wait(
            lambda: served.status(name)["replicas"][0]["requestsRunning"] >= len(running), "all of them run"
        )
        served.kubectl("delete", "modelservice", name, "--timeout=60s")
        assert [each.result(120) for each in running] == [long] * len(running)
    took_s = served.wait(lambda: name not in served.models(), "gateways forget it")
    served.note("a deleted ModelService is gone from the gateways, after its last request", took_s)


def test_a_gateway_pod_is_deleted(served: Bed, right: Right, at: Callable[[int], Bed]) -> None:
    pods = [str(pod["metadata"]["name"]) for pod in served.pods("gateway")]
    with served.traffic(clients=3) as traffic:
        served.wait(lambda: len(traffic.answers) >= 1, "requests run")
        began = time.monotonic()
        served.kubectl("delete", "pod", pods[0], "--wait=false")
        served.wait(
            lambda: len(served.ready_pods("gateway") - {pods[0]}) == len(pods), "another one is ready"
        )
        served.note("as many ready gateways again after one was deleted", time.monotonic() - began)
        served.wait(lambda: pods[0] not in served.running_pods("gateway"), "it has ended")
        served.note("a deleted gateway has drained and ended", time.monotonic() - began)
        count = len(traffic.answers)
        served.wait(lambda: len(traffic.answers) >= count + 3, "requests go on")
    assert not traffic.wrong(right)


def test_an_agent_pod_is_deleted_and_hands_its_replica_over(
    served: Bed, right: Right, at: Callable[[int], Bed]
) -> None:
    """The only replica: another one serves before the pod ends."""
    at(1)
    (replica,) = served.status()["replicas"]
    pod = served.pod_on(replica["node"], "agent")
    with served.traffic(clients=3) as traffic:
        served.wait(lambda: len(traffic.answers) >= 1, "requests run")
        began = time.monotonic()
        served.kubectl("delete", "pod", pod, "--wait=false")
        served.wait(
            lambda: served.serving() == 1 and replica["replicaId"] not in served.replica_ids(),
            "the replica is elsewhere",
        )
        served.note("the replica of an agent that ends serves elsewhere", time.monotonic() - began)
        served.wait(lambda: pod not in served.running_pods("agent"), "the pod has ended")
        served.note("the agent's pod has ended", time.monotonic() - began)
        count = len(traffic.answers)
        served.wait(lambda: len(traffic.answers) >= count + 3, "requests go on")
    assert not traffic.wrong(right)
    served.wait(lambda: len(served.ready_pods("agent")) == 3, "the node's next agent is ready")


def test_a_node_is_drained(served: Bed, right: Right, at: Callable[[int], Bed]) -> None:
    """`kubectl drain` under load: replicas, gateways and operators leave the node, and nobody notices."""
    at(2)
    node = served.status()["replicas"][0]["node"]
    try:
        with served.traffic(clients=3) as traffic:
            served.wait(lambda: len(traffic.answers) >= 1, "requests run")
            began = time.monotonic()
            # Ours only: the test cluster's DNS, where it is there, ignores SIGTERM and takes its 30 s of grace.
            ours = "--pod-selector=app.kubernetes.io/name=layercast"
            served.kubectl("drain", node, ours, "--ignore-daemonsets", "--delete-emptydir-data", "--force")
            served.note("kubectl drain of a node with a replica", time.monotonic() - began)
            served.wait(
                lambda: (
                    served.serving() == 2
                    and node not in {replica["node"] for replica in served.status()["replicas"]}
                ),
                "two replicas serve on other nodes",
            )
            served.note("two replicas on the other nodes after a drain began", time.monotonic() - began)
            count = len(traffic.answers)
            served.wait(lambda: len(traffic.answers) >= count + 3, "requests go on")
    finally:
        served.kubectl("uncordon", node)
    assert not traffic.wrong(right)


def test_commands_follow_their_signal(served: Bed, at: Callable[[int], Bed]) -> None:
    """From an edit, and from a request that finds no replica, to the operator's first command to an agent."""
    at(1)
    edits = []
    for replicas in (2, 1) * 3:
        signal_at = served.edit({"replicas": replicas})
        edits.append(served.first_command_at(signal_at) - signal_at)
        served.wait(partial(served.settled, replicas), f"{replicas} serve")
    served.patch({"scaling": {"min": 0, "max": 1, "windows": {"scaleDownSeconds": 1}}})
    requests = []
    for _ in range(3):
        served.wait(lambda: not served.replica_ids(), "it is at zero")
        asking = threading.Thread(target=_send, args=(_one_token(served),))
        signal_at = time.time()
        asking.start()
        requests.append(served.first_command_at(signal_at) - signal_at)
        asking.join(60)
    for what, found in (("an edit", edits), ("a request at zero", requests)):
        served.note(f"from {what} to the first command, p50 of {len(found)}", statistics.median(found))
        served.note(f"from {what} to the first command, longest", max(found))


def _send(request: urllib.request.Request) -> None:
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.read()


def _one_token(served: Bed) -> urllib.request.Request:
    """A request that is ready to be sent: making a client takes longer than what is measured."""
    body = json.dumps({"model": SERVICE, "prompt": PROMPTS[0], "max_tokens": 1}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {served.key}"}
    return urllib.request.Request(f"{served.url()}/v1/completions", data=body, headers=headers)
