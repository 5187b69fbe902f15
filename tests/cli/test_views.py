"""get, scale, explain and timeline on a fixed state folder: what is printed, and every way to be refused."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from layercast_cli import words
from layercast_cli.__main__ import main
from layercast_cli.explain import explanation
from layercast_cli.gateway_metrics import histogram_quantile, parse_metrics
from layercast_cli.get import Service, overview, wide
from layercast_cli.status import parse_status, time_of
from layercast_cli.timeline import axis, chart, row

DECIDED = 1_700_000_000.0

STATUS: dict[str, Any] = {
    "name": "smollm2",
    "observedGeneration": 2,
    "counts": {"desired": 3, "serving": 1, "loading": 2, "draining": 0},
    "conditions": [
        {
            "type": "Ready",
            "status": "False",
            "reason": "ReplicasLoading",
            "message": "1 of 3 replicas serves",
            "lastTransitionTime": "2023-11-14T22:13:20Z",
        }
    ],
    "replicas": [
        {
            "replicaId": "smollm2-a",
            "node": "node-0",
            "device": "cpu:0",
            "role": "Prefill",
            "state": "serving",
            "layersResident": 30,
            "layersTotal": 30,
            "requestsRunning": 4,
            "requestsWaiting": 2,
            "prefillTokensPerSecond": 151.7,
            "handoffsTaken": 5,
        },
        {
            "replicaId": "smollm2-b",
            "node": "node-1",
            "device": "cpu:0",
            "state": "live",
            "layersResident": 12,
            "layersTotal": 30,
            "doneBytes": 231,
            "totalBytes": 538,
            "source": "node-0/cpu:0",
            "bytesPerSecond": 67600000,
            "handoffsGiven": 5,
        },
        {
            "replicaId": "smollm2-c",
            "node": "node-2",
            "device": "cpu:0",
            "state": "loading",
            "layersResident": 3,
            "layersTotal": 30,
            "doneBytes": 53,
            "totalBytes": 538,
            "source": "node-1/cpu:0",
            "bytesPerSecond": 61000000,
            "error": "",
        },
    ],
    "lastScale": {
        "decidedAt": DECIDED,
        "from": 1,
        "to": 3,
        "reason": "3.4 s of prompts wait for 1 replica; at most 2.0 s are wanted",
        "rule": "queue-seconds",
        "policy": "live",
        "replicas": [
            {
                "replicaId": "smollm2-b",
                "node": "node-1",
                "source": "node-0/cpu:0",
                "assignedAt": DECIDED + 0.05,
                "firstSegmentAt": DECIDED + 0.5,
                "firstLayerAt": DECIDED + 1.0,
                "firstTokenAt": DECIDED + 2.0,
                "completeAt": DECIDED + 8.0,
                "bytesPerSecond": 67600000,
                "predictions": [
                    {"what": "load", "predictedSeconds": 7.5, "actualSeconds": 8.0},
                    {"what": "transfer", "predictedSeconds": 7.0, "actualSeconds": None},
                ],
            },
            {
                "replicaId": "smollm2-c",
                "node": "node-2",
                "source": "node-1/cpu:0",
                "assignedAt": DECIDED + 0.06,
            },
        ],
    },
}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder with one ModelService and its status."""
    (tmp_path / "modelservices").mkdir()
    (tmp_path / "status").mkdir()
    document = {
        "apiVersion": "layercast.dev/v1alpha1",
        "kind": "ModelService",
        "metadata": {"name": "smollm2"},
        "spec": {
            "model": {"source": "hf://org/name", "dtype": "float32"},
            "replicas": 1,
            "scaling": {"min": 1, "max": 3},
        },
    }
    (tmp_path / "modelservices/smollm2.yaml").write_text(yaml.safe_dump(document))
    (tmp_path / "status/smollm2.json").write_text(json.dumps(STATUS))
    (tmp_path / "up.json").write_text(json.dumps({"services": {"smollm2": time.time() - 75}}))
    return tmp_path


def run(state: Path, *arguments: str) -> int:
    return main([*arguments, "--state-dir", str(state)])


def test_get(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(state, "get") == 0
    shown = capsys.readouterr()
    head, line = shown.out.splitlines()
    assert head.split() == ["NAME", "READY", "LOADING", "SOURCE", "P99", "TTFT", "AGE"]
    assert re.split(r" {2,}", line) == [
        "smollm2",
        "1/3",
        "2 (12/30 layers 42 %, 3/30 layers 9 %)",
        "node-0/cpu:0, node-1/cpu:0",
        "-",
        "1m15s",
    ]
    assert f"no cluster runs on {state}" in shown.err


def test_get_wide_has_a_line_for_each_replica(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(state, "get", "smollm2", "-o", "wide") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].split() == [
        "smollm2-a",
        "node-0",
        "cpu:0",
        "Prefill",
        "serving",
        "30/30",
        "-",
        "-",
        "2",
        "4",
        "0",
        "given,",
        "5",
        "taken",
    ]
    assert lines[5].split()[3:9] == ["-", "live", "12/30", "node-0/cpu:0", "0.068", "GB/s"]
    assert len(lines) == 7


def test_get_json_is_the_operators_own_words(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(state, "get", "-o", "json") == 0
    assert json.loads(capsys.readouterr().out) == [STATUS]
    assert run(state, "get", "smollm2", "-o", "json") == 0
    assert json.loads(capsys.readouterr().out) == STATUS


def test_ttft_comes_from_the_gateways_histogram() -> None:
    text = """# TYPE layercast_gateway_ttft_seconds histogram
layercast_gateway_ttft_seconds_bucket{model="smollm2",le="0.5"} 90
layercast_gateway_ttft_seconds_bucket{model="smollm2",le="1.0"} 100
layercast_gateway_ttft_seconds_bucket{model="smollm2",le="+Inf"} 100
layercast_gateway_ttft_seconds_bucket{model="other",le="+Inf"} 7
# TYPE layercast_gateway_handoffs_total counter
layercast_gateway_handoffs_total{model="smollm2"} 12
"""
    metrics = parse_metrics(text, "smollm2")
    assert metrics.handoffs == 12
    assert histogram_quantile(0.99, metrics.ttft_buckets) == pytest.approx(0.95)
    assert histogram_quantile(0.45, metrics.ttft_buckets) == pytest.approx(0.25)
    assert histogram_quantile(0.99, ((0.5, 0.0), (float("inf"), 4.0))) == 0.5
    assert histogram_quantile(0.99, ()) is None
    service = Service(
        name="smollm2", wanted=1, status=parse_status("smollm2", STATUS), metrics=metrics, age_s=5
    )
    assert "950 ms" in overview([service])


def test_a_service_without_status_is_shown_as_not_ready() -> None:
    service = Service(name="new", wanted=2, status=None, metrics=None, age_s=None)
    assert wide([service]).splitlines()[1].split() == ["new", "0/2", "-", "-", "-", "-"]


def test_scale_changes_the_number_and_nothing_else(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = state / "modelservices/smollm2.yaml"
    before = yaml.safe_load(path.read_text())
    assert run(state, "scale", "smollm2", "3") == 0
    assert "3 replicas wanted, 1 before" in capsys.readouterr().out
    before["spec"]["replicas"] = 3
    assert yaml.safe_load(path.read_text()) == before
    assert [each.name for each in path.parent.iterdir()] == ["smollm2.yaml"]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["scale", "other", "2"], 1, "layercast scale: there is no ModelService other; there is smollm2"),
        (
            ["scale", "smollm2", "4"],
            2,
            "layercast scale: smollm2 has at most 3 (spec.scaling.max); asked for 4",
        ),
        (
            ["scale", "smollm2", "0"],
            2,
            "layercast scale: smollm2 keeps at least 1 (spec.scaling.min); asked for 0",
        ),
        (["get", "other"], 1, "layercast get: there is no ModelService other; there is smollm2"),
        (["explain", "other"], 1, "layercast explain: there is no ModelService other; there is smollm2"),
        (["timeline", "other"], 1, "layercast timeline: there is no ModelService other; there is smollm2"),
    ],
)
def test_refusals_are_one_sentence(
    state: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, sentence: str
) -> None:
    before = (state / "modelservices/smollm2.yaml").read_text()
    assert run(state, *arguments) == code
    shown = capsys.readouterr()
    assert shown.err == sentence + "\n"
    assert shown.out == ""
    assert (state / "modelservices/smollm2.yaml").read_text() == before


def test_without_a_cluster_the_first_step_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "get") == 1
    assert capsys.readouterr().err.endswith("start some with: layercast up -f FILE\n")


def test_explain_gives_numbers_and_rule() -> None:
    text = explanation(parse_status("smollm2", STATUS), now=DECIDED + 45)
    lines = text.splitlines()
    assert lines[0] == "smollm2: 1 of 3 wanted replicas serves, 2 are loading."
    assert "  Ready  False   45s  ReplicasLoading  1 of 3 replicas serves" in lines
    assert any(line.startswith("Last decision: 1 → 3 replicas at ") for line in lines)
    assert "  Why:  3.4 s of prompts wait for 1 replica; at most 2.0 s are wanted" in lines
    assert "  Rule: queue-seconds" in lines
    assert "first token after 2.00 s, complete after 8.00 s at 0.068 GB/s" in text
    assert "    Expected: load 7.50 s, took 8.00 s; transfer 7.00 s, under way" in lines
    assert "smollm2-c on node-2 from node-1/cpu:0: assigned after 60 ms." in text
    assert "30 of 30 layers, 4 running, 2 waiting, handed over 0, took over 5, 152 prompt tokens/s" in text


def test_explain_without_a_decision() -> None:
    text = explanation(parse_status("m", {"counts": {"desired": 1}}), now=DECIDED)
    assert text.splitlines() == [
        "m: 0 of 1 wanted replica serve.",
        "",
        "The number of replicas has not been changed yet.",
    ]


def test_explain_gives_the_recommendation() -> None:
    advice = {"replicas": 3, "rule": "queue", "reason": "3.4 s of prompts wait"}
    text = explanation(parse_status("m", {"recommendation": advice}), now=DECIDED)
    assert text.splitlines()[-1] == "Recommendation: 3 replicas: 3.4 s of prompts wait (rule queue)"
    assert "Recommendation" not in explanation(parse_status("m", {"recommendation": None}), now=DECIDED)


def test_timeline_draws_states_in_their_place() -> None:
    scale = parse_status("smollm2", STATUS).last_scale
    assert scale is not None
    drawn = row(scale.replicas[0], scale.decided_at, span_s=10.0, cells=20)
    # Half a second a cell: ordered, loading, then layers executed, the first token at 2 s, complete at 8 s.
    assert drawn == "·░▒▒T▒▒▒▒▒▒▒▒▒▒▒████"
    assert row(scale.replicas[1], scale.decided_at, span_s=10.0, cells=20) == "·" * 20
    text = chart(scale, name="smollm2", width=80)
    assert max(len(line) for line in text.splitlines()[:6]) <= 88
    assert "+2.00 s" in text
    assert axis(10.0, 24) == "|0 s        |5 s"


def test_timeline_of_the_command(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(state, "timeline", "smollm2") == 0
    out = capsys.readouterr().out
    assert out.startswith("smollm2: 1 → 3 replicas, decided ")
    rows = [line.split()[0] for line in out.splitlines() if line.startswith("node-")]
    assert rows == ["node-1", "node-2", "node-1", "node-2"]
    (state / "status/smollm2.json").write_text("{}")
    assert run(state, "timeline", "smollm2") == 1
    assert "has not been changed yet" in capsys.readouterr().err


def test_a_status_of_another_version_is_no_crash() -> None:
    odd = parse_status("m", {"counts": None, "replicas": [{"layersResident": "x"}, 3], "scales": "no"})
    assert (odd.name, odd.serving, len(odd.replicas), odd.scales) == ("m", 0, 1, ())
    assert time_of("2023-11-14T22:13:20Z") == DECIDED
    assert time_of("soon") is None
    assert time_of(0) is None


def test_words() -> None:
    assert [words.age(each) for each in (5, 75, 7300, 200_000, None)] == ["5s", "1m15s", "2h1m", "2d", "-"]
    assert [words.duration(each) for each in (0.0854, 1.25, 12.34, 125, None)] == [
        "85 ms",
        "1.25 s",
        "12.3 s",
        "2 min 5 s",
        "-",
    ]
    assert words.bar(30, 30, width=4) == "████"
    assert words.bar(29.9, 30, width=4) == "███▉"
    assert words.bar(0, 0, width=4) == "░░░░"
