"""The report of a demo run: one HTML file with everything in it, and the files beside it."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from layercast_cli import plots, words
from layercast_cli.records import DemoRecord
from layercast_cli.state import write_atomic
from layercast_cli.summary import Latency, Summary, problems, result, scale_ups
from layercast_cli.timeline import chart

TIMELINE_WIDTH = 96
PICTURE_ALT = "Requests waiting and sent, layers resident by replica, and time to first token, over time"

STYLE = """
:root { color-scheme: light dark; --paper:#fff; --ink:#1f2430; --faint:#5f6675; --line:#e2e5ec; --card:#f6f7fa;
        --good:#0f766e; --bad:#b3123f; }
@media (prefers-color-scheme: dark) { :root { --paper:#14161c; --ink:#e7e9f0; --faint:#9aa1b2; --line:#2a2e38;
        --card:#1b1e26; --good:#34d3b4; --bad:#fb7195; } }
body { margin:0 auto; max-width:1060px; padding:2rem 1.25rem 4rem; background:var(--paper); color:var(--ink);
       font:16px/1.55 system-ui, sans-serif; }
h1 { font-size:1.7rem; margin:0 0 .2rem; } h2 { font-size:1.15rem; margin:2.4rem 0 .7rem; }
p, li { max-width:46rem; } .faint { color:var(--faint); }
.verdict { font-weight:600; color:var(--good); } .verdict.bad { color:var(--bad); }
.tiles { display:grid; grid-template-columns:repeat(auto-fit, minmax(13rem, 1fr)); gap:.7rem; margin:1.3rem 0; }
.tile { background:var(--card); border-radius:10px; padding:.75rem .9rem; }
.tile b { display:block; font-size:1.45rem; font-variant-numeric:tabular-nums; }
.tile span { color:var(--faint); font-size:.85rem; }
table { border-collapse:collapse; font-variant-numeric:tabular-nums; } .wide { overflow-x:auto; }
th, td { padding:.35rem .9rem .35rem 0; border-bottom:1px solid var(--line); text-align:right; }
th:first-child, td:first-child { text-align:left; } th { color:var(--faint); font-weight:500; font-size:.88rem; }
img { width:100%; height:auto; border-radius:10px; }
pre { background:var(--card); border-radius:10px; padding:.9rem 1rem; overflow-x:auto; font-size:.82rem;
      line-height:1.35; }
"""

HOW_TO_READ = """
<ul>
<li><b>Top.</b> The grey area is how many accepted requests have no token yet; the line is how many were sent each
second. In the burst, more is sent than one replica can answer.</li>
<li><b>Middle.</b> Transformer layers in device memory, one colour for each replica. Pale means that the replica is
still loading: with the live policy it already executes the layers it has, and hands the request over to the replica
that it loads from, which executes the rest.</li>
<li><b>Bottom.</b> One dot for each request, at the moment it was sent: how long its client waited for the first
token. Crosses are requests that failed or whose answer differed.</li>
<li>A greedy answer in fp32 has one right text: the one that the single replica gave to the same prompt when nothing
else was going on. Every answer of the run is compared with it.</li>
<li>All agents share this one machine and the links between them are slowed down on purpose, so look at ratios and
at the order of events, not at tokens per second.</li>
</ul>
"""


def write_report(folder: Path, record: DemoRecord, summary: Summary) -> dict[str, Path]:
    """Writes result.json, records.json, scale.png and report.html into `folder`; the paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    light, dark = plots.draw(record, summary), plots.draw(record, summary, theme=plots.DARK)
    paths = {name: folder / name for name in ("result.json", "records.json", "scale.png", "report.html")}
    numbers = json.dumps(result(record, summary), indent=2, ensure_ascii=False)
    write_atomic(paths["result.json"], numbers + "\n")
    write_atomic(paths["records.json"], json.dumps(record.as_json(), ensure_ascii=False) + "\n")
    paths["scale.png"].write_bytes(light)
    write_atomic(paths["report.html"], page(record, summary, light=light, dark=dark))
    return paths


def page(record: DemoRecord, summary: Summary, *, light: bytes, dark: bytes) -> str:
    """The report as one HTML document that needs nothing from anywhere."""
    charts = [chart(each, name="new replicas", width=TIMELINE_WIDTH) for each in scale_ups(record)]
    timeline = escape("\n\n".join(charts)) if charts else "no scale-up"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Layercast demo</title><style>{STYLE}</style></head><body>
<h1>Layercast demo</h1>
<p class="faint">{escape(_what(record))}</p>
{_verdict(problems(record, summary))}
<div class="tiles">{"".join(_tile(value, label) for value, label in tiles(record, summary))}</div>
<picture><source srcset="{_data_url(dark)}" media="(prefers-color-scheme: dark)">
<img src="{_data_url(light)}" alt="{PICTURE_ALT}"></picture>
<h2>Latency of requests sent before, during and after the scale-up</h2>
<div class="wide">{_latency_table(summary)}</div>
<h2>The scale-up</h2>
<p>{escape(_reason(summary))}</p>
<pre>{timeline}</pre>
<h2>How to read this</h2>
{HOW_TO_READ}
<h2>What was asked for</h2>
<div class="wide"><table>{"".join(_setting(key, value) for key, value in record.settings.items())}</table></div>
</body></html>
"""


def tiles(record: DemoRecord, summary: Summary) -> list[tuple[str, str]]:
    """(value, label) of the numbers on top."""
    return [
        (str(summary.requests), "requests"),
        (str(len(summary.failed)), "failed"),
        (str(len(summary.mismatched)), "answers that differ"),
        (f"{summary.replicas_max} of {record.wanted_replicas}", "replicas reached"),
        (words.duration(summary.decision_to_first_token_s), "decision to first token of a new replica"),
        (words.duration(summary.load_s), "decision to its last layer"),
        (words.duration(summary.scale_s), "decision to all new replicas complete"),
        (words.gigabytes_per_s(summary.total_bytes_per_s), "parameters, all new replicas together"),
        (str(summary.handoffs), "requests handed over"),
    ]


def latency_rows(summary: Summary) -> list[list[str]]:
    """Group, requests, TTFT p50 and p99, TBT p50 and p99."""
    groups: Sequence[tuple[str, Latency]] = (
        ("before", summary.before),
        ("during", summary.during),
        ("after", summary.after),
        ("all", summary.all),
    )
    return [
        [
            name,
            str(group.requests),
            words.duration(group.ttft_p50_s),
            words.duration(group.ttft_p99_s),
            words.duration(group.tbt_p50_s),
            words.duration(group.tbt_p99_s),
        ]
        for name, group in groups
    ]


LATENCY_HEADER = ["sent", "requests", "TTFT p50", "TTFT p99", "TBT p50", "TBT p99"]


def _latency_table(summary: Summary) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in LATENCY_HEADER)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in latency_rows(summary)
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def _what(record: DemoRecord) -> str:
    agents, policy = record.settings.get("agents", "?"), record.settings.get("policy", "?")
    took = words.duration(record.ended_at - record.started_at)
    return (
        f"{agents} agents on one machine, policy {policy}, {took} in all, {words.clock(record.started_at)}."
    )


def _reason(summary: Summary) -> str:
    if summary.scale is None:
        return "No replica was added."
    scale = summary.scale
    change = (
        f"From {scale.replicas_from} to {scale.replicas_to} replicas, policy {scale.policy or 'not named'}"
    )
    return f"{change}. {scale.reason}" + (f" (rule {scale.rule})" if scale.rule else "")


def _verdict(found: Sequence[str]) -> str:
    if not found:
        return '<p class="verdict">No request failed and every answer is the single replica\'s.</p>'
    return "".join(f'<p class="verdict bad">{escape(each)}</p>' for each in found)


def _tile(value: str, label: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def _setting(key: str, value: Any) -> str:
    return f"<tr><td>{escape(str(key))}</td><td>{escape(str(value))}</td></tr>"


def _data_url(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"
