"""The agent as a process: what it says when it cannot start, how it ends, and what ends with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from layercast.agent.v1alpha1 import agent_pb2 as pb
from layercast.agent.v1alpha1 import agent_pb2_grpc
from layercast.peer.v1alpha1 import peer_pb2

from layercast_cli.ports import free_ports

pytestmark = pytest.mark.processes

Eventually = Callable[..., Awaitable[Any]]
SCRIPTED_WORKER = shlex.join([sys.executable, str(Path(__file__).parent / "scripted_worker.py")])


def free_port() -> int:
    with free_ports("127.0.0.1", 1) as [port]:
        return port


def flags(tmp_path: Path, **changes: object) -> list[str]:
    (tmp_path / "token").write_text("secret")
    values: dict[str, object] = {
        "node": "node-0",
        "listen": f"127.0.0.1:{free_port()}",
        "data_listen": "127.0.0.1:0",
        "store_dir": tmp_path / "store",
        "run_dir": tmp_path / "run",
        "devices": "cpu:2",
        "device_memory_bytes": 1_000_000,
        "token_file": tmp_path / "token",
        "worker_command": SCRIPTED_WORKER,
        **changes,
    }
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


@dataclass(slots=True, kw_only=True)
class Process:
    """A running agent process and its wire."""

    process: subprocess.Popen[str]
    stub: agent_pb2_grpc.AgentServiceAsyncStub

    async def status(self) -> pb.GetStatusResponse:
        return await self.stub.GetStatus(pb.GetStatusRequest(), timeout=5)

    async def workers(self) -> list[int]:
        """Process ids once all workers are warm, else nothing."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            devices = (await self.status()).devices
            if all(device.worker_state == pb.WORKER_STATE_IDLE for device in devices):
                return [device.worker_pid for device in devices]
        return []


def spawn(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "layercast_agent", *arguments], stderr=subprocess.PIPE, text=True
    )


@contextlib.asynccontextmanager
async def agent_process(arguments: list[str]) -> AsyncIterator[Process]:
    listen = next(a.partition("=")[2] for a in arguments if a.startswith("--listen="))
    process = spawn(arguments)
    try:
        async with grpc.aio.insecure_channel(
            listen,
            options=[("grpc.max_reconnect_backoff_ms", 100), ("grpc.initial_reconnect_backoff_ms", 50)],
        ) as channel:
            yield Process(process=process, stub=agent_pb2_grpc.AgentServiceStub(channel))
    finally:
        process.kill()
        process.communicate(timeout=10)


@contextlib.contextmanager
def watching(pids: list[int]) -> Iterator[Callable[[], list[int]]]:
    """Gives a function that tells which of the processes have ended; waits up to ten seconds for all."""
    files = [os.pidfd_open(pid) for pid in pids]

    def ended() -> list[int]:
        return [pid for pid, file in zip(pids, files, strict=True) if select.select([file], [], [], 10)[0]]

    try:
        yield ended
    finally:
        for file in files:
            os.close(file)


async def test_workers_end_with_a_killed_agent_and_the_next_one_starts(
    tmp_path: Path, eventually: Eventually
) -> None:
    arguments = flags(tmp_path)
    async with agent_process(arguments) as agent:
        pids = await eventually(agent.workers, within_s=30)
        first = (await agent.status()).instance_id
        with watching(pids) as ended:
            agent.process.kill()
            assert await asyncio.to_thread(ended) == pids
    async with agent_process(arguments) as agent:
        assert not set(pids) & set(await eventually(agent.workers, within_s=30))
        assert (await agent.status()).instance_id != first


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_ends_cleanly_when_asked(
    tmp_path: Path, eventually: Eventually, number: signal.Signals
) -> None:
    async with agent_process(flags(tmp_path, log_format="json")) as agent:
        pids = await eventually(agent.workers, within_s=30)
        with watching(pids) as ended:
            agent.process.send_signal(number)
            _, said = await asyncio.to_thread(agent.process.communicate, timeout=15)
            assert agent.process.returncode == 0, said
            assert ended() == pids
    assert '"message": "the agent serves"' in said
    assert "Traceback" not in said
    assert not list((tmp_path / "run").glob("*.pid"))


async def test_prepares_assigns_and_feeds_from_disk(
    tmp_path: Path, eventually: Eventually, tiny_model: Path
) -> None:
    async with agent_process(flags(tmp_path)) as agent:
        await eventually(agent.workers, within_s=30)
        prepare = pb.PrepareCheckpointRequest(key="k", source=f"file://{tiny_model}")
        await agent.stub.PrepareCheckpoint(prepare)

        async def digest() -> str:
            return (await agent.status()).checkpoints[0].digest

        packed = await eventually(digest)
        start = pb.StartReplicaRequest(replica_id="r-1", model="m", digest=packed, device_id="cpu:1")
        assert (await agent.stub.StartReplica(start)).device_id == "cpu:1"
        disk, peer = pb.Upstream(local_disk=True), pb.Upstream(peer=peer_pb2.Peer(peer_id="p"))
        transfer = pb.StartTransferRequest(
            replica_id="r-1", transfer_id="t", generation=1, upstreams=[disk, peer]
        )
        await agent.stub.StartTransfer(transfer)
        (replica,) = (await agent.status()).replicas
        assert replica.state == pb.REPLICA_STATE_SERVING
        assert list(replica.transfer.failures) == [str(tmp_path / "store" / packed)]

        os.kill((await agent.status()).devices[1].worker_pid, signal.SIGKILL)

        async def error() -> str:
            return (await agent.status()).replicas[0].error

        assert await eventually(error) == "worker died: signal 9"
        await agent.stub.StopReplica(pb.StopReplicaRequest(replica_id="r-1"))
        assert list((await agent.status()).replicas) == []


def refused(arguments: list[str]) -> str:
    """What an agent says that ends with code 2."""
    done = subprocess.run(
        [sys.executable, "-m", "layercast_agent", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    return line.removeprefix("layercast-agent: ")


def test_wrong_settings_end_with_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for flag in ("listen", "data_listen", "metrics_listen"):
            said = refused(flags(tmp_path, **{flag: address}))
            assert said == f"--{flag.replace('_', '-')} {address}: the port is in use."
    missing = tmp_path / "no-token"
    assert refused(flags(tmp_path, token_file=missing)) == (
        f"--token-file {missing}: cannot be read: No such file or directory."
    )
    assert refused(flags(tmp_path, token_file="/dev/null")) == "--token-file /dev/null: is empty."
    for flag in ("store-dir", "run-dir"):
        below_a_file = tmp_path / "token" / "x"
        said = refused(flags(tmp_path, **{flag.replace("-", "_"): below_a_file}))
        assert said == f"--{flag} {below_a_file}: cannot be written: Not a directory."
    assert refused(flags(tmp_path, listen="203.0.113.1:7001")) == (
        "--listen 203.0.113.1:7001: cannot listen there: Cannot assign requested address."
    )
    assert refused(flags(tmp_path, cpu_share=2)) == "--cpu-share must be above 0 and at most 1."


async def test_two_agents_do_not_share_a_run_dir(tmp_path: Path, eventually: Eventually) -> None:
    async with agent_process(flags(tmp_path)) as agent:
        await eventually(agent.workers, within_s=30)
        said = await asyncio.to_thread(refused, flags(tmp_path, store_dir=tmp_path / "other"))
        assert said == f"--run-dir {tmp_path / 'run'}: another agent uses it."


async def test_a_real_worker_serves_from_this_nodes_disk(
    tmp_path: Path, eventually: Eventually, tiny_model: Path
) -> None:
    command = shlex.join([sys.executable, "-m", "layercast_agent.worker"])
    arguments = flags(tmp_path, devices="cpu:1", device_memory_bytes=200_000_000, worker_command=command)
    async with agent_process(arguments) as agent:
        await agent.stub.PrepareCheckpoint(
            pb.PrepareCheckpointRequest(key="k", source=f"file://{tiny_model}"),
            wait_for_ready=True,
            timeout=15,
        )
        await eventually(agent.workers, within_s=60)
        digest = (await agent.status()).checkpoints[0].digest
        await agent.stub.StartReplica(
            pb.StartReplicaRequest(
                replica_id="r-1", model="m", digest=digest, context_length_max=128, batch_size_max=2
            )
        )
        (replica,) = (await agent.status()).replicas
        assert replica.state == pb.REPLICA_STATE_LOADING
        await agent.stub.StartTransfer(
            pb.StartTransferRequest(
                replica_id="r-1", transfer_id="t", generation=1, upstreams=[pb.Upstream(local_disk=True)]
            )
        )

        async def serves() -> bool:
            (seen,) = (await agent.status()).replicas
            return seen.state == pb.REPLICA_STATE_SERVING and all(seen.segments_resident)

        assert await eventually(serves)
        await agent.stub.StopReplica(pb.StopReplicaRequest(replica_id="r-1"))
        assert await agent.workers()
