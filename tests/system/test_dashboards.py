"""Dashboards and alerts against a real Prometheus on a real cluster: a query without data is a wrong query."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tests.system.conftest import MODEL, StartCluster, answers, client_of, service

from layercast_cli.local import LocalCluster

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "charts" / "layercast" / "files"
# Of npm's @grafana/schema 11.6 (Apache-2.0), by ts-json-schema-generator: `Dashboard` and what it refers to.
SCHEMA = Path(__file__).with_name("grafana_dashboard.schema.json")
DASHBOARDS = sorted((FILES / "dashboards").glob("*.json"))
VARIABLES = {"$model": ".*", "$__rate_interval": "30s"}

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None and not os.environ.get("CI"), reason="there is no prometheus in PATH"
)


def expressions(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Title and query of every target, with Grafana's variables filled in."""
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            text = target["expr"]
            for name, value in VARIABLES.items():
                text = text.replace(name, value)
            yield f"{panel['title']} {target['refId']}", text


@contextmanager
def prometheus(folder: Path, targets: dict[str, list[str]]) -> Iterator[Callable[[str], list[Any]]]:
    """A Prometheus with these targets; gives a function that asks it."""
    jobs = [{"job_name": job, "static_configs": [{"targets": found}]} for job, found in targets.items()]
    config = folder / "prometheus.yml"
    config.write_text(
        json.dumps(
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(FILES / "rules.yaml")],
                "scrape_configs": jobs,
            }
        )
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}/data"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stderr=log)

    def ask(expression: str) -> list[Any]:
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"http://{address}/api/v1/query?{query}", timeout=10) as answer:
            return list(json.load(answer)["data"]["result"])

    try:
        yield ask
    finally:
        process.kill()
        process.wait(10)


def targets_of(cluster: LocalCluster) -> dict[str, list[str]]:
    """Everything in a local cluster that tells metrics."""
    layout = cluster.layout
    assert layout is not None
    return {
        "operator": [layout.operator_metrics_address],
        "gateway": [layout.gateway_address],
        "agent": [node.metrics_address for node in layout.nodes],
    }


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: str(file.stem))
def test_grafana_understands(file: Path) -> None:
    jsonschema.validate(json.loads(file.read_text()), json.loads(SCHEMA.read_text()))


def test_the_schema_refuses_what_is_wrong() -> None:
    broken = json.loads(DASHBOARDS[0].read_text())
    broken["panels"][0]["gridPos"]["w"] = "wide"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, json.loads(SCHEMA.read_text()))


@needs_prometheus
def test_alerts_are_valid_and_fire() -> None:
    for command in (
        ["check", "rules", str(FILES / "rules.yaml")],
        ["test", "rules", str(FILES / "rules_test.yaml")],
    ):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False, cwd=FILES)
        assert not done.returncode, done.stdout + done.stderr


@needs_prometheus
@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_every_panel_has_data(model_folder: Path, tmp_path: Path, start_cluster: StartCluster) -> None:
    document = service(model_folder)
    with start_cluster(document, agents=2, cpu_share=0.2, link_bytes_per_s=5_000_000) as cluster:
        await asyncio.to_thread(cluster.wait_ready, MODEL)
        with prometheus(tmp_path, targets_of(cluster)) as ask:
            async with client_of(cluster) as client:
                cluster.edit(MODEL, lambda document: document["spec"].update(replicas=2))
                # Scraped while it grows and while it answers; a rate needs two scrapes on both sides.
                for _ in range(3):
                    await answers(client, [f"Number {index} is" for index in range(6)], max_tokens=8)
                await asyncio.to_thread(cluster.wait_ready, MODEL, serving=2)
                await answers(client, ["One more"], max_tokens=8)
            wanted = {
                f"{file.stem}: {title}": query
                for file in DASHBOARDS
                for title, query in expressions(json.loads(file.read_text()))
            }
            empty = await asyncio.to_thread(still_empty, ask, wanted, deadline_s=40)
            assert not empty, "no data for:\n" + "\n".join(f"{title}: {wanted[title]}" for title in empty)
            # An alert about a metric that nobody tells would never fire.
            named = set(re.findall(r"layercast_\w+", (FILES / "rules.yaml").read_text()))
            known = {series["metric"]["__name__"] for series in ask('{__name__=~"layercast_.*"}')}
            assert named - known <= ONLY_IN_A_CLUSTER


ONLY_IN_A_CLUSTER = {
    "layercast_operator_scrape_failures_total",  # a series of a gateway that could not be asked
    "layercast_operator_poll_failures_total",
    "layercast_operator_reconcile_errors_total",
    "layercast_certificate_expiry_timestamp_seconds",  # with TLS
}


def still_empty(ask: Callable[[str], list[Any]], wanted: dict[str, str], *, deadline_s: float) -> list[str]:
    """Titles whose query has no data until the deadline."""
    left, turn, until = set(wanted), threading.Event(), time.monotonic() + deadline_s
    while left and time.monotonic() < until:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):  # it has just been started
            left -= {title for title in left if ask(wanted[title])}
        turn.wait(0.5)
    return sorted(left)
