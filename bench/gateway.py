"""`python -m bench.gateway`: what the gateway carries, and what it adds to a request.

Capacity: a real gateway alone on one core, against a worker stub that executes nothing (`gateway_stub`) and takes a
step every two milliseconds (`--step-ms`), all running requests in one message, as a worker does; clients and stub have
another core. Short requests (not streamed) and streams (server-sent events) alternate. Because clients
written in Python may be the slower side, rates per second of the gateway's own processor time stand beside the rates
per second: those are what one core carries.

Overhead: one real replica of SmolLM2 behind gateway and worker loop, and the bare engine in another process, get the
same prompts in turns, one request at a time; the difference of each pair is what stands around the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from bench.gateway_overhead import PROMPT, PROMPT_TOKENS, BenchError, overhead
from bench.gateway_stub import MODEL
from bench.idle import cpu_s

from bench import report
from layercast_cli.errors import CliError
from layercast_cli.model import ensure_model
from layercast_cli.ports import free_ports
from layercast_cli.settings import default_model_dir

ROOT = Path(__file__).resolve().parent.parent
READY_DEADLINE_S = 60.0
END_DEADLINE_S = 10.0
SHORT_TOKENS = 4
STREAM_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One kind of request, and how many go on at once."""

    name: str
    stream: bool
    max_tokens: int
    concurrency: int


LOADS = (
    Load(name="short requests", stream=False, max_tokens=SHORT_TOKENS, concurrency=64),
    Load(name="streams", stream=True, max_tokens=STREAM_TOKENS, concurrency=64),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """One window: answers, their tokens, seconds, and processor seconds of the gateway."""

    requests: int
    tokens: int
    elapsed_s: float
    cpu_s: float


# --- one client ------------------------------------------------------------------------------


class Client:
    """One connection that asks again as soon as it was answered."""

    def __init__(self, host: str, port: int, load: Load) -> None:
        self._place = (host, port)
        self._load = load
        asked: dict[str, Any] = {
            "model": MODEL,
            "prompt": PROMPT,
            "max_tokens": load.max_tokens,
            "temperature": 0,
        }
        if load.stream:
            asked |= {"stream": True, "stream_options": {"include_usage": True}}
        body = json.dumps(asked).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        self._request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        self._usage = f'"completion_tokens":{load.max_tokens}'.encode()
        self.answered = 0

    async def run(self) -> None:
        """Until it is cancelled. BenchError: an answer is not what was asked for."""
        reader, writer = await asyncio.open_connection(*self._place, limit=1 << 20)
        try:
            while True:
                writer.write(self._request)
                head = await reader.readuntil(b"\r\n\r\n")
                if b" 200 " not in head[:20]:
                    raise BenchError(f"the gateway answered {head[:60]!r}")
                body = await (self._streamed(reader) if self._load.stream else self._whole(reader, head))
                if self._usage not in body:
                    raise BenchError(f"an answer does not have its tokens: {body[-300:]!r}")
                self.answered += 1
        finally:
            writer.close()

    async def _whole(self, reader: asyncio.StreamReader, head: bytes) -> bytes:
        length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
        return await reader.readexactly(int(length))

    async def _streamed(self, reader: asyncio.StreamReader) -> bytes:
        """The last two pieces of a chunked body; its end is the chunk of size 0."""
        last = b""
        while True:
            piece = await reader.read(1 << 16)
            if not piece:
                raise BenchError("the gateway closed a stream before its end")
            last = last[-1024:] + piece
            if last.endswith(b"0\r\n\r\n"):
                return last


async def window(host: str, port: int, load: Load, *, pid: int, seconds: float) -> Carried:
    """Ask for `seconds` with warm connections, counting whole answers only."""
    clients = [Client(host, port, load) for _ in range(load.concurrency)]
    tasks = [asyncio.create_task(client.run()) for client in clients]
    try:
        await asyncio.wait(tasks, timeout=1.0, return_when=asyncio.FIRST_EXCEPTION)
        before, began, used = sum(c.answered for c in clients), time.monotonic(), cpu_s(pid)
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        elapsed, used = time.monotonic() - began, cpu_s(pid) - used
        requests = sum(c.answered for c in clients) - before
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return Carried(requests=requests, tokens=requests * load.max_tokens, elapsed_s=elapsed, cpu_s=used)


# --- the processes ---------------------------------------------------------------------------


@contextlib.contextmanager
def running(command: list[str], *, core: int, log: Path) -> Iterator[subprocess.Popen[str]]:
    """A process on one core, ended with the block."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=log.parent,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        os.sched_setaffinity(process.pid, {core})
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=END_DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def wait_ready(url: str, gateway: subprocess.Popen[str], log: Path) -> None:
    """Until the gateway says that it can serve."""
    end = time.monotonic() + READY_DEADLINE_S
    while time.monotonic() < end and gateway.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1):
            return
        time.sleep(0.1)
    raise BenchError(f"the gateway did not get ready:\n{log.read_text()[-2000:]}")


def capacity(model_dir: Path, *, rounds: int, seconds: float, step_s: float) -> dict[str, list[Carried]]:
    """Windows of every kind of load, in turns; the gateway has one core, all others the rest."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise BenchError("two cores are needed: one for the gateway, one for those who ask it")
    found: dict[str, list[Carried]] = {load.name: [] for load in LOADS}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        command = [sys.executable, "-m", "bench.gateway_stub", str(model_dir), str(step_s)]
        stub = stack.enter_context(running(command, core=cores[1], log=folder / "stub"))
        assert stub.stdout is not None
        line = stub.stdout.readline()
        if not line:
            raise BenchError((folder / "stub").read_text()[-2000:])
        with free_ports("127.0.0.1", 1) as ports:
            port = next(iter(ports))
        flags = ["--listen", f"127.0.0.1:{port}", "--operator", json.loads(line)["operator"]]
        flags += ["--window-requests", "256", "--log-level", "warning"]
        command = [sys.executable, "-m", "layercast_gateway", *flags]
        gateway = stack.enter_context(running(command, core=cores[0], log=folder / "gateway"))
        wait_ready(f"http://127.0.0.1:{port}/readyz", gateway, folder / "gateway")
        everywhere = os.sched_getaffinity(0)
        os.sched_setaffinity(0, set(cores[1:]))
        stack.callback(os.sched_setaffinity, 0, everywhere)
        for _ in range(rounds):
            for load in LOADS:
                one = window("127.0.0.1", port, load, pid=gateway.pid, seconds=seconds)
                found[load.name].append(uvloop.run(one))
    return found


# --- the table -------------------------------------------------------------------------------


def show(found: Mapping[str, list[Carried]]) -> str:
    """Medians of the windows."""
    rows = []
    for name, windows in found.items():
        cells = [
            _median(windows, lambda w: w.requests / w.elapsed_s),
            _median(windows, lambda w: w.tokens / w.elapsed_s),
            _median(windows, lambda w: w.requests / w.cpu_s),
            _median(windows, lambda w: w.tokens / w.cpu_s),
        ]
        busy = _median(windows, lambda w: w.cpu_s / w.elapsed_s)
        rows.append([name, *(f"{cell:,.0f}" for cell in cells), f"{busy:.0%}"])
    header = ["", "requests/s", "tokens/s", "requests/core s", "tokens/core s", "gateway's core busy"]
    return report.table(header, rows)


def _median(windows: list[Carried], figure: Callable[[Carried], float]) -> float:
    return statistics.median(figure(each) for each in windows)


def run(arguments: argparse.Namespace, model_dir: Path) -> dict[str, object]:
    """Measure what was asked for, print the tables, return the figures."""
    print(report.hardware())
    found = capacity(
        model_dir, rounds=arguments.rounds, seconds=arguments.seconds, step_s=arguments.step_ms / 1000
    )
    print(show(found))
    short, streams = found[LOADS[0].name], found[LOADS[1].name]
    values: dict[str, object] = {
        "bench": "gateway",
        "short_requests_per_core_s": _median(short, lambda w: w.requests / w.cpu_s),
        "streamed_tokens_per_core_s": _median(streams, lambda w: w.tokens / w.cpu_s),
        "short_requests_per_s": _median(short, lambda w: w.requests / w.elapsed_s),
        "streamed_tokens_per_s": _median(streams, lambda w: w.tokens / w.elapsed_s),
    }
    if arguments.pairs:
        rows = []
        for new in (1, 16):
            taken = overhead(model_dir, pairs=arguments.pairs, new=new)
            through, bare = (statistics.median(each[side] for each in taken) for side in (0, 1))
            added = statistics.median(a - b for a, b in taken)
            cells = [through, bare, added]
            rows.append([f"{PROMPT_TOKENS} tokens in, {new} out", *(f"{1000 * s:.1f}" for s in cells)])
            values[f"overhead_ms_{new}_tokens"] = 1000 * added
        print(report.table(["one request", "whole ms", "bare engine ms", "median difference ms"], rows))
    return values


def main() -> int:
    """0 when everything was measured, 2 when this machine cannot."""
    parser = argparse.ArgumentParser(prog="python -m bench.gateway", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of one window")
    parser.add_argument("--step-ms", type=float, default=2.0, help="of the stub; 0: a message a token")
    parser.add_argument("--pairs", type=int, default=60, help="of requests for the overhead; 0 leaves it out")
    parser.add_argument("--model-dir", type=Path, default=default_model_dir())
    arguments = parser.parse_args()
    try:
        model_dir = ensure_model(arguments.model_dir, report=lambda line: print(line, file=sys.stderr))
        values = run(arguments, model_dir)
    except (BenchError, CliError) as error:
        print(f"bench.gateway: {error}", file=sys.stderr)
        return 2
    print(report.last_line(values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
