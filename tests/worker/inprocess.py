"""Workers and a gateway's bookkeeping in one process: everything real but the borders between processes.

A worker here is what `layercast_agent.worker.__main__` puts together, with its own servers, data plane and engine
thread, so that hundreds of runs with faults take seconds each and not a start of Python each. The gateway is the real
state machine of replay over real streams, without HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import torch
from layercast.agent.v1alpha1 import agent_pb2
from layercast.engine.v1alpha1 import engine_pb2, engine_pb2_grpc
from layercast.peer.v1alpha1 import peer_pb2, peer_pb2_grpc
from layercast.worker.v1alpha1 import worker_pb2

from layercast_agent.engine.engine import Engine
from layercast_agent.holdings import SERVER_OPTIONS, Holdings
from layercast_agent.layout import Manifest
from layercast_agent.rdma import Rdma, judge, look
from layercast_agent.read_bytes import ReadBytes
from layercast_agent.regions import RegionTable
from layercast_agent.runner import UpstreamSpec
from layercast_agent.transport.egress import EgressLimiter
from layercast_agent.transport.tcp import TcpServer
from layercast_agent.worker.control import Assignment
from layercast_agent.worker.host import WorkerHost
from layercast_agent.worker.pacing import ComputeShare
from layercast_agent.worker.peers import PeerServicer
from layercast_agent.worker.replica import Replica
from layercast_agent.worker.settings import WorkerSettings
from layercast_agent.worker.streams import EngineServicer, GatewayStreams
from layercast_gateway import replay
from layercast_gateway.replay import Phase, RequestState, Work

TOKEN = b"secret-of-the-tests"
SILENCE_S = 1.0
ACCEPT_S = 2.0
TICK_S = 0.02


def settings_of(name: str, *, disk_bytes_per_s: int) -> WorkerSettings:
    """As the agent's flags would make them."""
    return WorkerSettings(
        node=name,
        device="cpu:0",
        control_socket=Path("/nonexistent"),
        listen="127.0.0.1:0",
        data_listen="127.0.0.1:0",
        token=TOKEN,
        host_memory_socket=None,
        rdma=Rdma.OFF,
        tls_dir=None,
        device_memory_bytes=32 << 20,
        reserve_bytes=0,
        cpu_share=1.0,
        cpu_cores=(),
        engine="auto",
        egress_bytes_per_s=0,
        disk_bytes_per_s=disk_bytes_per_s,
        parent_pid=0,
        log_format="text",
    )


class Worker:
    """One worker, until it is killed."""

    def __init__(
        self, name: str, *, egress_bytes_per_s: int = 0, disk_bytes_per_s: int = 0, cpu_share: float = 1.0
    ) -> None:
        self.name = name
        self.alive = True
        self._table = RegionTable()
        limiter = EgressLimiter(egress_bytes_per_s)
        self._data = TcpServer(self._table, token=TOKEN, host="127.0.0.1", port=0, limiter=limiter)
        self._data.start()
        self._streams, self._holdings = GatewayStreams(), Holdings()
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._disk_bytes_per_s = disk_bytes_per_s
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.host = WorkerHost(
            settings=settings_of(name, disk_bytes_per_s=disk_bytes_per_s),
            device=torch.device("cpu"),
            address=f"127.0.0.1:{port}",
            data_address=self._data.address,
            table=self._table,
            holdings=self._holdings,
            streams=self._streams,
            share=ComputeShare(cpu_share),
            tls=None,
            plane=None,
            verdict=judge(look(), Rdma.OFF),
            read_bytes=ReadBytes(),
            reserve=None,
        )
        self.assignment = Assignment(self.host)
        engine_pb2_grpc.add_EngineServiceServicer_to_server(
            EngineServicer(streams=self._streams, handler=self.assignment), self._server
        )
        peer_pb2_grpc.add_PeerServiceServicer_to_server(
            PeerServicer(holdings=self._holdings, replica=lambda: self.assignment.replica), self._server
        )

    @property
    def replica(self) -> Replica:
        assert self.assignment.replica is not None
        return self.assignment.replica

    @property
    def peer(self) -> peer_pb2.Peer:
        return self.host.peer(self.name)

    async def start(self, manifest: Manifest, files: dict[str, bytes], *, step_tokens_max: int = 0) -> None:
        """Serves, and has a replica without parameters."""
        await self._server.start()
        spec = agent_pb2.StartReplicaRequest(
            replica_id=self.name,
            model="tiny",
            digest=manifest.digest,
            context_length_max=128,
            batch_size_max=8,
            step_tokens_max=step_tokens_max,
        )
        await self.assignment.assign(
            worker_pb2.AssignReplicaRequest(replica=spec, manifest_json=manifest.to_json(), files=files)
        )

    def feed(
        self,
        upstreams: list[UpstreamSpec],
        *,
        order: list[int] | None = None,
        live_source: peer_pb2.Peer | None = None,
        lead: list[peer_pb2.Peer] | None = None,
    ) -> None:
        """As BeginTransfer does."""
        request = agent_pb2.StartTransferRequest(
            replica_id=self.name,
            transfer_id=f"{self.name}-t",
            generation=1,
            segment_order=order or [],
            live_source=live_source,
            lead=None if lead is None else agent_pb2.Pipeline(members=lead),
        )
        self.replica.begin_transfer(request, upstreams)

    def from_disk(self, folder: Path) -> list[UpstreamSpec]:
        return [UpstreamSpec(peer_id="disk", local_folder=folder, disk_bytes_per_s=self._disk_bytes_per_s)]

    def as_upstream(self) -> UpstreamSpec:
        peer = self.peer
        return UpstreamSpec(peer_id=self.name, address=peer.address, data_address=peer.data_address)

    async def until(self, reached: Callable[[Replica], bool], deadline_s: float = 20.0) -> None:
        async with asyncio.timeout(deadline_s):
            while not reached(self.replica):
                await asyncio.sleep(0.01)

    async def until_held(self, layers: range, positions: int, deadline_s: float = 60.0) -> dict[int, int]:
        """Until its only session has so many positions of those layers; what it has, by layer."""

        def rows(engine: Engine) -> dict[int, int]:
            sessions = list(engine.stages._sessions.values())
            return dict(sessions[0].rows) if sessions else {}

        async with asyncio.timeout(deadline_s):
            while True:
                held = await self.replica.desk.ask(rows)
                if all(held.get(layer, 0) >= positions for layer in layers):
                    return held
                await asyncio.sleep(0.01)

    async def cut(self) -> None:
        """Its data plane is gone: no parameter, no hidden state, no KV of it can be read any more."""
        await asyncio.to_thread(self._data.close)

    async def kill(self) -> None:
        """Nothing of it is heard any more; its threads and memory go with it."""
        if not self.alive:
            return
        self.alive = False
        await self._server.stop(None)
        await asyncio.to_thread(self._data.close)
        self._streams.close()
        replica = self.assignment.replica
        if replica is not None:
            with contextlib.suppress(Exception):
                await replica.close()


@dataclass(slots=True)
class Asked:
    """One request of a client: what came of it."""

    state: RequestState
    ends: int = 0
    error: str = ""
    served_by: set[str] = field(default_factory=set)


class Gateway:
    """Replay over streams, with the routes that a test sets."""

    def __init__(self) -> None:
        self.asked: dict[str, Asked] = {}
        self.routes: list[str] = []
        self.decode_at: peer_pb2.Peer | None = None
        self.events = 0
        self.changed = asyncio.Event()
        self._calls: dict[str, Any] = {}
        self._writing = asyncio.Lock()  # a stream takes one message at a time
        self._channels: list[grpc.aio.Channel] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def connect(self, address: str) -> None:
        channel = grpc.aio.insecure_channel(address)
        call = engine_pb2_grpc.EngineServiceStub(channel).Generate()
        await call.write(engine_pb2.GenerateRequest(hello=engine_pb2.Hello(gateway_id="g")))
        self._channels.append(channel)
        self._calls[address] = call
        self._tasks.append(asyncio.create_task(self._read(address, call)))

    def ask(self, name: str, prompt: list[int], max_tokens: int, *, deadline_s: float = 40.0) -> None:
        work = Work(
            request_id=name,
            model="tiny",
            prompt=tuple(prompt),
            sampling=engine_pb2.Sampling(max_tokens=max_tokens),
            arrived_at=time.time(),
            deadline=time.monotonic() + deadline_s,
        )
        self.asked[name] = Asked(RequestState(work=work))

    async def run(self) -> None:
        """Until every request has ended."""
        while any(asked.ends == 0 for asked in self.asked.values()):
            for asked in self.asked.values():
                state = asked.state
                if state.phase is Phase.QUEUED and (places := [a for a in self.routes if a in self._calls]):
                    await self._carry_out(
                        asked,
                        replay.dispatch(state, address=places[0], accept_by=time.monotonic() + ACCEPT_S),
                    )
                await self._carry_out(asked, replay.on_time(state, now=time.monotonic()))
            self.changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self.changed.wait()

    async def until_events(self, count: int, deadline_s: float = 60.0) -> None:
        async with asyncio.timeout(deadline_s):
            while self.events < count:
                await asyncio.sleep(0.002)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    async def _read(self, address: str, call: object) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for message in call:  # type: ignore[attr-defined]
                for event in message.events:
                    self.events += 1
                    await self._apply(address, event)
                self.changed.set()
        self._calls.pop(address, None)
        for asked in self.asked.values():
            now = time.monotonic()
            await self._carry_out(
                asked, replay.on_lost(asked.state, address=address, now=now, silence_s=SILENCE_S)
            )
        self.changed.set()

    async def _apply(self, address: str, event: engine_pb2.Event) -> None:
        asked = self.asked.get(event.request_id)
        if event.WhichOneof("event") == "tokens" and asked is not None:
            asked.served_by.add(address)
        state = asked.state if asked is not None else None
        done = replay.on_event(state, address=address, event=event, now=time.monotonic())
        if asked is not None:
            await self._carry_out(asked, done)

    async def _carry_out(self, asked: Asked, instructions: list[replay.Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case replay.Submit(address=address):
                    await self._write(address, submit=engine_pb2.Submit(request=self._request(asked.state)))
                case replay.CancelAt(address=address, attempt=attempt):
                    cancel = engine_pb2.Cancel(request_id=asked.state.work.request_id, attempt=attempt)
                    await self._write(address, cancel=cancel)
                case replay.Requeue(refused_by=refused) if refused in self.routes:
                    # The real gateway lets it rest; here the others come first from now on.
                    self.routes.sort(key=lambda address: address == refused)
                case replay.End():
                    asked.ends += 1
                case replay.Fail(error=error):
                    asked.ends += 1
                    asked.error = str(error)
                case _:
                    pass

    async def _write(self, address: str, **command: object) -> None:
        call = self._calls.get(address)
        if call is not None:
            async with self._writing:
                with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    await call.write(engine_pb2.GenerateRequest(**command))  # type: ignore[arg-type]

    def _request(self, state: RequestState) -> engine_pb2.Request:
        request = engine_pb2.Request(
            request_id=state.work.request_id,
            gateway_id="g",
            attempt=state.attempt,
            model="tiny",
            prompt_token_ids=state.work.prompt,
            generated_token_ids=state.tokens,
            sampling=state.work.sampling,
        )
        request.arrived_at.FromNanoseconds(int(state.work.arrived_at * 1e9))
        place = self.decode_at
        if place is not None and place.address in self._calls:
            request.decode_at.CopyFrom(
                engine_pb2.DecodePlace(replica_id=place.peer_id, address=place.address)
            )
        return request
