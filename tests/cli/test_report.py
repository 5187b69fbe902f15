"""Numbers, table, picture and page of a run, from a made-up record with known values."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from layercast_cli import plots
from layercast_cli.display import DemoView, demo_line, demo_panel, up_panel
from layercast_cli.records import BURST, LOW, DemoRecord
from layercast_cli.report import latency_rows, page, write_report
from layercast_cli.status import parse_status
from layercast_cli.summary import percentile, problems, result, summarize

PNG = b"\x89PNG\r\n\x1a\n"


def test_result_has_the_agreed_numbers(run: DemoRecord) -> None:
    numbers = result(run, summarize(run))
    assert numbers["requests"] == len(run.requests)
    assert (numbers["failed"], numbers["mismatched"], numbers["problems"]) == (0, 0, [])
    assert (numbers["replicas_max"], numbers["replicas_end"], numbers["handoffs"]) == (3, 1, 11)
    assert numbers["decision_to_first_token_ms"] == pytest.approx(1500, abs=0.1)
    assert (numbers["load_s"], numbers["scale_s"]) == pytest.approx((8.0, 8.5))
    assert numbers["gigabytes_per_s_total"] == pytest.approx(0.135)
    demand = [each for each in run.requests if each.phase != "reference"]
    slowest = sorted(each.ttft_s or 0 for each in demand)
    assert slowest[-2] * 1000 - 1 <= numbers["ttft_p99_ms"] <= slowest[-1] * 1000 + 1


def test_groups_follow_the_scale_up(run: DemoRecord) -> None:
    summary = summarize(run)
    assert summary.window is not None
    start, end = summary.window
    zero = run.phase_at["reference"]
    assert (start - zero, end - zero) == pytest.approx((53.0, 61.5))
    demand = [each for each in run.requests if each.phase != "reference"]
    assert summary.before.requests + summary.during.requests + summary.after.requests == len(demand)
    assert summary.during.requests == sum(1 for each in demand if start <= each.sent_at < end)
    assert summary.before.tbt_p50_s == pytest.approx(0.05, abs=1e-3)
    assert [row[0] for row in latency_rows(summary)] == ["before", "during", "after", "all"]


def test_a_lost_request_and_a_wrong_token_are_told(run: DemoRecord) -> None:
    requests = list(run.requests)
    burst = next(place for place, each in enumerate(requests) if each.phase == BURST)
    low = next(place for place, each in enumerate(requests) if each.phase == LOW)
    requests[burst] = replace(requests[burst], error="HTTP 503: queue full", token_at=())
    requests[low] = replace(requests[low], text="another answer")
    bad = replace(run, requests=tuple(requests))
    summary = summarize(bad)
    assert ([each.index for each in summary.failed], [each.index for each in summary.mismatched]) == (
        [burst],
        [low],
    )
    found = problems(bad, summary)
    assert found[0] == "1 request failed, the first with: HTTP 503: queue full"
    assert "'another answer' instead of 'answer" in found[1]
    html = page(bad, summary, light=plots.draw(bad, summary), dark=PNG)
    assert 'class="verdict bad"' in html


def test_a_missing_or_unfinished_scale_up_is_told(run: DemoRecord) -> None:
    without = replace(run, scales=(), samples=())
    summary = summarize(without)
    assert problems(without, summary) == [
        "the scale-up did not happen: the policy decided for no new replica"
    ]
    assert result(without, summary)["decision_to_first_token_ms"] is None
    assert plots.draw(without, summary).startswith(PNG)
    assert "no scale-up" in page(without, summary, light=PNG, dark=PNG)
    two = tuple(replace(each, serving=min(2, each.serving)) for each in run.samples)
    unfinished = replace(run, samples=two)
    assert problems(unfinished, summarize(unfinished)) == [
        "the scale-up did not end: at most 2 of 3 replicas served"
    ]


def test_only_scale_ups_of_the_burst_count(run: DemoRecord) -> None:
    scale = run.scales[0]
    premature = replace(scale, decided_at=run.phase_at["steady"] + 1)
    at_rest = replace(scale, decided_at=run.phase_at["reference"] + 1)
    down = replace(scale, decided_at=scale.decided_at - 0.5, replicas_from=3, replicas_to=2)
    assert summarize(replace(run, scales=(premature, at_rest, down, scale))).scale == scale
    assert summarize(replace(run, scales=(premature, at_rest, down))).scale == premature
    assert summarize(replace(run, scales=(at_rest, down))).scale is None


def test_files_of_a_report(run: DemoRecord, tmp_path: Path) -> None:
    summary = summarize(run)
    paths = write_report(tmp_path / "demo", run, summary)
    assert json.loads(paths["result.json"].read_text()) == json.loads(json.dumps(result(run, summary)))
    assert paths["scale.png"].read_bytes().startswith(PNG)
    assert len(json.loads(paths["records.json"].read_text())["requests"]) == len(run.requests)
    html = paths["report.html"].read_text()
    # One file: nothing is fetched from anywhere.
    assert re.findall(r'(?:src|srcset|href)="(?!data:)', html) == []
    assert html.count("data:image/png;base64,") == 2
    assert "1.50 s" in html
    assert "8.00 s" in html
    assert "3.4 s of prompts wait, at most 3.0 s are allowed" in html


def test_text_from_outside_is_escaped(run: DemoRecord) -> None:
    scale = replace(run.scales[0], reason="<script>alert(1)</script>")
    evil = replace(run, scales=(scale,), settings={"policy": "<b>"})
    html = page(evil, summarize(evil), light=PNG, dark=PNG)
    assert "<script>" not in html
    assert "<b>&" not in html


def test_percentiles() -> None:
    assert percentile([], 0.5) is None
    assert percentile([3.0], 0.99) == 3.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile([float(number) for number in range(101)], 0.99) == 99.0


def test_the_display_shows_layers_and_failures() -> None:
    replicas = [
        {"node": "node-0", "state": "serving", "layersResident": 30, "layersTotal": 30, "requestsRunning": 2},
        {"node": "node-1", "state": "live", "layersResident": 12, "layersTotal": 30, "source": "node-0"},
        {"node": "node-2", "state": "live", "layersResident": 30, "layersTotal": 30, "source": "node-0"},
    ]
    for replica, there in zip(replicas, (500, 215, 430), strict=True):
        replica |= {"doneBytes": there, "totalBytes": 500}
    counts = {"desired": 3, "serving": 1, "loading": 2}
    status = parse_status("smollm2", {"counts": counts, "replicas": replicas})
    view = DemoView(
        phase="burst",
        elapsed_s=12.0,
        sent=20,
        ok=11,
        failed=1,
        waiting=6.0,
        handoffs=4.0,
        ttft_p50_s=0.5,
        ttft_p99_s=2.25,
        status=status,
    )
    console = Console(width=110, file=None, record=True, force_terminal=False, quiet=False)
    with console.capture() as shown:
        console.print(demo_panel(view))
        console.print(up_panel([("smollm2", status), ("other", None)], ["a footer"]))
    text = shown.get()
    for words in (
        "1 failed",
        "6 without a first token",
        "12/30 layers",
        "86 % from node-0",  # its head is on its way, when no layer is
        "p99 2.25 s",
        "4 handoffs",
        "a footer",
    ):
        assert words in text
    assert "other: starting" in text
    assert demo_line(view) == (
        "[   12 s] burst: 20 sent, 11 answered, 1 failed, 6 waiting, TTFT p50 500 ms; "
        "node-0 serving, node-1 live 12/30 layers 43 %, node-2 live 30/30 layers 86 %"
    )
