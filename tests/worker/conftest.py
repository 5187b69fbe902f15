"""Real worker processes with a tiny random model, and a client that speaks the gateway's side of the wire."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Protocol

import grpc
import pytest
from layercast.agent.v1alpha1 import agent_pb2
from layercast.engine.v1alpha1 import engine_pb2, engine_pb2_grpc
from layercast.peer.v1alpha1 import peer_pb2
from layercast.worker.v1alpha1 import worker_pb2, worker_pb2_grpc

from layercast_agent.layout import Manifest
from layercast_agent.store import Store

START_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A tiny model: as Hugging Face wrote it, and packed."""

    source: Path
    folder: Path
    manifest: Manifest
    files: dict[str, bytes]


@pytest.fixture(scope="session")
def packed(tinymodels: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    root = tmp_path_factory.mktemp("tiny")
    source = tinymodels.make(root / "hf", "llama", layers=6, hidden=256)
    store = Store(root / "store")
    manifest = store.prepare(
        key="tiny", source=f"file://{source}", revision="", dtype="float32", progress=lambda progress: None
    )
    return Packed(
        source=source,
        folder=store.folder(manifest.digest),
        manifest=manifest,
        files=dict(store.files(manifest.digest)),
    )


@dataclass(slots=True, kw_only=True)
class WorkerProcess:
    """One worker and the agent's side of its control socket."""

    name: str
    process: subprocess.Popen[bytes]
    control: worker_pb2_grpc.WorkerServiceAsyncStub
    channel: grpc.aio.Channel
    log: Path

    async def status(self) -> worker_pb2.GetWorkerStatusResponse:
        return await self.control.GetWorkerStatus(worker_pb2.GetWorkerStatusRequest(), timeout=5)

    async def until(
        self, true_of: Callable[[worker_pb2.GetWorkerStatusResponse], bool], deadline_s: float = 30.0
    ) -> worker_pb2.GetWorkerStatusResponse:
        """Polls the status; there is nothing to wait on across the process border."""
        deadline = time.monotonic() + deadline_s
        while True:
            status = await self.status()
            if true_of(status):
                return status
            assert status.replica.state != agent_pb2.REPLICA_STATE_FAILED, status.replica.error
            assert time.monotonic() < deadline, f"{self.name}: {status}\n{self.log.read_text()[-4000:]}"
            await asyncio.sleep(0.02)

    async def assign(self, packed: Packed, *, model: str = "tiny", context: int = 256) -> None:
        await self.control.AssignReplica(
            worker_pb2.AssignReplicaRequest(
                replica=agent_pb2.StartReplicaRequest(
                    replica_id=self.name,
                    model=model,
                    digest=packed.manifest.digest,
                    context_length_max=context,
                    batch_size_max=8,
                ),
                manifest_json=packed.manifest.to_json(),
                files=packed.files,
            ),
            timeout=30,
        )

    async def feed(
        self,
        packed: Packed,
        *,
        upstreams: list[peer_pb2.Peer] | None = None,
        live_source: peer_pb2.Peer | None = None,
        generation: int = 1,
        order: list[int] | None = None,
        lead: list[peer_pb2.Peer] | None = None,
    ) -> None:
        """Starts the transfer: from disk when no upstream is given. With `lead`, even empty, the worker leads."""
        segments = len(packed.manifest.segments)
        layers_first = [*range(1, segments - 1), 0, segments - 1]
        named = [agent_pb2.Upstream(peer=peer) for peer in upstreams or []]
        await self.control.BeginTransfer(
            worker_pb2.BeginTransferRequest(
                transfer=agent_pb2.StartTransferRequest(
                    replica_id=self.name,
                    transfer_id=f"{self.name}-t",
                    generation=generation,
                    upstreams=named or [agent_pb2.Upstream(local_disk=True)],
                    segment_order=order or (layers_first if live_source else []),
                    live_source=live_source,
                    lead=None if lead is None else agent_pb2.Pipeline(members=lead),
                ),
                local_disk_path=str(packed.folder),
            ),
            timeout=10,
        )

    async def peer(self) -> peer_pb2.Peer:
        return (await self.status()).replica.peer

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)


class StartWorker(Protocol):
    """Starts a worker and waits until it is warm."""

    async def __call__(
        self, name: str, *, egress_bytes_per_s: int = 0, cpu_share: float = 1.0
    ) -> WorkerProcess: ...


Reference = Callable[[list[int], int], list[int]]
"""Greedy tokens of transformers: prompt and number of tokens in, tokens out."""


@pytest.fixture(scope="session")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_bytes(b"secret-of-the-tests")
    path.chmod(0o600)
    return path


@pytest.fixture
async def start_worker(tmp_path: Path, token_file: Path) -> AsyncIterator[StartWorker]:
    """Starts workers; all of them are ended with the test."""
    started: list[WorkerProcess] = []

    def start(name: str, *, egress_bytes_per_s: int = 0, cpu_share: float = 1.0) -> WorkerProcess:
        log = tmp_path / f"{name}.log"
        socket = tmp_path / f"{name}.sock"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    sys.executable,
                    *("-m", "layercast_agent.worker"),
                    *("--node", name),
                    *("--device", "cpu:0"),
                    *("--control-socket", str(socket)),
                    *("--token-file", str(token_file)),
                    *("--device-memory-bytes", str(256 * 2**20)),
                    *("--cpu-share", str(cpu_share)),
                    *("--egress-bytes-per-s", str(egress_bytes_per_s)),
                    *("--parent-pid", str(os.getpid())),
                ],
                stdout=output,
                stderr=output,
                # One arena of malloc: those that threads make when they meet are not what replicas leave.
                env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
            )
        channel = grpc.aio.insecure_channel(f"unix:{socket}")
        worker = WorkerProcess(
            name=name,
            process=process,
            control=worker_pb2_grpc.WorkerServiceStub(channel),
            channel=channel,
            log=log,
        )
        started.append(worker)
        return worker

    async def start_warm(name: str, *, egress_bytes_per_s: int = 0, cpu_share: float = 1.0) -> WorkerProcess:
        worker = start(name, egress_bytes_per_s=egress_bytes_per_s, cpu_share=cpu_share)
        deadline = time.monotonic() + START_DEADLINE_S
        while True:
            assert worker.process.poll() is None, worker.log.read_text()[-4000:]
            assert time.monotonic() < deadline, worker.log.read_text()[-4000:]
            try:
                if (await worker.status()).warm:
                    return worker
            except grpc.aio.AioRpcError:
                pass
            await asyncio.sleep(0.05)

    yield start_warm
    for worker in started:
        worker.process.kill()
        worker.process.wait(10)
        await worker.channel.close()


@dataclass(slots=True)
class Answer:
    """What the gateway's side knows of one request."""

    owner: str = ""
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    returned: str = ""
    failed: str = ""
    layers_done: list[int] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class GatewayClient:
    """Streams to any number of workers; takes tokens by position like a gateway does."""

    def __init__(self, gateway_id: str) -> None:
        self.gateway_id = gateway_id
        self.answers: dict[str, Answer] = {}
        self._streams: dict[str, object] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._channels: list[grpc.aio.Channel] = []
        self._broken: dict[str, asyncio.Event] = {}

    async def connect(self, address: str) -> None:
        channel = grpc.aio.insecure_channel(address)
        call = engine_pb2_grpc.EngineServiceStub(channel).Generate()
        await call.write(engine_pb2.GenerateRequest(hello=engine_pb2.Hello(gateway_id=self.gateway_id)))
        self._channels.append(channel)
        self._broken[address] = asyncio.Event()
        self._streams[address] = call
        self._tasks.append(asyncio.create_task(self._read(address, call)))

    async def submit(self, address: str, request: engine_pb2.Request) -> Answer:
        answer = self.answers.setdefault(request.request_id, Answer())
        await self._streams[address].write(  # type: ignore[attr-defined]
            engine_pb2.GenerateRequest(submit=engine_pb2.Submit(request=request))
        )
        return answer

    async def cancel(self, address: str, request_id: str) -> None:
        await self._streams[address].write(  # type: ignore[attr-defined]
            engine_pb2.GenerateRequest(cancel=engine_pb2.Cancel(request_id=request_id, attempt=99))
        )

    def request(
        self,
        request_id: str,
        prompt: list[int],
        *,
        max_tokens: int = 8,
        attempt: int = 1,
        generated: tuple[int, ...] = (),
        temperature: float = 0.0,
        seed: int = 0,
        model: str = "tiny",
        decode_at: peer_pb2.Peer | None = None,
    ) -> engine_pb2.Request:
        request = engine_pb2.Request(
            request_id=request_id,
            gateway_id=self.gateway_id,
            attempt=attempt,
            model=model,
            prompt_token_ids=prompt,
            generated_token_ids=generated,
            sampling=engine_pb2.Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed),
        )
        request.arrived_at.GetCurrentTime()
        if decode_at is not None:
            place = engine_pb2.DecodePlace(replica_id=decode_at.peer_id, address=decode_at.address)
            request.decode_at.CopyFrom(place)
        return request

    async def until_broken(self, address: str, deadline_s: float = 20.0) -> None:
        async with asyncio.timeout(deadline_s):
            await self._broken[address].wait()

    async def all_done(self, deadline_s: float = 60.0) -> None:
        async with asyncio.timeout(deadline_s):
            for answer in self.answers.values():
                while not (answer.finished or answer.returned or answer.failed):
                    answer.changed.clear()
                    await answer.changed.wait()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    async def _read(self, address: str, call: object) -> None:
        try:
            async for message in call:  # type: ignore[attr-defined]
                for event in message.events:
                    self._apply(address, event)
        except grpc.aio.AioRpcError:
            self._broken[address].set()

    def _apply(self, address: str, event: engine_pb2.Event) -> None:
        answer = self.answers[event.request_id]
        match event.WhichOneof("event"):
            case "accepted":
                answer.owner = address
                answer.layers_done.append(event.accepted.layers_done)
            case "tokens":
                for index, token in enumerate(event.tokens.token_ids, start=event.tokens.position):
                    assert index <= len(answer.tokens), "a token came before its predecessor"
                    if index == len(answer.tokens):
                        answer.tokens.append(token)
                    assert answer.tokens[index] == token, "two owners disagree about a token"
            case "finished":
                answer.finished = True
            case "returned":
                answer.returned = event.returned.reason
            case "failed":
                answer.failed = event.failed.message
        answer.changed.set()


@pytest.fixture
async def gateway() -> AsyncIterator[GatewayClient]:
    client = GatewayClient("gateway-of-the-test")
    yield client
    await client.close()


@pytest.fixture(scope="session")
def reference(packed: Packed) -> Reference:
    """Greedy tokens of transformers for the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(packed.source, dtype=torch.float32)
    model.generation_config.eos_token_id = None

    def generate(prompt: list[int], max_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return list(map(int, out[0, len(prompt) :]))

    return generate
