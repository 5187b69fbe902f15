"""`layercast up --tls`: a whole cluster in which every process demands certificates, and what a stranger gets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from layercast.agent.v1alpha1 import agent_pb2, agent_pb2_grpc
from tests.system.conftest import MODEL, StartCluster, answers, client_of, service
from tests.system.test_host_copies import PROMPTS, copies, is_safe, wait

from layercast_agent.tls import AGENT, Tls, sync_channel
from layercast_cli.local import LocalCluster
from layercast_cli.ports import free_ports
from layercast_cli.state import write_atomic

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

TOKENS = 12


async def test_a_cluster_with_certificates_serves_and_scales(
    model_folder: Path, start_cluster: StartCluster
) -> None:
    """From disks, a peer's device and its own node's memory: all over mutual TLS."""
    with start_cluster(service(model_folder), agents=2, tls=True) as cluster:
        await asyncio.to_thread(cluster.wait_ready, MODEL, deadline_s=90)
        status = await wait(cluster, reached=is_safe, what="keep a host copy away from the replica")
        (keeper,) = copies(status)
        async with client_of(cluster) as client:
            reference = await answers(client, PROMPTS, max_tokens=TOKENS)
            cluster.edit(MODEL, lambda changed: changed["spec"].update(replicas=2))
            await wait(cluster, reached=lambda seen: seen.serving == 2, what="serve with two replicas")
            assert await answers(client, PROMPTS, max_tokens=TOKENS) == reference
            cluster.edit(MODEL, lambda changed: changed["spec"].update(replicas=0))
            status = await wait(
                cluster, reached=lambda seen: not seen.replicas and copies(seen), what="scale to zero"
            )
            cluster.edit(MODEL, lambda changed: changed["spec"].update(replicas=1))
            status = await wait(cluster, reached=lambda seen: seen.serving == 1, what="serve again")
            assert await answers(client, PROMPTS, max_tokens=TOKENS) == reference
            # The second replica was started where the copy is; the last one has the disk's choice too.
            assert keeper in {replica.source for scale in status.scales for replica in scale.replicas}


async def test_strangers_are_refused(model_folder: Path, start_cluster: StartCluster, tmp_path: Path) -> None:
    """A node whose agent shows no certificate gets no work, and who shows none, or another role's, gets no answer."""
    with start_cluster(service(model_folder), agents=1, tls=True) as cluster:
        await asyncio.to_thread(cluster.wait_ready, MODEL, deadline_s=90)
        document = json.loads(cluster.state.cluster_file.read_text())
        (address,) = document["agents"].values()
        with stranger(cluster, tmp_path) as strange:
            await wait(cluster, reached=lambda _: idle(strange), what="have a strange agent that is ready")
            document["agents"]["stranger"] = strange
            write_atomic(cluster.state.cluster_file, json.dumps(document))
            cluster.edit(MODEL, lambda changed: changed["spec"].update(replicas=2))
            await wait(cluster, reached=lambda seen: seen.desired == 2, what="want two replicas")
            log = cluster.state.logs / "operator.log"
            await wait(
                cluster, reached=lambda _: "stranger" in log.read_text(), what="have asked the stranger"
            )
            assert await asyncio.to_thread(idle, strange)
            async with client_of(cluster) as client:
                assert all(await answers(client, PROMPTS[:2], max_tokens=TOKENS))
            status = cluster.status(MODEL)
            assert status is not None and "stranger" not in {replica.node for replica in status.replicas}
        certificates = cluster.state.certificates
        for folder, code in (
            (None, grpc.StatusCode.UNAVAILABLE),
            (certificates / "gateway", grpc.StatusCode.PERMISSION_DENIED),
            (certificates / "agent", grpc.StatusCode.PERMISSION_DENIED),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                await asyncio.to_thread(ask, address, folder)
            assert caught.value.code() is code
        assert len((await asyncio.to_thread(ask, address, certificates / "operator")).devices) == 1


def ask(address: str, certificates: Path | None) -> Any:
    """What an operator asks of an agent."""
    tls = Tls(certificates) if certificates is not None else None
    with sync_channel(address, tls, role=AGENT) as channel:
        stub = agent_pb2_grpc.AgentServiceStub(channel)
        return stub.GetStatus(agent_pb2.GetStatusRequest(), timeout=10)


def idle(address: str) -> bool:
    """Whether an agent without certificates is there, ready for work, and has none."""
    try:
        (device,) = ask(address, None).devices
    except grpc.RpcError:
        return False
    return device.worker_state == agent_pb2.WORKER_STATE_IDLE and not device.replica_id


@contextlib.contextmanager
def stranger(cluster: LocalCluster, folder: Path) -> Iterator[str]:
    """An agent that knows the token and has no certificate; its address."""
    with free_ports("127.0.0.1", 2) as ports:
        address, data = (f"127.0.0.1:{port}" for port in ports)
    flags = {
        "--node": "stranger",
        "--listen": address,
        "--data-listen": data,
        "--store-dir": str(folder / "store"),
        "--run-dir": str(folder / "run"),
        "--devices": "cpu:1",
        "--device-memory-bytes": str(256 << 20),
        "--token-file": str(cluster.state.token_file),
    }
    command = [sys.executable, "-m", "layercast_agent", *(word for pair in flags.items() for word in pair)]
    with (folder / "stranger.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield address
    finally:
        process.terminate()
        process.wait(30)
