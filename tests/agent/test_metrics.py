"""What a scraper and a probe see."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from layercast.agent.v1alpha1 import agent_pb2 as pb

from layercast_agent.health import WorkerLimits
from layercast_agent.metrics import MetricsServer, Observation, families, ready
from layercast_agent.node import running
from layercast_agent.settings import AgentSettings

Eventually = Callable[..., Awaitable[Any]]


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def samples_of(seen: Observation) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families(seen)
        for sample in family.samples
    }


def test_how_parameters_are_read_and_why_not_by_rdma() -> None:
    reads = pb.ParameterReads(rdma_reason="no card", rdma_missed=True, read_bytes={"rdma": 0, "tcp": 7})
    status = pb.GetStatusResponse(
        devices=[pb.Device(device_id="cpu:0", reads=reads), pb.Device(device_id="cpu:1")],
        host_pool=pb.HostPool(read_bytes={"disk": 6}),
    )
    samples = samples_of(Observation(status=status, restarts={}))
    told = {name: value for name, value in samples.items() if "rdma" in name[0] or "read_bytes" in name[0]}
    assert told == {
        ("layercast_agent_rdma", "cpu:0", "no card"): 0,
        ("layercast_agent_rdma_missed", "cpu:0"): 1,
        ("layercast_agent_parameter_read_bytes_total", "cpu:0", "rdma"): 0,
        ("layercast_agent_parameter_read_bytes_total", "cpu:0", "tcp"): 7,
        ("layercast_agent_parameter_read_bytes_total", "host", "disk"): 6,
    }


def test_an_observation_in_metrics() -> None:
    ready_one = pb.Checkpoint(state=pb.CHECKPOINT_STATE_READY, on_disk=True, digest="d", segment_bytes=[1, 2])
    status = pb.GetStatusResponse(
        devices=[
            pb.Device(device_id="cpu:0", worker_state=pb.WORKER_STATE_DEAD),
            pb.Device(device_id="cpu:1", worker_state=pb.WORKER_STATE_IDLE),
        ],
        checkpoints=[ready_one, ready_one, pb.Checkpoint(state=pb.CHECKPOINT_STATE_FAILED)],
        replicas=[
            pb.Replica(
                replica_id="r",
                device_id="cpu:1",
                transfer=pb.Transfer(done_bytes=9),
                memory=pb.MemoryPlan(parameter_bytes=70, kv_bytes=20, workspace_bytes=5),
                load=pb.ReplicaLoad(
                    kv_pages_used=3,
                    kv_pages_cached=2,
                    kv_pages_total=8,
                    prefix_tokens_asked=50,
                    prefix_tokens_hit=32,
                    preemptions=4,
                    comparisons=[pb.Comparison(what="decode", count=7, predicted_s=0.5, actual_s=0.75)],
                ),
            )
        ],
        disk_bytes_per_s=5,
    )
    samples = samples_of(Observation(status=status, restarts={"cpu:0": 3, "cpu:1": 0}))
    expected: dict[tuple[str, ...], float] = {
        ("layercast_agent_worker_restarts_total", "cpu:0"): 3,
        ("layercast_agent_workers", "dead"): 1,
        ("layercast_agent_workers", "idle"): 1,
        ("layercast_agent_workers", "warming"): 0,
        ("layercast_agent_checkpoints", "ready"): 2,
        ("layercast_agent_checkpoints", "failed"): 1,
        ("layercast_agent_checkpoints", "packing"): 0,
        ("layercast_agent_disk_checkpoint_bytes",): 3,
        ("layercast_agent_disk_bytes_per_second",): 5,
        ("layercast_agent_replica_resident_bytes", "r", "cpu:1"): 9,
        ("layercast_agent_replica_memory_bytes", "r", "cpu:1", "parameters"): 70,
        ("layercast_agent_replica_memory_bytes", "r", "cpu:1", "kv"): 20,
        ("layercast_agent_replica_memory_bytes", "r", "cpu:1", "workspace"): 5,
        ("layercast_agent_replica_kv_pages", "r", "cpu:1", "used"): 3,
        ("layercast_agent_replica_kv_pages", "r", "cpu:1", "cached"): 2,
        ("layercast_agent_replica_kv_pages", "r", "cpu:1", "total"): 8,
        ("layercast_agent_replica_prefix_tokens_total", "r", "cpu:1", "hit"): 32,
        ("layercast_agent_replica_prefix_tokens_total", "r", "cpu:1", "computed"): 18,
        ("layercast_agent_replica_preemptions_total", "r", "cpu:1"): 4,
        ("layercast_agent_replica_predicted_seconds_count", "r", "decode"): 7,
        ("layercast_agent_replica_predicted_seconds_sum", "r", "decode"): 0.5,
        ("layercast_agent_replica_actual_seconds_count", "r", "decode"): 7,
        ("layercast_agent_replica_actual_seconds_sum", "r", "decode"): 0.75,
    }
    assert expected.items() <= samples.items()
    assert ready(status)
    assert not ready(pb.GetStatusResponse(devices=[status.devices[0]]))


def test_what_left_with_requests_is_told() -> None:
    load = pb.ReplicaLoad(requests_moved=6, kv_bytes_sent=600)
    status = pb.GetStatusResponse(replicas=[pb.Replica(replica_id="r", device_id="cpu:1", load=load)])
    samples = {
        sample.name: sample.value
        for family in families(Observation(status=status, restarts={}))
        for sample in family.samples
    }
    assert samples["layercast_agent_replica_requests_moved_total"] == 6
    assert samples["layercast_agent_replica_kv_sent_bytes_total"] == 600


async def test_paths(
    settings: Callable[..., AgentSettings],
    limits: WorkerLimits,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SCRIPTED_WARM", "never")
    async with running(settings(metrics_listen="127.0.0.1:0"), limits=limits) as node:
        port = node.metrics_port
        assert await asyncio.to_thread(get, port, "/healthz") == (200, "ok\n")
        assert await asyncio.to_thread(get, port, "/readyz") == (503, "no worker is warm\n")
        assert (await asyncio.to_thread(get, port, "/other"))[0] == 404
        code, text = await asyncio.to_thread(get, port, "/metrics?x=1")
        assert code == 200
        assert 'layercast_agent_workers{state="warming"} 1.0' in text
        assert 'layercast_agent_worker_restarts_total{device="cpu:0"} 0.0' in text
        assert "process_resident_memory_bytes" in text
    monkeypatch.delenv("SCRIPTED_WARM")
    async with running(settings(metrics_listen="127.0.0.1:0"), limits=limits) as node:
        await eventually(lambda: node.agent.workers[0].state == pb.WORKER_STATE_IDLE)
        assert await asyncio.to_thread(get, node.metrics_port, "/readyz") == (200, "ok\n")


def test_an_agent_that_hangs_is_not_healthy() -> None:
    loop = asyncio.new_event_loop()  # nobody runs it
    server = MetricsServer(
        address=("127.0.0.1", 0),
        observe=lambda: Observation(status=pb.GetStatusResponse(), restarts={}),
        loop=loop,
        answer_s=0.1,
    )
    server.start()
    try:
        for path in ("/healthz", "/readyz", "/metrics"):
            assert get(server.port, path) == (503, "the agent does not answer\n")
    finally:
        server.close()
        loop.close()
