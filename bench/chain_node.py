"""One machine of the benchmark as a process: holds a checkpoint and serves it, or loads it from others.

Everything that moves or guards bytes is the product's. Commands come as JSON lines on stdin, each answered by
one line on stdout; the end of stdin ends the process. Times are the machine's monotonic clock, which all
namespaces share.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any, cast

import grpc
from layercast.peer.v1alpha1 import peer_pb2_grpc

from bench import plain_socket, synthetic
from layercast_agent.holdings import SERVER_OPTIONS, Holding, Holdings
from layercast_agent.layout import Manifest
from layercast_agent.regions import HostMemory, RegionRef, RegionTable
from layercast_agent.residency import Residency
from layercast_agent.runner import TransferOutcome, TransferRunner, UpstreamSpec
from layercast_agent.transport.tcp import EgressLimiter, TcpServer

TOKEN = b"a token that the chain shares"
REMOVE_DEADLINE_S = 5.0


def say(event: str, **fields: Any) -> None:
    """One line on stdout."""
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


class PeerServicer(peer_pb2_grpc.PeerServiceServicer):
    """Serves one table of holdings."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings

    async def WatchResidency(self, request: Any, context: Any) -> Any:
        async for message in self._holdings.watch_residency(request, context):
            yield message


class Node:
    """What this process holds, and the commands that it obeys."""

    def __init__(self, *, host: str, manifest: Manifest, content: list[bytearray] | None) -> None:
        self._manifest = manifest
        self._source = content is not None
        sizes = [segment.nbytes for segment in manifest.segments]
        self._memories = [HostMemory(nbytes) for nbytes in sizes]
        for memory, data in zip(self._memories, content or (), strict=False):
            memory.view(0, memory.nbytes)[:] = data
        self._host = host
        self._table = RegionTable()
        self._regions: list[RegionRef] = []
        self._residency = Residency(manifest)
        self._runner: TransferRunner | None = None
        self.holdings = Holdings()
        self.data = TcpServer(self._table, token=TOKEN, host=host, port=0, limiter=EgressLimiter(None))
        self.data.start()
        self.prepare()

    def prepare(self) -> None:
        """Forget what was loaded: new regions, empty residency, zeroed memory whose pages are there."""
        self.holdings.remove(self._manifest.digest)
        for region in self._regions:
            self._table.remove(region.region_id, deadline_s=REMOVE_DEADLINE_S)
        if not self._source:
            for memory in self._memories:
                memory.view(0, memory.nbytes)[:] = bytes(memory.nbytes)
        self._regions = [self._table.add(memory) for memory in self._memories]
        self._residency = Residency(self._manifest, complete=self._source)
        self.holdings.add(
            Holding(
                manifest=self._manifest, files={}, residency=self._residency, regions=tuple(self._regions)
            )
        )
        say("prepared")

    def load(self, upstreams: list[dict[str, Any]]) -> None:
        """Begin a transfer; `loaded` is said when it ended."""
        begun_at, begun_cpu_s = time.monotonic(), time.process_time()

        def on_end(outcome: TransferOutcome) -> None:
            ended_at = time.monotonic()
            say(
                "loaded",
                complete=outcome.complete,
                reason=outcome.reason,
                begun_at=begun_at,
                ended_at=ended_at,
                cpu_s=time.process_time() - begun_cpu_s,
                failures=self._runner.status().failures if self._runner else (),
            )

        self._runner = TransferRunner(
            transfer_id="bench",
            manifest=self._manifest,
            memories=self._memories,
            residency=self._residency,
            upstreams=[UpstreamSpec(**spec) for spec in upstreams],
            generation=1,
            segment_order=(),
            token=TOKEN,
            on_segment=lambda segment: None,
            on_end=on_end,
        )
        self._runner.start()

    def verify(self) -> None:
        """Compare all bytes with the manifest."""
        views = [memory.view(0, memory.nbytes) for memory in self._memories]
        good = all(synthetic.verified(self._manifest, index, view) for index, view in enumerate(views))
        say("verified", good=good)

    def cpu(self) -> None:
        """Tell the CPU seconds that this process has used."""
        say("cpu", cpu_s=time.process_time(), at=time.monotonic())

    def serve_plain(self) -> None:
        """Offer the same bytes to plain sockets."""
        say("serving", port=plain_socket.PlainServer(self._host, self._parts()).port)

    def fetch_plain(self, host: str, port: int, summed: bool) -> None:
        """Copy by plain sockets, and sum what came or not."""
        begun_at, begun_cpu_s = time.monotonic(), time.process_time()
        plain_socket.fetch(host, port, self._parts(), summed=summed)
        ended_at, cpu_s = time.monotonic(), time.process_time() - begun_cpu_s
        say("loaded", complete=True, begun_at=begun_at, ended_at=ended_at, cpu_s=cpu_s, failures=())

    def _parts(self) -> list[memoryview]:
        return [memory.view(0, memory.nbytes) for memory in self._memories]


def checkpoint(settings: dict[str, Any]) -> tuple[Manifest, list[bytearray] | None]:
    """The source makes the checkpoint and writes its manifest, which the others read."""
    manifest_file = Path(settings["manifest"])
    if not settings["source"]:
        return Manifest.from_json(manifest_file.read_bytes()), None
    manifest, content = synthetic.make(settings["nbytes"])
    manifest_file.write_bytes(manifest.to_json())
    return manifest, content


async def run(settings: dict[str, Any]) -> None:
    """Serve and obey until stdin ends."""
    manifest, content = checkpoint(settings)
    node = Node(host=settings["host"], manifest=manifest, content=content)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    peer_pb2_grpc.add_PeerServiceServicer_to_server(cast(Any, PeerServicer)(node.holdings), server)
    port = server.add_insecure_port(f"{settings['host']}:0")
    await server.start()
    say("ready", address=f"{settings['host']}:{port}", data_address=node.data.address)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        command = json.loads(line)
        # In a thread, as the worker's engine is: the loop keeps answering peers.
        await asyncio.to_thread(getattr(node, command.pop("do")), **command)
    await server.stop(0)
    node.data.close()


if __name__ == "__main__":
    asyncio.run(run(json.loads(sys.argv[1])))
