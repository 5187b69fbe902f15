"""What a terminal shows while a local cluster runs: pure functions from what was seen to rich renderables
or lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from layercast_cli import words
from layercast_cli.status import ReplicaStatus, ServiceStatus

BAR_CELLS = 24
STATE_STYLE = {
    "serving": "green",
    "live": "yellow",
    "leading": "yellow",
    "loading": "cyan",
    "draining": "magenta",
    "failed": "red",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoView:
    """One moment of a demo run."""

    phase: str
    elapsed_s: float
    sent: int
    ok: int
    failed: int
    waiting: float | None
    handoffs: float | None
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    status: ServiceStatus | None


def demo_panel(view: DemoView) -> RenderableType:
    """The live display of `layercast demo`."""
    grid = Table.grid(padding=(0, 2))
    grid.add_row("phase", Text(view.phase, style="bold"), Text(f"{view.elapsed_s:.0f} s", style="dim"))
    failed = Text(f"{view.failed} failed", style="bold red" if view.failed else "dim")
    grid.add_row("requests", f"{view.sent} sent, {view.ok} answered", failed)
    waiting = "-" if view.waiting is None else f"{view.waiting:.0f} without a first token"
    grid.add_row("queue", waiting, Text(f"{view.handoffs or 0:.0f} handoffs", style="dim"))
    last = f"p50 {words.duration(view.ttft_p50_s)}, p99 {words.duration(view.ttft_p99_s)}"
    grid.add_row("TTFT", last, Text("last 10 s", style="dim"))
    return Group(grid, "", replica_table(view.status))


def demo_line(view: DemoView) -> str:
    """The same as one line, for logs."""
    waiting = "-" if view.waiting is None else f"{view.waiting:.0f}"
    return (
        f"[{view.elapsed_s:5.0f} s] {view.phase}: {view.sent} sent, {view.ok} answered, {view.failed} failed, "
        f"{waiting} waiting, TTFT p50 {words.duration(view.ttft_p50_s)}; {replicas_line(view.status)}"
    )


def replica_table(status: ServiceStatus | None) -> RenderableType:
    """One row a replica with a bar of its resident layers."""
    if status is None or not status.replicas:
        return Text("no replica yet", style="dim")
    table = Table.grid(padding=(0, 2))
    for replica in status.replicas:
        table.add_row(*_replica_cells(replica))
    return table


def replicas_line(status: ServiceStatus | None) -> str:
    """`node-0 serving, node-1 live 12/30 layers 43 %`."""
    if status is None or not status.replicas:
        return "no replica yet"
    return ", ".join(
        f"{each.node} {each.state.lower()}"
        + (f" {each.layers_resident}/{each.layers_total} layers {each.share} %" if each.arriving else "")
        for each in status.replicas
    )


def up_panel(statuses: Sequence[tuple[str, ServiceStatus | None]], footer: Sequence[str]) -> RenderableType:
    """The live display of `layercast up`: each ModelService with its replicas, then fixed lines."""
    parts: list[RenderableType] = []
    for name, status in statuses:
        parts += [_service_line(name, status), replica_table(status), ""]
    return Group(*parts, *(Text(line, style="dim") for line in footer))


def service_words(name: str, status: ServiceStatus | None) -> str:
    """`smollm2  1 of 3 serving, 2 loading`, and what is not as it should be."""
    if status is None:
        return f"{name}: starting"
    parts = [f"{status.serving} of {status.desired} serving"]
    parts += [f"{status.loading} loading"] if status.loading else []
    parts += [f"{status.draining} draining"] if status.draining else []
    waiting = sum(each.requests_waiting for each in status.replicas)
    running = sum(each.requests_running for each in status.replicas)
    parts.append(f"{running} requests running, {waiting} waiting")
    ready = status.condition("Ready")
    if ready is not None and ready.status != "True" and ready.message:
        parts.append(ready.message)
    return f"{name}: {', '.join(parts)}"


def _service_line(name: str, status: ServiceStatus | None) -> Text:
    return Text(service_words(name, status), style="bold")


def _replica_cells(replica: ReplicaStatus) -> list[RenderableType]:
    state = replica.state.lower()
    style = STATE_STYLE.get(state, "")
    bar = words.bar(replica.layers_resident, replica.layers_total, width=BAR_CELLS)
    coming = f"{replica.share} % from {replica.source}, {words.gigabytes_per_s(replica.bytes_per_s)}"
    note = replica.error or (coming if replica.arriving and replica.source else "")
    return [
        Text(f"  {replica.node}"),
        Text(state, style=style),
        Text(bar, style=style),
        Text(f"{replica.layers_resident}/{replica.layers_total} layers"),
        Text(f"{replica.requests_running} running"),
        Text(note, style="red" if replica.error else "dim"),
    ]
