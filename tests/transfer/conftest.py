"""What the transfer's tests share: synthetic checkpoints, and holders that serve them in this process."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import grpc
import pytest
from layercast.peer.v1alpha1 import peer_pb2_grpc

from layercast_agent.holdings import SERVER_OPTIONS, Holding, Holdings
from layercast_agent.regions import HostMemory, RegionTable
from layercast_agent.residency import Residency
from layercast_agent.transfer_events import UpstreamSpec
from layercast_agent.transport.tcp import EgressLimiter, TcpServer

TOKEN = b"a token that both ends know"
FOLDER = Path(__file__).parent


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """tests/transfer/synthetic.py, which is no package's member."""
    spec = importlib.util.spec_from_file_location("layercast_test_synthetic", FOLDER / "synthetic.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class PeerServicer(peer_pb2_grpc.PeerServiceServicer):
    """Serves holdings as workers and agents do."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings

    async def GetManifest(self, request: Any, context: Any) -> Any:
        return await self._holdings.get_manifest(request, context)

    async def WatchResidency(self, request: Any, context: Any) -> Any:
        async for message in self._holdings.watch_residency(request, context):
            yield message


class Holder:
    """A peer in this process: its services, its data plane, one checkpoint."""

    def __init__(
        self,
        checkpoint: Any,
        loop: asyncio.AbstractEventLoop,
        *,
        complete: bool = True,
        egress_bytes_per_s: int = 0,
    ) -> None:
        self.checkpoint = checkpoint
        self.memories: list[HostMemory] = checkpoint.memories() if complete else checkpoint.empty_memories()
        self.residency = Residency(checkpoint.manifest, complete=complete)
        self.table = RegionTable()
        self.holdings = Holdings()
        self.holdings.add(
            Holding(
                manifest=checkpoint.manifest,
                files={"config.json": b"{}"},
                residency=self.residency,
                regions=tuple(self.table.add(memory) for memory in self.memories),
            )
        )
        self.data = TcpServer(
            self.table, token=TOKEN, host="127.0.0.1", port=0, limiter=EgressLimiter(egress_bytes_per_s)
        )
        self.data.start()
        self._loop = loop
        self.port = asyncio.run_coroutine_threadsafe(self._serve(), loop).result(10)

    async def _serve(self) -> int:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        peer_pb2_grpc.add_PeerServiceServicer_to_server(cast(Any, PeerServicer)(self.holdings), self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return port

    def spec(self, name: str = "A") -> UpstreamSpec:
        return UpstreamSpec(peer_id=name, address=f"127.0.0.1:{self.port}", data_address=self.data.address)

    def close(self) -> None:
        self.data.close()
        asyncio.run_coroutine_threadsafe(self._server.stop(0), self._loop).result(10)


@pytest.fixture(scope="session")
def server_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """The loop of all servers, in its thread: gRPC wants one a process."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.fixture
def holder(server_loop: asyncio.AbstractEventLoop) -> Iterator[Callable[..., Holder]]:
    """Starts holders and closes them after the test."""
    started: list[Holder] = []

    def start(checkpoint: Any, **options: Any) -> Holder:
        started.append(Holder(checkpoint, server_loop, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()
