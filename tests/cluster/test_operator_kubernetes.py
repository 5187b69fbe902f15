"""The operator against a real API server: objects in, commands to agents, statuses, events and the Lease."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from layercast.agent.v1alpha1 import agent_pb2 as pb

from layercast_operator.cluster.api import MERGE, KubeApi, log_in
from layercast_operator.crd import crd
from layercast_operator.errors import KubernetesError

CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
pytestmark = pytest.mark.processes


def _world() -> Any:
    name = "cluster_operator_world"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("operator_world.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def definition() -> Iterator[None]:
    """The CRD is there, as it is in this tree; one that was made for this goes, so that the chart brings its own."""
    path = f"{CRDS}/modelservices.layercast.dev"

    async def put(api: KubeApi) -> bool:
        made = True
        try:
            await api.call("POST", CRDS, body=crd())
        except KubernetesError as error:
            if error.code != 409:
                raise
            # Not applied: an API server without CEL refuses to apply what it stores without a word.
            await api.call("PATCH", path, body=crd(), content_type=MERGE)
            made = False
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(KubernetesError):
                    await api.call("GET", "/apis/layercast.dev/v1alpha1/modelservices")
                    return made
                await asyncio.sleep(0.1)

    async def remove(api: KubeApi) -> None:
        await api.call("DELETE", path)
        async with asyncio.timeout(20):
            with contextlib.suppress(KubernetesError):
                while await api.call("GET", path):
                    await asyncio.sleep(0.1)

    async def with_api(job: Callable[[KubeApi], Awaitable[Any]]) -> Any:
        api = KubeApi(log_in())
        try:
            return await job(api)
        finally:
            await api.close()

    made = asyncio.run(with_api(put))
    yield
    if made:
        asyncio.run(with_api(remove))


@pytest.fixture
async def world() -> AsyncIterator[Any]:
    made = _world().OperatorWorld()
    await made.start()
    try:
        yield made
    finally:
        await made.close()


async def until(holds: Callable[[], Awaitable[object]], *, within_s: float = 20.0, what: str = "") -> None:
    """Ask again until it holds, with a deadline."""
    deadline = time.monotonic() + within_s
    while not await holds():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what or holds}"
        await asyncio.sleep(0.05)


async def serving(world: Any, count: int, name: str = "m") -> None:
    async def holds() -> bool:
        world.finish()
        counts = (await world.status(name)).get("counts", {})
        return bool(counts) and (counts["serving"], counts["desired"], counts["active"]) == (count,) * 3

    await until(holds, what=f"{count} serving")


async def test_a_modelservice_is_served_scaled_through_its_subresource_and_let_go(world: Any) -> None:
    async with world.operator():
        await world.put()
        await serving(world, 1)
        assert (await world.status())["ready"] == "1/1"
        assert await world.condition("Ready") == ("True", "Serving")
        generation = (await world.get())["metadata"]["generation"]
        assert all(c["observedGeneration"] == generation for c in (await world.status())["conditions"])
        # What kubectl scale, an HPA and KEDA do.
        await world.patch("m", {"spec": {"replicas": 3}}, sub="/scale")
        await serving(world, 3)
        scale = await world.get(sub="/scale")
        assert scale["status"] == {"replicas": 3, "selector": "layercast.dev/model=m"}
        owned = (await world.get())["metadata"]["managedFields"]
        ours = [entry["fieldsV1"] for entry in owned if entry["manager"] == "layercast-operator"]
        assert ours and all(set(fields) <= {"f:status"} for fields in ours), "it writes nothing but status"
        assert {"ScaledUp"} <= set(await world.events())
        assert {r["node"] for r in (await world.status())["replicas"]} == set(world.agents)
        await world.api.call(
            "DELETE", f"/apis/layercast.dev/v1alpha1/namespaces/{world.namespace}/modelservices/m"
        )

        async def gone() -> bool:
            return not world.replicas()

        await until(gone, what="all replicas are stopped")


async def test_a_cordoned_node_is_left_when_another_serves(world: Any) -> None:
    async with world.operator():
        await world.put()
        await serving(world, 1)
        left = next(iter(world.replicas().values()))
        await world.cordon(left)

        async def moved() -> bool:
            world.finish()
            nodes = list(world.replicas().values())
            return len(nodes) == 1 and nodes[0] != left

        await until(moved, what="the replica is elsewhere")
        starts = [r for a in world.agents.values() for r in a.of(pb.StartReplicaRequest)]
        assert len(starts) == 2


async def test_a_wrong_specification_is_said_and_the_last_good_one_stays(world: Any) -> None:
    async with world.operator():
        await world.put(scaling={"min": 1, "max": 3})
        await serving(world, 1)
        # An API server that knows CEL refuses this at once.
        with contextlib.suppress(KubernetesError):
            await world.patch("m", {"spec": {"scaling": {"min": 5}}})

            async def said() -> bool:
                return bool(await world.condition("Ready") == ("False", "InvalidSpec"))

            await until(said, what="the mistake is in the status")
            assert "max" in (await world.events())["NotReady"]
        assert len(world.replicas()) == 1
        with pytest.raises(KubernetesError, match=r"spec\.model\.source"):
            await world.put("bad", model={"source": "ftp://x/y"})


async def test_recommend_reports_and_does_not_act(world: Any) -> None:
    async with world.operator():
        world.gateway.tokens["m"] = 0
        world.gateway.waiting["m"] = 0
        await world.put(scaling={"min": 1, "max": 3, "mode": "Recommend"})
        await serving(world, 1)
        world.gateway.tokens["m"], world.gateway.waiting["m"] = 1500, 6

        async def advised() -> bool:
            return bool((await world.status()).get("recommendation", {}).get("replicas") == 3)

        await until(advised, what="three are recommended")
        assert len(world.replicas()) == 1 and (await world.get())["spec"]["replicas"] == 1


async def test_two_operators_take_turns_and_the_next_takes_over_in_time(world: Any, tmp_path: Path) -> None:
    def start(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "layercast_operator", *world.flags("--identity", name)]
        with (tmp_path / f"{name}.log").open("wb") as log:
            return subprocess.Popen(command, stderr=log, env={**os.environ, "PYTHONSAFEPATH": "1"})

    async def held_by(name: str) -> bool:
        return bool(await world.holder() == name)

    await world.put()
    first = start("first")
    second = None
    try:
        await until(lambda: held_by("first"), within_s=40)
        await serving(world, 1)
        second = start("second")
        await until(lambda: contains(tmp_path / "second.log", b"waits for the Lease"), within_s=40)
        first.kill()
        first.wait(10)
        killed = time.monotonic()
        await until(lambda: held_by("second"), within_s=15)
        assert time.monotonic() - killed > 5, "it did not wait for the Lease to run out"
        await world.patch("m", {"spec": {"replicas": 2}})
        await serving(world, 2)
        first = start("first")
        await until(lambda: contains(tmp_path / "first.log", b"waits for the Lease"), within_s=40)
        second.send_signal(signal.SIGTERM)
        await until(lambda: held_by("first"), within_s=6, what="the Lease was given up")
        assert second.wait(15) == 0
        starts = [r.replica_id for a in world.agents.values() for r in a.of(pb.StartReplicaRequest)]
        assert len(starts) == len(set(starts)) == 2, "nobody asked twice"
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()
                process.wait(10)


async def contains(path: Path, text: bytes) -> bool:
    return text in await asyncio.to_thread(path.read_bytes)
