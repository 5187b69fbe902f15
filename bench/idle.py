"""`python -m bench.idle`: what an agent costs a node that has nothing to do.

A real `layercast-agent` with one idle worker (a warm process without a replica) is left alone; the figure is the
share of one core that each process uses, the agent's without its worker.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from bench import report

ROOT = Path(__file__).resolve().parent.parent
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
READY_DEADLINE_S = 90.0
END_DEADLINE_S = 20.0


class IdleError(Exception):
    """The agent did not get ready, or died."""


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def cpu_s(pid: int) -> float:
    """CPU seconds of one process so far, all threads, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


@contextlib.contextmanager
def agent(folder: Path, *, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A real agent with one CPU device."""
    token = folder / "token"
    token.write_text("a token of the benchmark")
    flags = {
        "node": "idle",
        "listen": f"127.0.0.1:{port}",
        "data-listen": "127.0.0.1:0",
        "metrics-listen": f"127.0.0.1:{port + 1}",
        "store-dir": str(folder / "store"),
        "run-dir": str(folder / "run"),
        "devices": "cpu:1",
        "device-memory-bytes": str(2**30),
        "token-file": str(token),
    }
    command = [sys.executable, "-m", "layercast_agent"]
    command += [word for flag, value in flags.items() for word in (f"--{flag}", value)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_ready(process: subprocess.Popen[bytes], *, port: int, log: Path) -> None:
    """Until the agent serves and its worker is warm; IdleError when that does not happen."""
    end = time.monotonic() + READY_DEADLINE_S
    while time.monotonic() < end and process.poll() is None:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1),
        ):
            return
        time.sleep(0.2)
    raise IdleError(f"the agent did not get ready:\n{log.read_text()[-2000:]}")


def watch(pids: dict[str, int], *, seconds: float, windows: int) -> dict[str, float]:
    """Share of one core of each process: the median of `windows` windows, which a passing disturbance leaves alone."""
    shares: dict[str, list[float]] = {name: [] for name in pids}
    for _ in range(windows):
        before = {name: cpu_s(pid) for name, pid in pids.items()}
        begun_at = time.monotonic()
        time.sleep(seconds / windows)
        elapsed_s = time.monotonic() - begun_at
        for name, pid in pids.items():
            shares[name].append((cpu_s(pid) - before[name]) / elapsed_s)
    return {name: statistics.median(taken) for name, taken in shares.items()}


def run(*, seconds: float, settle_s: float, port: int) -> dict[str, object]:
    """Start everything, leave it alone, print the table, return the figures."""
    print(report.hardware())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with agent(folder, port=port) as process:
            wait_ready(process, port=port + 1, log=folder / "log")
            time.sleep(settle_s)
            pids = {"agent": process.pid}
            pids |= {f"worker {n}": pid for n, pid in enumerate(children(process.pid))}
            shares = watch(pids, seconds=seconds, windows=4)
    print(report.table(["process", "core"], [[who, f"{share:.2%}"] for who, share in shares.items()]))
    workers = [share for who, share in shares.items() if who != "agent"]
    return {
        "bench": "idle",
        "seconds": seconds,
        "idle_agent_core": shares["agent"],
        "idle_worker_core": max(workers, default=0.0),
    }


def main() -> int:
    """0 when it was measured, 2 when the agent did not start."""
    parser = argparse.ArgumentParser(prog="python -m bench.idle", description=__doc__)
    parser.add_argument("--seconds", type=float, default=24.0)
    parser.add_argument("--settle-s", type=float, default=5.0, help="after the worker is warm")
    parser.add_argument("--port", type=int, default=47310, help="first of two free ports")
    arguments = parser.parse_args()
    try:
        figures = run(seconds=arguments.seconds, settle_s=arguments.settle_s, port=arguments.port)
    except IdleError as error:
        print(f"bench.idle: {error}", file=sys.stderr)
        return 2
    print(report.last_line(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
