"""Writes the two Grafana dashboards of the chart from a short description: a title, a unit, and queries a panel.

Grafana's JSON is long and its layout is arithmetic; what matters are the queries, and here they can be read.
`tests/chart/test_dashboards.py` asks a real Prometheus each of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "charts" / "layercast" / "files" / "dashboards"
WIDTH, COLUMNS, HEIGHT = 8, 3, 8
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
MODEL = 'model=~"$model"'
RATE = "[$__rate_interval]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture. `queries` maps a legend to an expression."""

    title: str
    unit: str
    queries: dict[str, str]
    about: str
    stacked: bool = False


def quantiles(metric: str) -> dict[str, str]:
    """p50 and p99 of a histogram, by model."""
    inside = f"sum by (model, le) (rate({metric}_bucket{{{MODEL}}}{RATE}))"
    return {f"p{q} {{{{model}}}}": f"histogram_quantile(0.{q}, {inside})" for q in (50, 99)}


def mean_of(metric: str) -> str:
    """Of a histogram since its start, by what of it."""
    return f"sum by (what) ({metric}_sum{{{MODEL}}}) / sum by (what) ({metric}_count{{{MODEL}}})"


SERVICE = (
    Panel(
        title="Requests",
        unit="reqps",
        queries={"{{code}}": f"sum by (code) (rate(layercast_gateway_requests_total{{{MODEL}}}{RATE}))"},
        about="Requests that ended, by status code. 499 is a client that left.",
        stacked=True,
    ),
    Panel(
        title="Time to first token",
        unit="s",
        queries=quantiles("layercast_gateway_ttft_seconds"),
        about="From acceptance at the gateway to the first token there.",
    ),
    Panel(
        title="Time between tokens",
        unit="s",
        queries=quantiles("layercast_gateway_tbt_seconds"),
        about="Between two tokens of a request, seen at the gateway.",
    ),
    Panel(
        title="Demand: prompt tokens that wait",
        unit="short",
        queries={"{{model}}": f"sum by (model) (layercast_gateway_prompt_tokens_waiting{{{MODEL}}})"},
        about="Of accepted requests without a first token. This is what replicas are added for.",
    ),
    Panel(
        title="Requests in flight",
        unit="short",
        queries={
            "in flight {{model}}": f"sum by (model) (layercast_gateway_requests_in_flight{{{MODEL}}})",
            "waiting {{model}}": f"sum by (model) (layercast_gateway_requests_waiting{{{MODEL}}})",
        },
        about="Accepted and not ended; those that wait have no first token yet.",
    ),
    Panel(
        title="Tokens",
        unit="short",
        queries={"{{model}}": f"sum by (model) (rate(layercast_gateway_tokens_total{{{MODEL}}}{RATE}))"},
        about="Tokens a second, delivered to clients.",
    ),
    Panel(
        title="Replicas",
        unit="short",
        queries={"{{state}}": f"sum by (state) (layercast_operator_replicas{{{MODEL}}})"},
        about="What was decided (desired) and what there is, by state.",
    ),
    Panel(
        title="Layers resident",
        unit="short",
        queries={"{{replica}}": f"layercast_operator_layers_resident{{{MODEL}}}"},
        about="A live replica executes the layers that it has while the others arrive.",
    ),
    Panel(
        title="Decisions",
        unit="short",
        queries={
            "{{rule}}": f"sum by (rule) (increase(layercast_operator_decisions_total{{{MODEL}}}{RATE}))"
        },
        about="Changes of the wanted number of replicas, by the rule that made them.",
        stacked=True,
    ),
    Panel(
        title="Handoffs and replays",
        unit="ops",
        queries={
            "handoffs": f"sum(rate(layercast_gateway_handoffs_total{{{MODEL}}}{RATE}))",
            "replays": f"sum(rate(layercast_gateway_replays_total{{{MODEL}}}{RATE}))",
        },
        about="Requests that a loading replica took part in; requests that were dispatched again.",
    ),
    Panel(
        title="Failed requests",
        unit="percentunit",
        queries={
            "{{model}}": f'(sum by (model) (rate(layercast_gateway_requests_total{{{MODEL}, code=~"5.."}}{RATE})) '
            f"or 0 * sum by (model) (rate(layercast_gateway_requests_total{{{MODEL}}}{RATE}))) "
            f"/ sum by (model) (rate(layercast_gateway_requests_total{{{MODEL}}}{RATE}))"
        },
        about="Share of requests that ended with an error of ours.",
    ),
    Panel(
        title="Parameters on their way",
        unit="Bps",
        queries={"{{replica}}": f"layercast_operator_transfer_bytes_per_second{{{MODEL}}}"},
        about="Bytes a second that arrive at each replica; zero when nothing is loading.",
    ),
    Panel(
        title="Loads: expected and actual",
        unit="s",
        queries={
            "{{what}}, expected": mean_of("layercast_operator_predicted_seconds"),
            "{{what}}, actual": mean_of("layercast_operator_actual_seconds"),
        },
        about="Mean over all loads since the operator's start, by what of them; estimates learn from each.",
    ),
)

FLEET = (
    Panel(
        title="Devices",
        unit="short",
        queries={"{{state}}": "sum by (state) (layercast_agent_workers)"},
        about="Workers, one a device, by state: idle ones are warm and wait for a model.",
        stacked=True,
    ),
    Panel(
        title="Replicas by node",
        unit="short",
        queries={"{{instance}}": 'sum by (instance) (layercast_agent_replicas{state!="failed"})'},
        about="How many replicas each node holds.",
        stacked=True,
    ),
    Panel(
        title="Host copies",
        unit="short",
        queries={"{{state}}": "sum by (state) (layercast_agent_host_copies)"},
        about="Copies of checkpoints in host memory, in the whole cluster: as few as possible.",
    ),
    Panel(
        title="Host memory for copies",
        unit="bytes",
        queries={
            "used {{instance}}": "layercast_agent_host_pool_used_bytes",
            "pool {{instance}}": "layercast_agent_host_pool_bytes",
        },
        about="What copies take of the memory that was set aside at start.",
    ),
    Panel(
        title="Transfers",
        unit="Bps",
        queries={
            "{{instance}} from {{source}}": "sum by (instance, source) "
            "(layercast_agent_transfer_bytes_per_second)"
        },
        about="Parameter bytes that arrive at each node, from its disk or from a peer.",
        stacked=True,
    ),
    Panel(
        title="Parameters by transport",
        unit="Bps",
        queries={
            "{{transport}}": f"sum by (transport) (rate(layercast_agent_parameter_read_bytes_total{RATE}))"
        },
        about="What carries verified parameter bytes: rdma, tcp, shm (the node's own host memory) or disk. tcp where "
        "rdma is expected: the RDMAReady condition and layercast_agent_rdma say why.",
        stacked=True,
    ),
    Panel(
        title="KV pages",
        unit="short",
        queries={"{{state}}": "sum by (state) (layercast_agent_replica_kv_pages)"},
        about="Pages of the KV cache of all replicas: in all, in use, and kept for prompts that come again.",
    ),
    Panel(
        title="Prefix cache",
        unit="percentunit",
        queries={
            "hits": f'sum(rate(layercast_agent_replica_prefix_tokens_total{{result="hit"}}{RATE})) '
            f"/ sum(rate(layercast_agent_replica_prefix_tokens_total{RATE}))"
        },
        about="Share of the tokens of admitted prompts whose KV was there already.",
    ),
    Panel(
        title="Checkpoints on disk",
        unit="bytes",
        queries={"{{instance}}": "layercast_agent_disk_checkpoint_bytes"},
        about="Packed checkpoints in each node's store.",
    ),
    Panel(
        title="Parameters on devices",
        unit="bytes",
        queries={"{{instance}}": "sum by (instance) (layercast_agent_replica_resident_bytes)"},
        about="Verified parameter bytes in device memory.",
    ),
    Panel(
        title="Disk read rate",
        unit="Bps",
        queries={"{{instance}}": "layercast_agent_disk_bytes_per_second"},
        about="Measured at the agent's start.",
    ),
    Panel(
        title="Commands to agents",
        unit="ops",
        queries={"{{kind}} {{code}}": f"sum by (kind, code) (rate(layercast_operator_actions_total{RATE}))"},
        about="What the operator asked for, and the answers.",
    ),
    Panel(
        title="Reconcile",
        unit="s",
        queries={
            "p99": "histogram_quantile(0.99, "
            f"sum by (le) (rate(layercast_operator_reconcile_seconds_bucket{RATE})))"
        },
        about="One pass over one model.",
    ),
    Panel(
        title="Trouble",
        unit="short",
        queries={
            "worker restarts": f"sum(increase(layercast_agent_worker_restarts_total{RATE}))",
            "silent agents": f"sum(increase(layercast_operator_poll_failures_total{RATE})) or vector(0)",
            "reconcile errors": f"sum(increase(layercast_operator_reconcile_errors_total{RATE})) or vector(0)",
        },
        about="Should all be zero.",
    ),
    Panel(
        title="Steps: actual over expected",
        unit="short",
        queries={
            "{{what}}": "sum by (what) (layercast_agent_replica_actual_seconds_sum) "
            "/ sum by (what) (layercast_agent_replica_predicted_seconds_sum)"
        },
        about="Of all replicas since their start: steps with prompts, steps without, pauses of requests that move.",
    ),
)


def dashboard(*, title: str, uid: str, panels: tuple[Panel, ...], by_model: bool) -> dict[str, Any]:
    """Grafana's form of a dashboard."""
    variables = [_variable("datasource", "Prometheus", "datasource", "prometheus")]
    if by_model:
        query = "label_values(layercast_operator_replicas, model)"
        model = _variable("model", "Model", "query", query)
        variables.append({**model, "datasource": DATASOURCE, "includeAll": True, "multi": True, "refresh": 2})
    return {
        "uid": uid,
        "title": f"Layercast / {title}",
        "tags": ["layercast"],
        "editable": True,
        "schemaVersion": 39,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "10s",
        "templating": {"list": variables},
        "annotations": {"list": []},
        "panels": list(_placed(panels)),
    }


def _variable(name: str, label: str, kind: str, query: str) -> dict[str, Any]:
    return {"name": name, "label": label, "type": kind, "query": query}


def _placed(panels: tuple[Panel, ...]) -> Iterator[dict[str, Any]]:
    for index, panel in enumerate(panels):
        row, column = divmod(index, COLUMNS)
        style = {"fillOpacity": 20 if panel.stacked else 5, "showPoints": "never"}
        if panel.stacked:
            style["stacking"] = {"mode": "normal", "group": "A"}
        yield {
            "id": index + 1,
            "type": "timeseries",
            "title": panel.title,
            "description": panel.about,
            "datasource": DATASOURCE,
            "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
            "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": style}, "overrides": []},
            "options": {
                "legend": {"displayMode": "list", "placement": "bottom"},
                "tooltip": {"mode": "multi"},
            },
            "targets": [
                {"refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend, "datasource": DATASOURCE}
                for i, (legend, expr) in enumerate(panel.queries.items())
            ],
        }


def rendered() -> dict[str, str]:
    """File name to text."""
    found = {
        "service.json": dashboard(title="service", uid="layercast-service", panels=SERVICE, by_model=True),
        "fleet.json": dashboard(title="fleet", uid="layercast-fleet", panels=FLEET, by_model=False),
    }
    return {name: json.dumps(content, indent=1) + "\n" for name, content in found.items()}


def main() -> int:
    """Writes the files, or with --check says whether they are what would be written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in rendered().items():
        file = FOLDER / name
        if not check:
            file.write_text(text)
        elif not file.exists() or file.read_text() != text:
            sys.stderr.write(f"{file} is not what tools/dashboards.py writes: make manifests\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
