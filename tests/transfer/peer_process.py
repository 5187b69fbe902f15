"""One node of a chain as a process of its own: serves a synthetic checkpoint, and loads it if it is not the source.

Takes its settings as JSON in argv[1]. Says one JSON object a line on stdout: `ready` with its addresses, then
`segment` and `complete` with the time of the machine's monotonic clock. Commands on stdin: `load` begins its
transfer, `again` gives it the same upstreams under a higher generation, `status` says how it is, `corrupt SEGMENT`
alters a byte of a segment that it holds, `fence` takes its regions back unannounced; the end of stdin ends it.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import grpc
from layercast.peer.v1alpha1 import peer_pb2_grpc

from layercast_agent import tls
from layercast_agent.arena import Arena
from layercast_agent.holdings import DEVICE_RANK, MEMORY_RANK, SERVER_OPTIONS, Holding, Holdings
from layercast_agent.regions import RegionTable
from layercast_agent.residency import Residency
from layercast_agent.runner import TransferLimits, TransferOutcome, TransferRunner, UpstreamSpec
from layercast_agent.transport.shm import ShmServer
from layercast_agent.transport.tcp import EgressLimiter, TcpServer

TOKEN = b"a token that the chain shares"


def say(event: str, **fields: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, "at": time.monotonic(), **fields}) + "\n")
    sys.stdout.flush()


def load_synthetic() -> Any:
    path = Path(__file__).parent / "synthetic.py"
    spec = importlib.util.spec_from_file_location("layercast_test_synthetic", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class PeerServicer(peer_pb2_grpc.PeerServiceServicer):
    """Serves one table of holdings."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings

    async def WatchResidency(self, request: Any, context: Any) -> Any:
        async for message in self._holdings.watch_residency(request, context):
            yield message

    async def DescribeRegions(self, request: Any, context: Any) -> Any:
        return await self._holdings.describe_regions(request, context)


def hold(settings: dict[str, Any], checkpoint: Any, *, complete: bool) -> tuple[list[Any], Arena | None]:
    """Memory of every segment: in an arena where processes of this machine are to map it."""
    if not settings.get("memory_socket"):
        return (checkpoint.memories() if complete else checkpoint.empty_memories()), None
    unit = settings["chunk_bytes"]
    arena = Arena(sum(settings["sizes"]) + (len(settings["sizes"]) + 1) * (unit + 4096))
    memories: list[Any] = []
    for data in checkpoint.data:
        memory = arena.allocate(len(data), unit=unit)
        for start in range(0, len(data) if complete else 0, unit):
            part = data[start : start + unit]
            memory.staging(start, len(part))[:] = part
        memories.append(memory)
    return memories, arena


async def run(settings: dict[str, Any]) -> None:
    checkpoint = load_synthetic().make(settings["sizes"], chunk_bytes=settings["chunk_bytes"])
    host = settings.get("host", "127.0.0.1")
    source = not settings["upstreams"]
    memories, arena = hold(settings, checkpoint, complete=source)
    residency = Residency(checkpoint.manifest, complete=source)
    table, holdings = RegionTable(), Holdings()
    regions = tuple(table.add(memory) for memory in memories)
    rank = DEVICE_RANK if arena is None else MEMORY_RANK
    holdings.add(
        Holding(manifest=checkpoint.manifest, files={}, residency=residency, regions=regions, rank=rank)
    )
    limiter = EgressLimiter(settings["egress_bytes_per_s"])
    secure = tls.Tls(Path(settings["tls_dir"])) if settings.get("tls_dir") else None
    data = TcpServer(table, token=TOKEN, host=host, port=0, limiter=limiter, tls=secure)
    data.start()
    mapped = None
    if arena is not None:
        mapped = ShmServer(table, arena=arena, token=TOKEN, path=Path(settings["memory_socket"]))
        mapped.start()
    plane = None
    if settings.get("nixl"):
        from layercast_agent.transport.nixl import NixlPlane

        plane = NixlPlane(table)
        holdings.describe = plane.describe
    server = grpc.aio.server(interceptors=tls.interceptors(secure), options=SERVER_OPTIONS)
    peer_pb2_grpc.add_PeerServiceServicer_to_server(cast(Any, PeerServicer)(holdings), server)
    port = tls.bind(server, f"{host}:0", secure)
    await server.start()
    say("ready", address=f"{host}:{port}", data_address=data.address)

    def fence() -> None:
        for region in regions:
            table.remove(region.region_id, deadline_s=5)

    await obey_stdin(
        memories,
        fence,
        functools.partial(
            start_transfer, settings, checkpoint, memories, residency, plane=plane, secure=secure
        ),
    )
    await server.stop(0)
    data.close()
    if mapped is not None:
        mapped.close()
    if settings.get("nixl"):
        os._exit(0)  # the library may crash when it is unloaded


def start_transfer(
    settings: dict[str, Any],
    checkpoint: Any,
    memories: Any,
    residency: Residency,
    *,
    plane: Any,
    secure: tls.Tls | None,
) -> TransferRunner:
    def on_end(outcome: TransferOutcome) -> None:
        digest = hashlib.sha256()
        for memory in memories:
            digest.update(memory.view(0, memory.nbytes))
        status = runner.status()
        say(
            "complete" if outcome.complete else "failed",
            reason=outcome.reason,
            sha256=digest.hexdigest(),
            failures=status.failures,
            bytes_per_s=status.bytes_per_s,
            one_sided_bytes=plane.read_bytes if plane is not None else 0,
        )

    runner = TransferRunner(
        transfer_id="t",
        manifest=checkpoint.manifest,
        memories=memories,
        residency=residency,
        upstreams=upstreams_of(settings),
        generation=1,
        segment_order=(),
        token=TOKEN,
        on_segment=lambda segment: say("segment", segment=segment),
        on_end=on_end,
        limits=TransferLimits(**{"progress_deadline_s": 2.5, **settings.get("limits", {})}),
        tls=secure,
        plane=plane,
    )
    runner.start()
    return runner


def upstreams_of(settings: dict[str, Any]) -> list[UpstreamSpec]:
    return [UpstreamSpec(**spec) for spec in settings["upstreams"]]


async def obey_stdin(memories: Any, fence: Callable[[], None], load: Callable[[], TransferRunner]) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    runner: TransferRunner | None = None
    while line := await reader.readline():
        match line.decode().split():
            case ["load"]:
                runner = load()
            case ["again"]:
                assert runner is not None
                runner.replace_upstreams(upstreams_of(json.loads(sys.argv[1])), 2)
            case ["status"]:
                assert runner is not None
                status = runner.status()
                say(
                    "status",
                    stalled=status.stalled,
                    reason=status.stall_reason,
                    failures=status.failures,
                    done=status.done_bytes,
                )
            case ["fence"]:
                fence()
                say("fenced")
            case ["corrupt", segment]:
                memories[int(segment)].staging(0, 1)[0] ^= 1
                say("corrupted", segment=int(segment))


if __name__ == "__main__":
    asyncio.run(run(json.loads(sys.argv[1])))
