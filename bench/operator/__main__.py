"""`python -m bench.operator`: what the operator costs with many ModelServices, and how fast it acts.

A real `layercast-operator` process; nodes and a gateway that speak the real protocols and do nothing
(`bench.operator.fleet`, a process of its own). With KUBECONFIG the ModelServices are objects of that API server,
else files of a folder. Measured: its CPU and memory when all is settled, the time from a changed object to the
command at an agent, and the time from demand on a gateway's page to that command.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

from bench.idle import cpu_s
from bench.operator.objects import ApiObjects, FolderObjects

from bench import report

READY_DEADLINE_S = 420.0
ACT_DEADLINE_S = 20.0


class OperatorBenchError(Exception):
    """Something did not happen in time."""


class Objects(Protocol):
    """Where ModelServices are kept."""

    def flags(self) -> list[str]:
        """What the operator is told about it."""

    async def prepare(self, agents: dict[str, str], gateway: str, models: list[str]) -> None:
        """Everything is there."""

    async def set_replicas(self, model: str, replicas: int) -> None:
        """Change one object."""

    async def close(self) -> None:
        """Nothing is left."""


class Fleet:
    """The process with the nodes and the gateway."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._waiting: dict[str, asyncio.Future[float]] = {}
        self._reader: asyncio.Task[None] | None = None
        self.started = 0

    async def start(self, *, nodes: int, devices: int, models: int) -> tuple[dict[str, str], str]:
        """Addresses of the agents and of the gateway."""
        command = [sys.executable, "-m", "bench.operator.fleet"]
        command += ["--nodes", str(nodes), "--devices", str(devices), "--models", str(models)]
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=1 << 20)
        first = json.loads(await self._line())
        self._reader = asyncio.create_task(self._read())
        return first["agents"], first["gateway"]

    async def demand(self, model: str, tokens: float) -> None:
        """From now on the gateway tells so many waiting tokens."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps({"demand": {model: tokens}}).encode() + b"\n")
        await self._process.stdin.drain()

    def next_start(self, model: str) -> asyncio.Future[float]:
        """When the next replica of a model is started, in seconds since the epoch."""
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting[model] = future
        return future

    async def stop(self) -> None:
        """End the process."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            await self._process.wait()
        if self._reader is not None:
            await self._reader

    async def _line(self) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        return await self._process.stdout.readline()

    async def _read(self) -> None:
        while line := await self._line():
            told = json.loads(line)
            self.started += 1
            future = self._waiting.pop(told["started"], None)
            if future is not None and not future.done():
                future.set_result(told["at"])


@contextlib.asynccontextmanager
async def operator(flags: list[str], folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A real operator."""
    command = [sys.executable, "-m", "layercast_operator", "--listen", "127.0.0.1:0"]
    command += ["--metrics-listen", "127.0.0.1:0", *flags]
    with (folder / "operator.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stderr=log)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(20):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


async def reach(fleet: Fleet, count: int, process: asyncio.subprocess.Process, log: Path) -> float:
    """Seconds until so many replicas were started."""
    begun_at = time.monotonic()
    while fleet.started < count:
        if process.returncode is not None or time.monotonic() - begun_at > READY_DEADLINE_S:
            said = await asyncio.to_thread(log.read_text)
            raise OperatorBenchError(f"{fleet.started} of {count} replicas: {said[-2000:]}")
        await asyncio.sleep(0.2)
    return time.monotonic() - begun_at


async def settled_core(pid: int, seconds: float) -> float:
    """Share of one core: the median of four windows."""
    shares = []
    for _ in range(4):
        before, begun_at = cpu_s(pid), time.monotonic()
        await asyncio.sleep(seconds / 4)
        shares.append((cpu_s(pid) - before) / (time.monotonic() - begun_at))
    return statistics.median(shares)


async def latencies(fleet: Fleet, models: list[str], signal_to: Any) -> list[float]:
    """Seconds from each signal to the command that it brought."""
    found = []
    for model in models:
        started = fleet.next_start(model)
        at = time.time()
        await signal_to(model)
        try:
            async with asyncio.timeout(ACT_DEADLINE_S):
                found.append(await started - at)
        except TimeoutError:
            raise OperatorBenchError(f"nothing was started for {model} in {ACT_DEADLINE_S:g} s") from None
        await asyncio.sleep(0.137)  # not in step with the operator's ticks
    return found


async def measure(given: argparse.Namespace) -> dict[str, object]:
    """The whole benchmark."""
    models = [f"m{n}" for n in range(given.models)]
    total = given.models * given.replicas
    nodes = total // given.devices + 1 + 2 * given.probes // given.devices + 1
    fleet = Fleet()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kubernetes = bool(os.environ.get("KUBECONFIG")) and not given.folder
        objects: Objects = ApiObjects(given.replicas) if kubernetes else FolderObjects(folder, given.replicas)
        try:
            agents, gateway = await fleet.start(nodes=nodes, devices=given.devices, models=given.models)
            await objects.prepare(agents, gateway, models)
            async with operator(objects.flags(), folder) as process:
                ready_s = await reach(fleet, total, process, folder / "operator.log")
                await asyncio.sleep(given.settle_s)
                core = await settled_core(process.pid, given.seconds)
                changed = await latencies(
                    fleet,
                    models[: given.probes],
                    lambda model: objects.set_replicas(model, given.replicas + 1),
                )
                signalled = await latencies(
                    fleet, models[-given.probes :], lambda model: fleet.demand(model, 5000.0)
                )
                rss = rss_bytes(process.pid)
        finally:
            await objects.close()
            await fleet.stop()
    return {
        "bench": "operator",
        "where": "kubernetes" if kubernetes else "folder",
        "modelservices": given.models,
        "replicas": total,
        "nodes": nodes,
        "all_started_s": ready_s,
        "settled_core": core,
        "rss_mb": rss / 1e6,
        "changed_object_p50_s": statistics.median(changed),
        "changed_object_max_s": max(changed),
        "signal_p50_s": statistics.median(signalled),
        "signal_max_s": max(signalled),
    }


def main() -> int:
    """0 when it was measured, 2 when something did not happen."""
    parser = argparse.ArgumentParser(prog="python -m bench.operator", description=__doc__)
    parser.add_argument("--models", type=int, default=500)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--devices", type=int, default=8, help="of each node")
    parser.add_argument("--probes", type=int, default=20, help="how many changes and signals are timed")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long CPU is measured")
    parser.add_argument("--settle-s", type=float, default=10.0)
    parser.add_argument("--folder", action="store_true", help="files, even when there is a KUBECONFIG")
    given = parser.parse_args()
    print(report.hardware())
    try:
        figures = asyncio.run(measure(given))
    except OperatorBenchError as error:
        print(f"bench.operator: {error!r}", file=sys.stderr)
        return 2
    rows = [
        [key, f"{value:.3f}" if isinstance(value, float) else str(value)] for key, value in figures.items()
    ]
    print(report.table(["figure", "value"], rows))
    print(report.last_line(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
