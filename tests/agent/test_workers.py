"""One worker's process: started, watched, restarted, killed when it hangs, ended with its agent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from layercast.agent.v1alpha1 import agent_pb2 as pb
from layercast.worker.v1alpha1 import worker_pb2

from layercast_agent.health import WorkerLimits
from layercast_agent.settings import AgentSettings, device_slots
from layercast_agent.workers import Worker

Eventually = Callable[..., Awaitable[Any]]
Settings = Callable[..., AgentSettings]


@contextlib.asynccontextmanager
async def started(
    settings: AgentSettings, limits: WorkerLimits, deaths: list[str] | None = None
) -> AsyncIterator[Worker]:
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    worker = Worker(
        slot=device_slots(settings)[0],
        settings=settings,
        limits=limits,
        on_death=lambda device_id, reason, replica: (deaths if deaths is not None else []).append(reason),
    )
    run = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        await worker.close()
        await run


async def test_warms_up_with_its_flags(
    settings: Settings, limits: WorkerLimits, eventually: Eventually
) -> None:
    chosen = settings(
        devices="cpu:2", cpu_cores=(0, 1, 2, 3), engine="generic", egress_bytes_per_s=5, reserve_bytes=7
    )
    async with started(chosen, limits) as worker:
        await eventually(lambda: worker.state == pb.WORKER_STATE_IDLE)
        assert (worker.error, worker.restarts, worker.memory_bytes) == ("", 0, 1_000_000)
        pid = worker.pid
        assert (chosen.run_dir / "worker-cpu:0.pid").read_text() == f"{pid}\n"
        said = (chosen.run_dir / "worker-cpu:0.log").read_text()
    for part in (
        "'device': 'cpu:0'",
        "'listen': '127.0.0.1:0'",
        "'cpu_cores': '0,1'",
        "'engine': 'generic'",
        "'reserve_bytes': 7",
        "'egress_bytes_per_s': 5",
        f"'parent_pid': {os.getpid()}",
        "'OMP_NUM_THREADS': '2'",
        "'CUDA_VISIBLE_DEVICES': ''",
    ):
        assert part in said
    assert not (chosen.run_dir / "worker-cpu:0.pid").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_one_that_is_idle_is_asked_seldom_until_it_gets_a_replica(
    settings: Settings, limits: WorkerLimits, eventually: Eventually
) -> None:
    async with started(settings(), replace(limits, idle_interval_s=3600)) as worker:
        await eventually(lambda: worker.state == pb.WORKER_STATE_IDLE)
        wanted = pb.StartReplicaRequest(replica_id="r", model="m", digest="d")
        await worker.assign(worker_pb2.AssignReplicaRequest(replica=wanted), deadline_s=5)
        # What happens to the replica is seen without a question of ours.
        begun = pb.StartTransferRequest(replica_id="r", transfer_id="t", generation=1)
        await worker.begin_transfer(worker_pb2.BeginTransferRequest(transfer=begun), deadline_s=5)
        await eventually(
            lambda: worker.replica is not None and worker.replica.state == pb.REPLICA_STATE_SERVING
        )


async def test_a_killed_worker_is_started_again(
    settings: Settings, limits: WorkerLimits, eventually: Eventually
) -> None:
    deaths: list[str] = []
    async with started(settings(), replace(limits, restart_delay_s=0.5), deaths) as worker:
        await eventually(lambda: worker.state == pb.WORKER_STATE_IDLE)
        first = worker.pid
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: worker.state == pb.WORKER_STATE_DEAD)
        assert (worker.pid, worker.error) == (0, "worker died: signal 9")
        await eventually(lambda: worker.state == pb.WORKER_STATE_WARMING)
        assert worker.error == "worker died: signal 9", "the reason stays visible until it is warm again"
        await eventually(lambda: worker.state == pb.WORKER_STATE_IDLE)
        assert (worker.error, worker.restarts, deaths) == ("", 1, ["worker died: signal 9"])
        assert worker.pid not in (0, first)


async def test_a_hung_worker_is_shown_then_killed(
    settings: Settings, limits: WorkerLimits, eventually: Eventually
) -> None:
    deaths: list[str] = []
    impatient = replace(limits, poll_deadline_s=0.1, silent_s=0.2, hung_s=1.0)
    async with started(settings(), impatient, deaths) as worker:
        await eventually(lambda: worker.state == pb.WORKER_STATE_IDLE)
        first = worker.pid
        os.kill(first, signal.SIGSTOP)
        await eventually(lambda: worker.state == pb.WORKER_STATE_DEAD)
        assert worker.pid == first, "silent is not hung yet"
        assert worker.error.startswith("worker has not answered for ")
        await eventually(lambda: worker.restarts == 1)
        assert deaths[0].endswith("; it was killed")
        await eventually(lambda: worker.state == pb.WORKER_STATE_IDLE)


async def test_a_slow_worker_recovers(
    settings: Settings, limits: WorkerLimits, eventually: Eventually
) -> None:
    async with started(settings(), replace(limits, poll_deadline_s=0.1, silent_s=0.2)) as worker:
        await eventually(lambda: worker.state == pb.WORKER_STATE_IDLE)
        os.kill(worker.pid, signal.SIGSTOP)
        await eventually(lambda: worker.state == pb.WORKER_STATE_DEAD)
        os.kill(worker.pid, signal.SIGCONT)
        await eventually(lambda: worker.state == pb.WORKER_STATE_IDLE)
        assert (worker.error, worker.restarts) == ("", 0)


async def test_one_that_never_gets_warm_is_replaced(
    settings: Settings, limits: WorkerLimits, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRIPTED_WARM", "never")
    deaths: list[str] = []
    async with started(settings(), replace(limits, warming_s=0.3), deaths) as worker:
        await eventually(lambda: worker.restarts >= 1)
        assert deaths[0] == "worker is not warm after 0.3 s; it was killed"


async def test_one_that_cannot_start_is_tried_again(
    settings: Settings, limits: WorkerLimits, eventually: Eventually
) -> None:
    async with started(settings(worker_command=("/nowhere/worker",)), limits) as worker:
        await eventually(lambda: worker.restarts >= 2)
        assert worker.error.startswith("worker cannot be started: ")
        assert "/nowhere/worker" in worker.error


async def test_one_that_exits_tells_its_code(
    settings: Settings, limits: WorkerLimits, eventually: Eventually
) -> None:
    deaths: list[str] = []
    async with started(settings(worker_command=("/bin/sh", "-c", "exit 7")), limits, deaths):
        await eventually(lambda: deaths)
        assert deaths[0] == "worker exited with code 7"


async def test_one_that_ignores_sigterm_is_killed(
    settings: Settings, limits: WorkerLimits, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRIPTED_SIGTERM", "ignore")
    async with started(settings(stop_grace_s=0.2), limits) as worker:
        await eventually(lambda: worker.state == pb.WORKER_STATE_IDLE)
        pid = worker.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_closing_at_once_leaves_nothing(settings: Settings, limits: WorkerLimits) -> None:
    async with started(settings(), limits):
        await asyncio.sleep(0)


async def test_a_grown_log_is_moved_aside(
    settings: Settings, limits: WorkerLimits, eventually: Eventually
) -> None:
    chosen = settings()
    chosen.run_dir.mkdir()
    log = chosen.run_dir / "worker-cpu:0.log"
    log.write_bytes(b"x" * 100)
    async with started(chosen, replace(limits, log_bytes_max=99)) as worker:
        await eventually(lambda: worker.state == pb.WORKER_STATE_IDLE)
    assert log.with_name("worker-cpu:0.log.1").read_bytes() == b"x" * 100
    assert b"x" * 100 not in log.read_bytes()
