"""The doctor: what it says of an installation that is well, and of each thing that can be wrong with one."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layercast_cli import kubectl
from layercast_cli.__main__ import main as layercast
from layercast_cli.doctor import EXPIRY, Line, examine, text_of
from layercast_cli.installation import LABEL, Installation, Page, needed
from layercast_operator.crd import crd

NOW = 1_764_000_000.0
DAY = 86400.0


def workload(component: str, *args: str, kind: str = "Deployment") -> dict[str, Any]:
    container = {"args": [*args, "--tls-dir=/etc/layercast/tls"]}
    spec = {"replicas": 1, "template": {"spec": {"containers": [container], "serviceAccountName": "op"}}}
    status = {"desiredNumberScheduled": 1}
    metadata = {"name": f"lc-{component}", "namespace": "lc", "labels": {LABEL: component}}
    return {"kind": kind, "metadata": metadata, "spec": spec, "status": status}


def pod(component: str, *, ready: bool = True) -> dict[str, Any]:
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    metadata = {"name": f"{component}-1", "namespace": "lc", "labels": {LABEL: component}}
    return {
        "metadata": metadata,
        "spec": {"containers": [{"ports": []}]},
        "status": {"conditions": conditions, "phase": "Running"},
    }


def page(component: str, ends_in_s: float = 300 * DAY, **values: float) -> Page:
    samples = {(name, frozenset[tuple[str, str]]()): value for name, value in values.items()}
    samples[EXPIRY, frozenset({("role", component)})] = NOW + ends_in_s
    if component == "operator":
        samples["layercast_operator_agent_up", frozenset({("node", "n1")})] = 1
        samples["layercast_operator_gateway_up", frozenset({("gateway", "g:80")})] = 1
    return Page(pod=f"{component}-1", component=component, samples=samples)


def service(reason: str = "Fresh", status: str = "True") -> dict[str, Any]:
    conditions = [
        {"type": "Ready", "status": "True", "reason": "Serving", "message": "1 of 1 replica serves"},
        {"type": "MetricsAvailable", "status": status, "reason": reason, "message": "words"},
    ]
    return {
        "metadata": {"name": "m", "namespace": "models"},
        "spec": {"scaling": {"max": 3}},
        "status": {"conditions": conditions},
    }


def installation() -> Installation:
    prometheus = "--prometheus-url=http://p:9090"
    lease = {"holderIdentity": "operator-1", "renewTime": "2025-11-24T15:59:58.000000Z"}
    return Installation(
        at=NOW,
        namespace="lc",
        version="v1.34.0",
        definition=crd(),
        workloads=[
            workload("operator", "--lease-name=lc-operator", prometheus),
            workload("gateway"),
            workload("agent", kind="DaemonSet"),
        ],
        pods=[pod("operator"), pod("gateway"), pod("agent")],
        leases=[{"metadata": {"name": "lc-operator"}, "spec": lease}],
        rights=dict.fromkeys(needed("lc", (), "lc-operator"), True),
        pages=[page("operator", layercast_operator_leader=1), page("gateway"), page("agent")],
        services=[service()],
    )


def failed(seen: Installation) -> list[Line]:
    return [line for line in examine(seen) if line.well is False]


def test_an_installation_that_is_well() -> None:
    lines = examine(installation())
    assert [line for line in lines if line.well is not True] == []
    text = text_of(lines)
    assert all(line.startswith("ok ") for line in text.splitlines())
    assert "the first ends in 300d" in text


def old_definition() -> dict[str, Any]:
    old = copy.deepcopy(crd())
    del old["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["scaling"]
    return old


WELL = installation()
OPERATOR, GATEWAY, AGENT = WELL.pages
SILENT = Page(
    pod="operator-1",
    component="operator",
    samples={**OPERATOR.samples, ("layercast_operator_agent_up", frozenset({("node", "n2")})): 0},
)
RDMA_AGENT = replace(
    AGENT,
    samples={
        **AGENT.samples,
        ("layercast_agent_rdma", frozenset({("device", "cuda:0"), ("reason", "no RDMA port is ACTIVE")})): 0,
        ("layercast_agent_rdma_missed", frozenset({("device", "cuda:0")})): 1,
    },
)
WRONG = {
    "RDMA": (
        replace(WELL, pages=[OPERATOR, GATEWAY, RDMA_AGENT]),
        "1 of 1 device read by tcp; agent-1 cuda:0: no RDMA port is ACTIVE",
        "runbooks.md#parameters-do-not-come-by-rdma",
    ),
    "definition gone": (replace(WELL, definition=None), "there is no ModelService", "kubectl apply"),
    "definition old": (replace(WELL, definition=old_definition()), "lacks spec.scaling,", "kubectl apply"),
    "rights": (
        replace(WELL, rights=dict.fromkeys(needed("lc", ("a",), "x"), False)),
        "may not list nodes in all namespaces; ",
        "helm upgrade",
    ),
    "agent pods": (
        replace(WELL, pods=[pod("operator"), pod("gateway"), pod("agent", ready=False)]),
        "0 of 1 pod ready",
        "kubectl -n lc describe pod agent-1",
    ),
    "nobody leads": (replace(WELL, leases=[]), "no operator acts", "logs"),
    "agents": (replace(WELL, pages=[SILENT, GATEWAY, AGENT]), "n2 does not answer", "NetworkPolicy"),
    "certificate": (
        replace(WELL, pages=[OPERATOR, GATEWAY, page("agent", 6 * DAY)]),
        "they end: agent-1 in 6d",
        "runbooks.md",
    ),
    "Prometheus": (
        replace(WELL, services=[service("NoSeries", "False")]),
        "m: words",
        "ask http://p:9090",
    ),
    "service": (
        replace(WELL, services=[{"metadata": {"name": "m", "namespace": "x"}, "spec": {}}]),
        "x/m: nobody reports on it",
        "watchNamespaces",
    ),
}


@pytest.mark.parametrize(("seen", "told", "remedy"), WRONG.values(), ids=WRONG.keys())
def test_each_thing_that_is_wrong_is_said_with_what_to_do(seen: Installation, told: str, remedy: str) -> None:
    found = failed(seen)
    assert any(told in line.told and remedy in line.remedy for line in found), text_of(examine(seen))


def test_what_is_turned_off_or_unknown_is_a_note() -> None:
    seen = replace(WELL, rights="you may not ask", services=[])
    notes = [line for line in examine(seen) if line.well is None]
    assert [line.what for line in notes] == ["rights", "Prometheus"]


@pytest.mark.parametrize(("used", "well"), [(0, None), (1, True)])
def test_rdma_that_nobody_demanded_is_told(used: int, well: bool | None) -> None:
    labels = frozenset({("device", "cpu:0"), ("reason", "words")})
    agent = replace(AGENT, samples={**AGENT.samples, ("layercast_agent_rdma", labels): used})
    found = [line for line in examine(replace(WELL, pages=[OPERATOR, GATEWAY, agent])) if line.what == "RDMA"]
    assert [line.well for line in found] == [well]


@pytest.mark.parametrize(("well", "code"), [(True, 0), (False, 1)])
def test_the_command_looks_through_kubectl(
    well: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kubectl that tells this installation; whether the operator has its rights differs."""
    seen = installation()
    answers = {
        "version": {"serverVersion": {"gitVersion": seen.version}},
        "deployments,daemonsets": {"items": seen.workloads},
        "deployments": {"items": seen.workloads[:1]},
        "pods": {"items": seen.pods},
        "crd": seen.definition,
        "leases": {"items": seen.leases},
        "modelservices.layercast.dev": {"items": seen.services},
    }
    (tmp_path / "answers").write_text(json.dumps(answers))
    (tmp_path / "kubectl").write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        f"answers = json.loads(pathlib.Path({str(tmp_path / 'answers')!r}).read_text())\n"
        "if sys.argv[1] == 'create':\n"
        "    for review in json.load(sys.stdin)['items']:\n"
        f"        print(json.dumps({{'status': {{'allowed': {well}}}}}))\n"
        "elif '--raw' in sys.argv:\n"
        "    print('layercast_operator_leader 1.0')\n"
        "    print('layercast_operator_agent_up{node=\"n1\"} 1.0')\n"
        "    print('layercast_operator_gateway_up{gateway=\"g\"} 1.0')\n"
        "else:\n"
        "    print(json.dumps(answers['version' if sys.argv[1] == 'version' else sys.argv[2]]))\n"
    )
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("layercast_cli.installation.time.time", lambda: NOW)
    assert kubectl.main(["doctor", "--context", "lab"]) == code
    said = capsys.readouterr().out
    assert ("FAILED" in said) is not well
    assert layercast(["doctor", "-n", "lc"]) == code
    assert capsys.readouterr().out == said
