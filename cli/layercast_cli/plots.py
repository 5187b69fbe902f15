"""The picture of a demo run: demand, replicas and time to first token on one time axis.

Matplotlib's object interface without pyplot: no global state, no display, two themes from one function.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layercast_cli import words
from layercast_cli.records import BURST, LOW, REFERENCE, STEADY, DemoRecord, RequestRecord, Sample
from layercast_cli.summary import Summary

RATE_WINDOW_S = 4.0
LABELS = {REFERENCE: "reference answers", STEADY: "steady", BURST: "burst", LOW: "low demand"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """Colours of one picture."""

    paper: str
    ink: str
    faint: str
    grid: str
    burst: str
    queue: str
    rate: str
    mark: str
    bad: str
    before: str
    during: str
    after: str
    replicas: tuple[str, ...]


LIGHT = Theme(
    paper="#ffffff",
    ink="#1f2430",
    faint="#697080",
    grid="#e6e8ee",
    burst="#fff1d6",
    queue="#8a93a8",
    rate="#c2570c",
    mark="#b3123f",
    bad="#b3123f",
    before="#697080",
    during="#c2570c",
    after="#0f766e",
    replicas=("#1d4ed8", "#0891b2", "#0f9f6e", "#7c3aed", "#b45309", "#be185d"),
)
DARK = Theme(
    paper="#14161c",
    ink="#e7e9f0",
    faint="#9aa1b2",
    grid="#2a2e38",
    burst="#33291a",
    queue="#7d869c",
    rate="#f59e4b",
    mark="#fb7195",
    bad="#fb7195",
    before="#9aa1b2",
    during="#f59e4b",
    after="#34d3b4",
    replicas=("#6b9bff", "#38bdd8", "#3ecf9a", "#a98bfa", "#e0a458", "#f178b6"),
)


def draw(record: DemoRecord, summary: Summary, *, theme: Theme = LIGHT) -> bytes:
    """The picture as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.2), dpi=150, facecolor=theme.paper, layout="constrained")
    demand, replicas, ttft = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1.15, 1.15))
    for panel in (demand, replicas, ttft):
        _dress(panel, theme)
    draw_demand(demand, record, theme)
    draw_replicas(replicas, record, theme)
    draw_ttft(ttft, record, summary, theme)
    _mark_phases((demand, replicas, ttft), record, theme)
    _mark_scale((demand, replicas, ttft), record, summary, theme)
    figure.suptitle(title(record, summary), color=theme.ink, fontsize=11.5, x=0.01, ha="left")
    ttft.set_xlabel("seconds since the first request", color=theme.faint)
    ttft.set_xlim(0, max(1.0, record.ended_at - origin(record)))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", facecolor=theme.paper)
    return picture.getvalue()


def title(record: DemoRecord, summary: Summary) -> str:
    """The run in one line."""
    served = (
        f"{summary.requests} requests, {len(summary.failed)} failed, {len(summary.mismatched)} wrong answers"
    )
    if summary.scale is None:
        return f"{served}; no scale-up"
    change = f"{summary.scale.replicas_from} → {summary.scale.replicas_to} replicas"
    token = words.duration(summary.decision_to_first_token_s)
    complete = words.duration(summary.scale_s)
    return f"{change} under load: {served}. First new token after {token}, all complete after {complete}."


def origin(record: DemoRecord) -> float:
    """Zero of the time axis: the first request, in unix seconds."""
    return min([each.sent_at for each in record.requests], default=record.started_at)


def draw_demand(panel: Any, record: DemoRecord, theme: Theme) -> None:
    """Requests without a first token (area), and requests sent a second (line, right axis)."""
    zero = origin(record)
    seen = [
        (each.at - zero, each.requests_waiting)
        for each in record.samples
        if each.requests_waiting is not None
    ]
    times, waiting = [at for at, _ in seen], [number for _, number in seen]
    panel.fill_between(times, waiting, step="post", color=theme.queue, alpha=0.35, linewidth=0)
    panel.step(times, waiting, where="post", color=theme.queue, linewidth=1.4)
    panel.set_ylabel("requests waiting", color=theme.queue)
    panel.set_ylim(0, max([4.0, *waiting]) * 1.3)
    right = panel.twinx()
    _dress(right, theme, grid=False)
    moments, rates = sent_rate(record)
    right.plot(moments, rates, color=theme.rate, linewidth=1.6)
    right.set_ylabel("sent per second", color=theme.rate)
    right.set_ylim(0, max([1.0, *rates]) * 1.3)


def sent_rate(record: DemoRecord) -> tuple[list[float], list[float]]:
    """(seconds, requests a second) over a centred window of RATE_WINDOW_S."""
    zero = origin(record)
    sent = sorted(each.sent_at - zero for each in record.requests)
    end = max([0.0, *sent]) + RATE_WINDOW_S
    moments = [step * 0.5 for step in range(int(end / 0.5) + 1)]
    half = RATE_WINDOW_S / 2
    return moments, [sum(1 for at in sent if abs(at - now) <= half) / RATE_WINDOW_S for now in moments]


def draw_replicas(panel: Any, record: DemoRecord, theme: Theme) -> None:
    """Layers resident, stacked by replica; pale while a replica is not complete."""
    zero = origin(record)
    times = [each.at - zero for each in record.samples]
    base = [0.0] * len(times)
    total = max([1, *(each.layers_total for sample in record.samples for each in sample.replicas)])
    names = replica_names(record.samples)
    for place, name in enumerate(names):
        colour = theme.replicas[place % len(theme.replicas)]
        layers = [float(layers_of(sample, name)) for sample in record.samples]
        top = [low + height for low, height in zip(base, layers, strict=True)]
        full = [height >= total for height in layers]
        panel.fill_between(times, base, top, step="post", color=colour, alpha=0.4, linewidth=0)
        panel.fill_between(times, base, top, step="post", where=full, color=colour, alpha=0.85, linewidth=0)
        _name_band(panel, (times, base, top), full, _short(record.samples, name), theme)
        base = top
    most = max(record.wanted_replicas, 1)
    panel.set_yticks(
        [total * number for number in range(most + 1)],
        ["0", *(f"{number} × {total}" for number in range(1, most + 1))],
    )
    panel.set_ylim(0, max([total * most, *base]) * 1.4)
    panel.set_ylabel("layers resident", color=theme.faint)


def replica_names(samples: Sequence[Sample]) -> list[str]:
    """Replica ids in the order of their first appearance."""
    seen: dict[str, None] = {}
    for sample in samples:
        seen |= dict.fromkeys(each.replica_id for each in sample.replicas)
    return list(seen)


def layers_of(sample: Sample, replica_id: str) -> int:
    """Layers of one replica at one moment; 0 when it is not there."""
    return next((each.layers_resident for each in sample.replicas if each.replica_id == replica_id), 0)


def draw_ttft(panel: Any, record: DemoRecord, summary: Summary, theme: Theme) -> None:
    """One dot a request, at the moment it was sent; failures and wrong answers as crosses."""
    zero = origin(record)
    start, end = summary.window or (record.ended_at, record.ended_at)
    groups: dict[str, list[RequestRecord]] = {"at rest": [], "before": [], "during scale-up": [], "after": []}
    for each in record.requests:
        if each.ttft_s is not None:
            groups[_group(each, start, end)].append(each)
    colours = (theme.queue, theme.before, theme.during, theme.after)
    for (label, dots), colour in zip(groups.items(), colours, strict=True):
        panel.scatter(
            [each.sent_at - zero for each in dots],
            [each.ttft_s for each in dots],
            s=20,
            color=colour,
            alpha=0.45 if label == "at rest" else 0.8,
            linewidths=0,
            label=label if dots else None,
        )
    bad = [*summary.failed, *summary.mismatched]
    if bad:
        values = [each.ttft_s if each.ttft_s is not None else each.ended_at - each.sent_at for each in bad]
        moments = [each.sent_at - zero for each in bad]
        panel.scatter(moments, values, s=46, marker="x", color=theme.bad, label="failed or wrong")
    panel.set_ylabel("time to first token, s", color=theme.faint)
    panel.set_ylim(bottom=0)
    if record.requests:
        panel.legend(
            loc="upper left", ncols=5, frameon=False, labelcolor=theme.ink, fontsize=9, handletextpad=0.2
        )
        panel.set_ylim(0, panel.get_ylim()[1] * 1.15)


def _group(request: RequestRecord, start: float, end: float) -> str:
    if request.phase == REFERENCE:
        return "at rest"
    if request.sent_at < start:
        return "before"
    return "during scale-up" if request.sent_at < end else "after"


def _mark_phases(panels: Sequence[Any], record: DemoRecord, theme: Theme) -> None:
    zero = origin(record)
    begins = sorted((at, name) for name, at in record.phase_at.items())
    ends = [*(at for at, _ in begins[1:]), record.ended_at]
    for (begin, name), end in zip(begins, ends, strict=True):
        if name == BURST:
            for panel in panels:
                panel.axvspan(begin - zero, end - zero, color=theme.burst, zorder=0, linewidth=0)
        panels[0].text(
            max(0.0, begin - zero),
            1.02,
            f" {LABELS.get(name, name)}",
            transform=panels[0].get_xaxis_transform(),
            color=theme.faint,
            fontsize=9,
            va="bottom",
        )
        for panel in panels:
            panel.axvline(begin - zero, color=theme.grid, linewidth=1, zorder=0.5)


def _mark_scale(panels: Sequence[Any], record: DemoRecord, summary: Summary, theme: Theme) -> None:
    if summary.scale is None:
        return
    zero = origin(record)
    scale, first = summary.scale, summary.first
    events = [(scale.decided_at, "-", f"decision {scale.replicas_from} → {scale.replicas_to}")]
    if first is not None and first.first_token_at is not None:
        events.append((first.first_token_at, ":", "first token of a new replica"))
    if summary.scale_s is not None:
        events.append((scale.decided_at + summary.scale_s, "--", "all new replicas complete"))
    for place, (at, style, label) in enumerate(events):
        for panel in panels:
            panel.axvline(at - zero, color=theme.mark, linewidth=1.1, linestyle=style, alpha=0.9)
        panels[1].text(
            at - zero,
            0.975 - 0.085 * place,
            f" {label} ",
            transform=panels[1].get_xaxis_transform(),
            color=theme.mark,
            fontsize=8.5,
            va="top",
            bbox={"facecolor": theme.burst, "edgecolor": "none", "alpha": 0.85, "pad": 1},
        )


def _name_band(
    panel: Any,
    band: tuple[Sequence[float], Sequence[float], Sequence[float]],
    full: Sequence[bool],
    name: str,
    theme: Theme,
) -> None:
    """Writes a replica's name where it becomes complete."""
    times, base, top = band
    start = next((place for place, complete in enumerate(full) if complete), None)
    if start is None:
        return
    panel.annotate(
        name,
        (times[start], (base[start] + top[start]) / 2),
        xytext=(8, 0),
        textcoords="offset points",
        color=theme.paper,
        va="center",
        fontsize=9,
        annotation_clip=False,
    )


def _short(samples: Sequence[Sample], replica_id: str) -> str:
    """The node of a replica: shorter than its id, and what a reader knows from the logs."""
    nodes = (each.node for sample in samples for each in sample.replicas if each.replica_id == replica_id)
    return next(nodes, replica_id)


def _dress(panel: Any, theme: Theme, *, grid: bool = True) -> None:
    panel.set_facecolor("none" if not grid else theme.paper)
    panel.tick_params(colors=theme.faint, labelsize=9, length=0)
    for spine in panel.spines.values():
        spine.set_visible(False)
    panel.set_axisbelow(True)
    if grid:
        panel.grid(axis="y", color=theme.grid, linewidth=0.8)
