"""Two pictures of the runs: who waited how long (distributions), and when (over the time of the run)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from bench.live.arrivals import Shape
from bench.live.play import Played

from layercast_cli.plots import LIGHT

COLOURS = {
    "live": "#0f766e",
    "stop-the-world": "#c2570c",
    "network": "#8a5a00",
    "ttl-cache": "#b3123f",
    "host-cache": "#1d4ed8",
    "static": "#697080",
    "static-average": "#a3a9b8",
}
WINDOW_S = 2.0


def draw(runs: Mapping[str, Played], shape: Shape, *, title: str) -> bytes:
    """The pictures as one PNG: on top two distributions, below two time series."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), dpi=150, facecolor=LIGHT.paper, layout="constrained")
    panels = figure.subplots(2, 2)
    for panel in panels.flat:
        panel.grid(True, color=LIGHT.grid, linewidth=0.8)
        panel.set_axisbelow(True)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    for policy, played in runs.items():
        colour = COLOURS.get(policy, LIGHT.ink)
        answered = [each for each in played.requests if each.ok]
        ttft = [each.ttft_s for each in answered if each.ttft_s is not None]
        _distribution(panels[0][0], ttft, policy, colour)
        _distribution(panels[0][1], [gap for each in answered for gap in each.tbt_s], policy, colour)
        _over_time(panels[1][0], played, colour)
        _replicas(panels[1][1], played, shape, colour)
    _name(panels[0][0], "time to first token, s", "part of the requests")
    _name(panels[0][1], "time between tokens, s", "part of the tokens")
    _name(panels[1][0], "sent, seconds of the run", "time to first token, s (median of 2 s)")
    _name(panels[1][1], "seconds of the run", "replicas held")
    panels[1][0].set_xlim(0, shape.seconds)
    panels[1][1].set_ylim(bottom=0)
    panels[0][0].legend(frameon=False)
    figure.suptitle(title, color=LIGHT.ink, fontsize=11.5, x=0.01, ha="left")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", facecolor=LIGHT.paper)
    return picture.getvalue()


def _distribution(panel: Any, values: Sequence[float], name: str, colour: str) -> None:
    ordered = sorted(values)
    shares = [(place + 1) / len(ordered) for place in range(len(ordered))]
    panel.plot(ordered, shares, color=colour, linewidth=1.6, label=name)


def _over_time(panel: Any, played: Played, colour: str) -> None:
    windows: dict[int, list[float]] = {}
    for each in played.requests:
        if each.ttft_s is not None:
            windows.setdefault(int((each.sent_at - played.started_at) / WINDOW_S), []).append(each.ttft_s)
    places = sorted(windows)
    middle = [sorted(windows[place])[len(windows[place]) // 2] for place in places]
    panel.plot([(place + 0.5) * WINDOW_S for place in places], middle, color=colour, linewidth=1.6)


def _replicas(panel: Any, played: Played, shape: Shape, colour: str) -> None:
    inside = [each for each in played.samples if 0 <= each.at - played.started_at <= shape.seconds]
    times = [each.at - played.started_at for each in inside]
    panel.step(times, [len(each.replicas) for each in inside], where="post", color=colour, linewidth=1.6)


def _name(panel: Any, across: str, up: str) -> None:
    panel.set_xlabel(across, color=LIGHT.faint)
    panel.set_ylabel(up, color=LIGHT.faint)
