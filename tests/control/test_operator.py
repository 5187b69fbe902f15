"""The whole operator against scripted agents and a scripted gateway, on the real wire of loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from layercast.agent.v1alpha1 import agent_pb2 as pb

from layercast_operator.__main__ import Process, build
from layercast_operator.cluster.local import LocalCluster
from layercast_operator.metrics import serve_metrics
from layercast_operator.modelservice import ScalePolicy
from layercast_operator.routes import serve_routes
from layercast_operator.settings import Address, Settings

Eventually = Callable[..., Awaitable[None]]


class Cluster:
    """An operator on a folder, three agents, one gateway."""

    def __init__(self, root: Path, wire: Any) -> None:
        self.root, self.wire = root, wire
        self.agents = {f"node-{i}": wire.ScriptedAgent(f"node-{i}") for i in range(3)}
        self.gateway = wire.ScriptedGateway()
        self.metrics_address = ""
        self._stack = contextlib.AsyncExitStack()

    async def start(self) -> None:
        for agent in self.agents.values():
            await agent.start()
        await self.gateway.start()
        self.tell_cluster()
        await self.start_operator()

    def tell_cluster(self) -> None:
        agents = {name: agent.address for name, agent in self.agents.items()}
        cluster = {"agents": agents, "gateways": [self.gateway.address]}
        self.wire.write(self.root / "cluster.json", json.dumps(cluster))

    async def start_operator(self, policy: ScalePolicy | None = None) -> None:
        settings = Settings(
            local_dir=self.root,
            listen=Address(host="127.0.0.1", port=0),
            metrics_listen=Address(host="127.0.0.1", port=0),
            policy=policy,
            tick_s=0.03,
            agent_deadline_s=0.5,
            agent_lost_after_s=0.4,
            demand_age_max_s=1.0,
            tls_dir=None,
            prometheus_url="",
            prometheus_every_s=0.1,
            prometheus_token_file=None,
            log_format="text",
        )
        process = Process(settings=settings, stop=asyncio.Event())
        self.reconciler, calls = build(process, LocalCluster(self.root, clock=process.clock))
        runner, metrics_port = await serve_metrics(
            self.reconciler.metrics,
            host="127.0.0.1",
            port=0,
            alive=self.reconciler.alive,
            ready=self.reconciler.ready,
        )
        self.metrics_address = f"127.0.0.1:{metrics_port}"
        server, port = await serve_routes(self.reconciler.routes, host="127.0.0.1", port=0)
        stop = asyncio.Event()
        loop = asyncio.create_task(self.reconciler.run(stop))
        watch = asyncio.create_task(self.gateway.watch(f"127.0.0.1:{port}"))

        async def end() -> None:
            stop.set()
            self.reconciler.wake.set()
            await loop
            await self.reconciler.executor.close()
            await self.reconciler.observer.close()
            await calls.close()
            await self.reconciler.routes.close()
            await server.stop(0.2)
            await runner.cleanup()
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

        self._stack.push_async_callback(end)

    async def stop_operator(self) -> None:
        await self._stack.aclose()

    async def stop(self) -> None:
        await self._stack.aclose()
        for agent in self.agents.values():
            await agent.stop()
        await self.gateway.stop()

    def service(self, name: str = "m", **spec: Any) -> None:
        path = self.root / "modelservices" / f"{name}.yaml"
        self.wire.write(path, self.wire.modelservice(name, **spec))

    def status(self, name: str = "m") -> Any:
        try:
            return json.loads((self.root / "status" / f"{name}.json").read_text())
        except FileNotFoundError:
            return None

    def condition(self, kind: str, name: str = "m") -> tuple[str, str, str]:
        for condition in (self.status(name) or {}).get("conditions", ()):
            if condition["type"] == kind:
                return condition["status"], condition["reason"], condition["message"]
        return "", "", ""

    def counts(self, name: str = "m") -> dict[str, int]:
        counts = dict((self.status(name) or {}).get("counts", {}))
        if counts:
            assert counts.pop("active") == counts["serving"] + counts["loading"]
        return counts

    def finish(self) -> None:
        for agent in self.agents.values():
            agent.finish()

    def all_of(self, kind: type) -> list[Any]:
        return [request for agent in self.agents.values() for request in agent.of(kind)]

    async def metrics(self) -> str:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://{self.metrics_address}/metrics") as answer,
        ):
            return await answer.text()


@pytest.fixture
async def cluster(tmp_path: Path, wire: Any) -> AsyncIterator[Cluster]:
    (tmp_path / "modelservices").mkdir()
    made = Cluster(tmp_path, wire)
    await made.start()
    yield made
    await made.stop()


async def serving(cluster: Cluster, eventually: Eventually, count: int, name: str = "m") -> None:
    """Until `count` replicas serve; loads finish as soon as they are fed."""

    def there() -> bool:
        for agent in cluster.agents.values():
            if any(r.HasField("transfer") for r in agent.replicas.values()):
                agent.finish()
        return cluster.counts(name).get("serving") == count and not cluster.counts(name).get("loading")

    await eventually(there, what=f"{count} serving")


async def test_a_service_from_its_file_to_live_growth_and_back(
    cluster: Cluster, eventually: Eventually
) -> None:
    bounds = {"min": 1, "max": 3, "windows": {"scaleDownSeconds": 0.3}}
    cluster.service(scaling=bounds, drain={"graceSeconds": 3})
    await eventually(lambda: cluster.all_of(pb.StartTransferRequest))
    (first,) = cluster.all_of(pb.StartTransferRequest)
    source = first.replica_id
    assert cluster.gateway.routes("m") in ({}, {source: "LOADING"})
    assert first.upstreams[0].local_disk and list(first.segment_order) == [0, 3, 1, 2]
    await serving(cluster, eventually, 1)
    await eventually(lambda: cluster.gateway.routes("m") == {source: "SERVING"})
    route = cluster.gateway.tables[-1].models[0]
    assert (route.digest, route.context_length_max, route.message) == ("d" * 64, 4096, "")
    assert route.endpoints[0].address == "node-0.test:1"

    cluster.gateway.tokens["m"], cluster.gateway.waiting["m"] = 1500.0, 5.0
    await eventually(lambda: len(cluster.all_of(pb.StartTransferRequest)) == 3)
    await eventually(lambda: sorted(cluster.gateway.routes("m").values()) == ["LIVE", "LIVE", "SERVING"])
    transfers = {t.replica_id: t for t in cluster.all_of(pb.StartTransferRequest)[1:]}
    parents = {name: t.upstreams[0].peer.peer_id for name, t in transfers.items()}
    head = next(name for name, parent in parents.items() if parent == source)
    tail = next(name for name in transfers if name != head)
    assert parents == {head: source, tail: head}, "one chain"
    for transfer in transfers.values():
        assert transfer.live_source.peer_id == source
        assert transfer.live_source.address == "node-0.test:1"
        assert list(transfer.segment_order) == [1, 2, 0, 3]
    await serving(cluster, eventually, 3)
    scale = cluster.status()["lastScale"]
    assert (scale["from"], scale["to"], scale["rule"], scale["policy"]) == (1, 3, "queue", "live")
    assert all(r["completeAt"] >= r["assignedAt"] >= scale["decidedAt"] for r in scale["replicas"])

    cluster.gateway.tokens["m"], cluster.gateway.waiting["m"] = 0.0, 0.0
    await eventually(lambda: cluster.counts() == {"desired": 1, "serving": 1, "loading": 0, "draining": 0})
    drains = cluster.all_of(pb.DrainReplicaRequest)
    assert {d.grace_ms for d in drains} == {3000}
    assert {d.replica_id for d in drains} == {head, tail}
    assert len(cluster.all_of(pb.StartReplicaRequest)) == 3, "nothing was started twice"
    assert len(cluster.all_of(pb.StartTransferRequest)) == 3
    await eventually(lambda: cluster.condition("Ready")[:2] == ("True", "Serving"))

    text = await cluster.metrics()
    assert 'layercast_operator_decisions_total{model="m",rule="queue"} 1.0' in text
    assert 'layercast_operator_replicas{model="m",state="serving"} 1.0' in text
    assert 'layercast_operator_actions_total{code="OK",kind="StartReplica"} 3.0' in text


async def test_a_node_that_dies_is_replaced_and_its_return_is_welcome(
    cluster: Cluster, eventually: Eventually
) -> None:
    cluster.service(replicas=2)
    await serving(cluster, eventually, 2)
    dead = next(name for name, agent in cluster.agents.items() if agent.replicas and name != "node-0")
    port = int(cluster.agents[dead].address.rpartition(":")[2])
    (lost,) = cluster.agents[dead].replicas
    await cluster.agents[dead].stop()
    await eventually(lambda: len(cluster.all_of(pb.StartReplicaRequest)) == 3)
    await serving(cluster, eventually, 2)
    assert lost not in cluster.gateway.routes("m")
    assert cluster.status()["lastScale"]["rule"] == "repair"
    # It comes back with its replica still serving: one too many, so the emptiest goes.
    await cluster.agents[dead].start(port)
    await eventually(lambda: cluster.all_of(pb.DrainReplicaRequest))
    await eventually(lambda: sum(len(agent.replicas) for agent in cluster.agents.values()) == 2)
    await serving(cluster, eventually, 2)


async def test_an_agent_that_moves_is_found_at_its_new_address(
    cluster: Cluster, eventually: Eventually
) -> None:
    cluster.service(replicas=2)
    await serving(cluster, eventually, 2)
    moved = next(name for name, agent in cluster.agents.items() if agent.replicas and name != "node-0")
    await cluster.agents[moved].stop()
    await cluster.agents[moved].start()
    cluster.tell_cluster()
    cluster.service(replicas=0, scaling={"min": 0, "max": 3})
    await eventually(lambda: cluster.counts() == {"desired": 0, "serving": 0, "loading": 0, "draining": 0})
    assert cluster.agents[moved].of(pb.StopReplicaRequest)
    assert len(cluster.all_of(pb.StartReplicaRequest)) == 2


async def test_a_restarted_operator_finds_everything_and_repeats_nothing(
    cluster: Cluster, eventually: Eventually
) -> None:
    cluster.service(replicas=3)
    await serving(cluster, eventually, 3)
    before = cluster.status()
    requests = sum(len(agent.requests) for agent in cluster.agents.values())
    tables = len(cluster.gateway.tables)
    await cluster.stop_operator()
    await cluster.start_operator()
    await eventually(lambda: len(cluster.gateway.tables) > tables)
    # The first table that it tells is complete.
    assert len(cluster.gateway.routes("m")) == 3
    await eventually(cluster.reconciler.ready)
    passes = [cluster.reconciler._passed_at]
    await eventually(lambda: cluster.reconciler._passed_at != passes[0])
    assert sum(len(agent.requests) for agent in cluster.agents.values()) == requests
    assert cluster.status()["scales"] == before["scales"]


async def test_a_broken_file_changes_nothing_and_is_said(cluster: Cluster, eventually: Eventually) -> None:
    cluster.service()
    cluster.service("other")
    await serving(cluster, eventually, 1)
    await serving(cluster, eventually, 1, "other")
    cluster.wire.write(cluster.root / "modelservices/m.yaml", "spec: {replicas: [")
    await eventually(lambda: cluster.condition("Ready")[1] == "InvalidSpec")
    assert "m.yaml" in cluster.condition("Ready")[2]
    cluster.wire.write(cluster.root / "modelservices/new.yaml", "kind: Deployment")
    await eventually(lambda: cluster.condition("Ready", "new")[1] == "InvalidSpec")
    assert cluster.counts()["serving"] == 1 and cluster.counts("other")["serving"] == 1
    assert cluster.all_of(pb.DrainReplicaRequest) == []
    (cluster.root / "modelservices/new.yaml").unlink()
    await eventually(lambda: cluster.status("new") is None)


async def test_a_deleted_service_is_drained_stopped_and_forgotten(
    cluster: Cluster, eventually: Eventually
) -> None:
    cluster.service()
    cluster.service("other")
    await serving(cluster, eventually, 1)
    await serving(cluster, eventually, 1, "other")
    (cluster.root / "modelservices/m.yaml").unlink()
    await eventually(lambda: cluster.status() is None)
    assert cluster.all_of(pb.DrainReplicaRequest) and cluster.all_of(pb.StopReplicaRequest)
    await eventually(lambda: [m.model for m in cluster.gateway.tables[-1].models] == ["other"])
    assert 'model="m",state' not in await cluster.metrics()


async def test_what_agents_refuse_is_told_and_tried_elsewhere(
    cluster: Cluster, eventually: Eventually
) -> None:
    too_small = (grpc.StatusCode.FAILED_PRECONDITION, "parameters take 9 GB, the device has 8 GB")
    cluster.agents["node-0"].refuse["StartReplicaRequest"] = too_small
    cluster.service()
    await serving(cluster, eventually, 1)
    assert not cluster.agents["node-0"].replicas
    ids = [r.replica_id for r in cluster.all_of(pb.StartReplicaRequest)]
    assert len(ids) == len(set(ids))
    for agent in cluster.agents.values():
        agent.refuse["PrepareCheckpointRequest"] = (
            grpc.StatusCode.INVALID_ARGUMENT,
            "s4:// is not a scheme",
        )
    cluster.service("bad")
    await eventually(lambda: cluster.condition("ModelResolved", "bad")[1] == "Refused")
    assert "s4:// is not a scheme" in cluster.condition("ModelResolved", "bad")[2]
    await eventually(
        lambda: any(m.model == "bad" and "s4" in m.message for m in cluster.gateway.tables[-1].models)
    )
    bad = [r for r in cluster.all_of(pb.PrepareCheckpointRequest) if r.key.startswith("file:///models/bad")]
    assert len(bad) == 1, "a refusal is not asked for again and again"


async def test_a_gateway_that_is_away_holds_everything(cluster: Cluster, eventually: Eventually) -> None:
    cluster.service(replicas=2, scaling={"min": 1, "max": 3, "windows": {"scaleDownSeconds": 0.1}})
    await cluster.gateway.stop()
    await serving(cluster, eventually, 2)
    await eventually(lambda: cluster.condition("MetricsAvailable")[1] == "NoMetrics")
    assert cluster.condition("ScalingLimited")[:2] == ("Unknown", "DemandUnknown")
    assert cluster.counts()["desired"] == 2
    assert cluster.all_of(pb.DrainReplicaRequest) == []
    assert "layercast_operator_scrape_failures_total" in await cluster.metrics()


async def test_the_policy_flag_overrides_the_file(cluster: Cluster, eventually: Eventually) -> None:
    await cluster.stop_operator()
    await cluster.start_operator(ScalePolicy.STOP_THE_WORLD)
    cluster.service(replicas=1, scaling={"min": 1, "max": 3, "policy": "live"})
    await serving(cluster, eventually, 1)
    cluster.gateway.tokens["m"], cluster.gateway.waiting["m"] = 800.0, 5.0
    await eventually(lambda: len(cluster.all_of(pb.StartTransferRequest)) == 3 or cluster.counts()["loading"])
    await eventually(lambda: len(cluster.all_of(pb.StartTransferRequest)) >= 2)
    assert not any(t.HasField("live_source") for t in cluster.all_of(pb.StartTransferRequest))
    assert cluster.status()["lastScale"]["policy"] == "stop-the-world"


async def test_health(cluster: Cluster, eventually: Eventually) -> None:
    await eventually(cluster.reconciler.ready)
    async with aiohttp.ClientSession() as session:
        for path in ("healthz", "readyz"):
            async with session.get(f"http://{cluster.metrics_address}/{path}") as answer:
                assert answer.status == 200


async def test_agents_are_told_once_which_checkpoints_are_wanted(
    cluster: Cluster, eventually: Eventually
) -> None:
    """And again after each change; one of an earlier version, which knows no such call, is not asked for ever."""
    agents = list(cluster.agents.values())
    agents[0].old = True
    cluster.service("m")
    await eventually(lambda: all(any(agent.kept[-1:]) for agent in agents))
    only = agents[0].kept[-1]
    cluster.service("n")
    await eventually(lambda: all(len(agent.kept[-1]) == 2 for agent in agents))
    told = [len(agent.kept) for agent in agents]
    (cluster.root / "modelservices" / "n.yaml").unlink()
    await eventually(lambda: all(agent.kept[-1] == only for agent in agents))
    assert [len(agent.kept) for agent in agents] == [count + 1 for count in told]
