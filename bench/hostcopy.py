"""How fast a checkpoint comes out of host memory, beside a peer's over TCP and the disk of the same node.

    python -m bench.hostcopy [--mib 512] [--rounds 5]

A process of its own serves a checkpoint of random bytes from an arena, as an agent does. This one loads it into fresh
memory with the real transfer, every chunk checked: through shared memory, over TCP on the loopback, from packed files
that are cached and from packed files that are not. `in place` is what not copying would save: every page of the mapped
arena touched once. Medians of the rounds; the last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import grpc
from layercast.peer.v1alpha1 import peer_pb2_grpc

from bench import report, synthetic
from layercast_agent.arena import Arena
from layercast_agent.holdings import MEMORY_RANK, SERVER_OPTIONS, Holding, Holdings
from layercast_agent.layout import Manifest
from layercast_agent.packing import MANIFEST_FILE, segment_file
from layercast_agent.regions import HostMemory, RegionTable
from layercast_agent.residency import Residency
from layercast_agent.runner import TransferOutcome, TransferRunner, UpstreamSpec
from layercast_agent.safetensors_header import packed_header
from layercast_agent.transport.shm import ShmServer
from layercast_agent.transport.shm_link import ArenaMaps, map_now
from layercast_agent.transport.tcp import EgressLimiter, TcpServer

TOKEN = b"a token of the benchmark"
DEADLINE_S = 120.0


class Peers(peer_pb2_grpc.PeerServiceServicer):
    """Tells what the arena holds."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings

    async def WatchResidency(self, request: Any, context: Any) -> Any:
        async for message in self._holdings.watch_residency(request, context):
            yield message


async def serve(nbytes: int, socket: Path) -> None:
    """The agent's side: fills an arena, serves it, ends with its standard input."""
    manifest, data = synthetic.make(nbytes)
    arena, table, holdings = Arena(nbytes + (64 << 20)), RegionTable(), Holdings()
    arena.touch()
    memories = [arena.allocate(segment.nbytes, unit=manifest.chunk_bytes) for segment in manifest.segments]
    for memory, content in zip(memories, data, strict=True):
        memory.view(0, memory.nbytes)[:] = content
    residency = Residency(manifest, complete=True)
    regions = tuple(table.add(memory) for memory in memories)
    holdings.add(Holding(manifest=manifest, files={}, residency=residency, regions=regions, rank=MEMORY_RANK))
    shm = ShmServer(table, arena=arena, token=TOKEN, path=socket)
    shm.start()
    tcp = TcpServer(table, token=TOKEN, host="127.0.0.1", port=0, limiter=EgressLimiter(None))
    tcp.start()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    peer_pb2_grpc.add_PeerServiceServicer_to_server(cast(Any, Peers)(holdings), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port} {tcp.address}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


def load(manifest: Manifest, upstream: UpstreamSpec) -> float:
    """Seconds of one load into memory that nobody has touched."""
    memories = [HostMemory(segment.nbytes) for segment in manifest.segments]
    ended = threading.Event()
    outcomes: list[TransferOutcome] = []

    def on_end(outcome: TransferOutcome) -> None:
        outcomes.append(outcome)
        ended.set()

    runner = TransferRunner(
        transfer_id="bench",
        manifest=manifest,
        memories=memories,
        residency=Residency(manifest),
        upstreams=[upstream],
        generation=1,
        segment_order=(),
        token=TOKEN,
        on_segment=lambda segment: None,
        on_end=on_end,
    )
    began = time.perf_counter()
    runner.start()
    if not ended.wait(DEADLINE_S) or not outcomes[0].complete:
        raise SystemExit(f"a load did not end well: {outcomes} {runner.status().failures}")
    return time.perf_counter() - began


def write_packed(manifest: Manifest, data: list[bytearray], folder: Path) -> None:
    """The same checkpoint as a packed folder."""
    (folder / MANIFEST_FILE).write_bytes(manifest.to_json())
    for segment, content in zip(manifest.segments, data, strict=True):
        with (folder / segment_file(segment.index)).open("wb") as file:
            file.write(packed_header(segment))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def forget_pages(folder: Path) -> None:
    """Has the kernel drop the files from its cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch_in_place(socket: Path) -> float:
    """Seconds to map the arena and read a byte of every page."""
    began = time.perf_counter()
    data = map_now(socket, token=TOKEN, deadline_s=5, maps=ArenaMaps()).data
    sum(data[::4096])
    return time.perf_counter() - began


@contextlib.contextmanager
def serving(nbytes: int, socket: Path) -> Iterator[UpstreamSpec]:
    """Runs the other process; gives the way to reach it through shared memory."""
    command = [sys.executable, "-m", "bench.hostcopy", "--mib", str(nbytes >> 20), "--serve", str(socket)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address, data_address = process.stdout.readline().split()
        yield UpstreamSpec(peer_id="agent", address=address, data_address=data_address, memory_socket=socket)
    finally:
        process.kill()
        process.wait()


def measure(nbytes: int, rounds: int) -> None:
    """The table and the JSON line."""
    print(report.hardware())
    manifest, data = synthetic.make(nbytes)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder, socket = Path(name) / "packed", Path(name) / "memory.sock"
        folder.mkdir()
        write_packed(manifest, data, folder)
        data.clear()
        with serving(nbytes, socket) as near:
            far = UpstreamSpec(peer_id="peer", address=near.address, data_address=near.data_address)
            disk = UpstreamSpec(peer_id="disk", local_folder=folder)

            def cold() -> float:
                forget_pages(folder)
                return load(manifest, disk)

            ways: dict[str, Callable[[], float]] = {
                "shm": lambda: load(manifest, near),
                "tcp": lambda: load(manifest, far),
                "disk_warm": lambda: load(manifest, disk),
                "disk_cold": cold,
                "in_place": lambda: touch_in_place(socket),
            }
            for way in ways.values():
                way()  # once for imports and caches
            seconds = {name: [way() for _ in range(rounds)] for name, way in ways.items()}
    rates = {name: manifest.nbytes / 1e6 / statistics.median(times) for name, times in seconds.items()}
    rows = [
        [name, f"{statistics.median(seconds[name]):.3f}", f"{rate:.0f}", f"{rate / rates['tcp']:.2f}"]
        for name, rate in rates.items()
    ]
    print(report.table(["way", "seconds", "MB/s", "x tcp"], rows))
    ratios = {
        "shm_over_tcp": rates["shm"] / rates["tcp"],
        "shm_over_disk_cold": rates["shm"] / rates["disk_cold"],
    }
    values = {f"{name}_mb_per_s": rate for name, rate in rates.items()}
    print(report.last_line({"bytes": manifest.nbytes, **values, **ratios}))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.hostcopy", description=__doc__)
    parser.add_argument("--mib", type=int, default=512, help="size of the checkpoint (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="loads each way (%(default)s)")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.serve is not None:
        asyncio.run(serve(flags.mib << 20, flags.serve))
    else:
        measure(flags.mib << 20, flags.rounds)


if __name__ == "__main__":
    main()
