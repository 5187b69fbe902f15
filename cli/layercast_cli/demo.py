"""`layercast demo`: a real model grows from one replica to three while it serves, and every answer is checked.

This file puts the parts together: the model, the local cluster, the demand, the display, the report. What is asked
when is in `demand`, what the numbers mean in `summary`.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from layercast_cli import shares, words
from layercast_cli.demand import Drive, demand_plan
from layercast_cli.display import DemoView, demo_line, demo_panel, replicas_line
from layercast_cli.local import LocalCluster
from layercast_cli.model import ensure_model, float32_bytes, reserve_bytes
from layercast_cli.modelfile import document_of
from layercast_cli.programs import ClusterSettings
from layercast_cli.records import DemoRecord, Sample
from layercast_cli.report import LATENCY_HEADER, latency_rows, tiles, write_report
from layercast_cli.settings import DemoSettings
from layercast_cli.status import ServiceStatus
from layercast_cli.summary import Summary, percentile, problems, summarize
from layercast_cli.traffic import Traffic

MODEL = "smollm2"
READY_DEADLINE_S = 180.0
DEVICE_MEMORY_BYTES_MAX = 3 << 30
PLAIN_INTERVAL_S = 5.0
RECENT_S = 10.0
# More than ever waits in the demo: it shall show waiting, not refusing.
QUEUE_REQUESTS_MAX = 512


def demo(settings: DemoSettings) -> int:
    """Runs the demo; 0 when every request was answered rightly and the scale-up happened, else 1. Raises CliError."""
    console = Console(highlight=False)
    model_dir = ensure_model(settings.model_dir, report=console.print)
    checkpoint_bytes = float32_bytes(model_dir)
    cluster = LocalCluster(cluster_settings(settings, model_dir, checkpoint_bytes=checkpoint_bytes))
    with sigterm_interrupts(), cluster:
        link = words.gigabytes_per_s(checkpoint_bytes / settings.load_s)
        console.print(
            f"{settings.agents} agents, links of {link}; logs are in {cluster.state.logs}", soft_wrap=True
        )
        board = Board(console, cluster)
        with board:
            cluster.wait_ready(MODEL, deadline_s=READY_DEADLINE_S, seen=board.starting)
            drive = Drive(
                cluster=cluster,
                model=MODEL,
                plan=demand_plan(settings.seconds),
                wanted_replicas=settings.agents,
                seed=settings.seed,
                max_tokens=settings.max_tokens,
                settings=told(settings, checkpoint_bytes=checkpoint_bytes),
                on_sample=board.sampled,
            )
            record = asyncio.run(drive.run())
        console.print("stopping the cluster")
    summary = summarize(record)
    paths = write_report(settings.out, record, summary)
    conclude(console, record, summary)
    console.print(f"report: {paths['report.html']}", soft_wrap=True)
    found = problems(record, summary)
    for each in found:
        print(f"layercast demo: {each}", file=sys.stderr)
    return 1 if found else 0


def cluster_settings(settings: DemoSettings, model_dir: Path, *, checkpoint_bytes: int) -> ClusterSettings:
    """The demo's cluster: links so slow that all layers take `load_s`."""
    memory = shares.device_memory_bytes(shares.available_memory_bytes(), settings.agents)
    return ClusterSettings(
        state_dir=settings.state.root,
        services=(service(model_dir, agents=settings.agents, policy=settings.policy),),
        agents=settings.agents,
        policy=settings.policy,
        port=settings.port,
        link_bytes_per_s=int(checkpoint_bytes / settings.load_s),
        device_memory_bytes=min(DEVICE_MEMORY_BYTES_MAX, memory),
        reserve_bytes=reserve_bytes(checkpoint_bytes),
        # A node that packed the checkpoint in an earlier run would load from its own disk, not over the links.
        fresh=True,
        gateway_flags=("--queue-requests-max", str(QUEUE_REQUESTS_MAX)),
    )


def service(model_dir: Path, *, agents: int, policy: str) -> dict[str, Any]:
    """The demo's ModelService. It starts by recommending only, so that the reference answers are made at rest."""
    spec = {
        # fp32: only there is a greedy answer the same for every batch and every split between replicas.
        "model": {"source": f"file://{model_dir}", "revision": "", "dtype": "float32"},
        "replicas": 1,
        "scaling": {
            "min": 1,
            "max": agents,
            "mode": "Recommend",
            "policy": policy,
            # Wider than the defaults: on a slow machine two waiting prompts are a second of queue already.
            "targets": {
                "queueSeconds": {"low": 0.75, "high": 1.5},
                "kvUtilization": {"low": 0.75, "high": 0.95},
                "prefillTokensPerSecond": 0,
            },
            "windows": {"scaleDownSeconds": 8},
        },
        "serving": {"contextLength": 1024, "batchSize": 16},
        "drain": {"graceSeconds": 20},
    }
    return document_of(MODEL, spec)


def told(settings: DemoSettings, *, checkpoint_bytes: int) -> dict[str, Any]:
    """What the run was asked to do, for the report."""
    return {
        "model": "SmolLM2-135M-Instruct, fp32",
        "policy": settings.policy,
        "agents": settings.agents,
        "cores": len(shares.usable_cores()),
        "checkpoint_bytes": checkpoint_bytes,
        "link_bytes_per_s": int(checkpoint_bytes / settings.load_s),
        "demand_seconds": settings.seconds,
        "max_tokens": settings.max_tokens,
        "seed": settings.seed,
    }


class Board:
    """Shows the run: a live panel in a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, cluster: LocalCluster) -> None:
        self._console = console
        self._cluster = cluster
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._began = time.monotonic()
        self._printed_at = -PLAIN_INTERVAL_S
        self._printed_phase = ""

    def __enter__(self) -> None:
        if self._live is not None:
            self._live.start()

    def __exit__(self, *_error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def starting(self, status: ServiceStatus | None) -> None:
        """While the first replica comes up."""
        line = f"starting: {replicas_line(status)}"
        if self._live is not None:
            self._live.update(line)
        elif line != self._printed_phase:
            self._console.print(line, soft_wrap=True)
            self._printed_phase = line

    def sampled(self, sample: Sample, traffic: Traffic) -> None:
        """At each look at the cluster."""
        view = self._view(sample, traffic)
        if self._live is not None:
            self._live.update(demo_panel(view))
            return
        due = view.elapsed_s - self._printed_at >= PLAIN_INTERVAL_S
        if due or sample.phase != self._printed_phase:
            self._printed_at, self._printed_phase = view.elapsed_s, sample.phase
            self._console.print(demo_line(view), soft_wrap=True, markup=False)

    def _view(self, sample: Sample, traffic: Traffic) -> DemoView:
        recent = [
            each for each in traffic.records if each.token_at and each.token_at[0] >= sample.at - RECENT_S
        ]
        ttft = [each.ttft_s for each in recent if each.ttft_s is not None]
        ok = sum(1 for each in traffic.records if each.ok)
        return DemoView(
            phase=sample.phase,
            elapsed_s=time.monotonic() - self._began,
            sent=traffic.sent,
            ok=ok,
            failed=len(traffic.records) - ok,
            waiting=sample.requests_waiting,
            handoffs=sample.handoffs,
            ttft_p50_s=percentile(ttft, 0.5),
            ttft_p99_s=percentile(ttft, 0.99),
            status=self._cluster.status(MODEL),
        )


def conclude(console: Console, record: DemoRecord, summary: Summary) -> None:
    """The tables at the end."""
    numbers = Table(show_header=False, box=None, padding=(0, 2))
    for value, label in tiles(record, summary):
        numbers.add_row(label, value)
    latency = Table(box=None, padding=(0, 2))
    for place, name in enumerate(LATENCY_HEADER):
        latency.add_column(name, justify="left" if place == 0 else "right")
    for row in latency_rows(summary):
        latency.add_row(*row)
    console.print()
    console.print(numbers)
    console.print()
    console.print(latency)
    console.print()


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does: through every `finally`, so that no process stays behind."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
