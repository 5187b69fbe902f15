"""What the chart promises beyond being valid (which `make check-chart` says): rights, secrets, protection."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CI = ROOT / "charts" / "layercast" / "ci"
Objects = list[Mapping[str, Any]]


@pytest.fixture(scope="module")
def default(chart: ModuleType) -> Objects:
    return list(chart.documents(chart.render(CI / "default-values.yaml")))


@pytest.fixture(scope="module")
def rdma(chart: ModuleType) -> Objects:
    return list(chart.documents(chart.render(CI / "rdma-values.yaml")))


def pods(objects: Objects) -> dict[str, Mapping[str, Any]]:
    """Pod specs by the name of what holds them."""
    held = {o["metadata"]["name"]: o["spec"] for o in objects if o["kind"] in {"Deployment", "DaemonSet"}}
    found = {name: spec["template"]["spec"] for name, spec in held.items()}
    return found | {o["metadata"]["name"]: o["spec"] for o in objects if o["kind"] == "Pod"}


def test_only_the_operator_has_a_token(default: Objects) -> None:
    with_token = {name for name, pod in pods(default).items() if pod["automountServiceAccountToken"]}
    assert with_token == {"layercast-operator"}
    assert not any(o["automountServiceAccountToken"] for o in default if o["kind"] == "ServiceAccount")


def test_nobody_reads_secrets_or_executes_in_pods(default: Objects) -> None:
    rules = [r for o in default if o["kind"] in {"Role", "ClusterRole"} for r in o["rules"]]
    assert rules
    for rule in rules:
        assert "*" not in {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
        assert not {"secrets", "pods/exec", "configmaps"} & set(rule["resources"])


def test_containers_are_restricted(default: Objects, rdma: Objects) -> None:
    for name, pod in {**pods(default), **pods(rdma)}.items():
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"], name
            assert context["capabilities"]["drop"] == ["ALL"] and "privileged" not in context


def test_only_rdma_adds_a_capability(rdma: Objects) -> None:
    found = pods(rdma)
    h100, l4 = found["layercast-agent-h100x8"], found["layercast-agent-l4"]
    main = h100["containers"][0]
    assert main["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    assert main["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert main["resources"]["limits"]["rdma/roce_gdr"] == "8"
    assert "add" not in l4["containers"][0]["securityContext"]["capabilities"]
    assert l4["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_a_wrong_value_is_refused(chart: ModuleType) -> None:
    command = [chart.helm(), "template", "x", str(chart.CHART), "--set", "gateway.replcas=2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode and "replcas" in done.stderr


def test_generated_certificates_name_their_role(default: Objects) -> None:
    secrets = {o["metadata"]["name"]: o["data"] for o in default if o["kind"] == "Secret"}
    for role in ("operator", "gateway", "agent"):
        assert set(secrets[f"layercast-{role}-tls"]) == {"ca.crt", "tls.crt", "tls.key"}
    assert secrets["layercast-agent-tls"]["ca.crt"] == secrets["layercast-ca"]["tls.crt"]


def test_gateways_read_hashes_of_keys_only(default: Objects) -> None:
    secret = next(o["data"] for o in default if o["metadata"]["name"] == "layercast-api-keys")
    key, line = (base64.b64decode(secret[entry]).decode() for entry in ("key", "keys"))
    assert line.split() == ["default", hashlib.sha256(key.encode()).hexdigest()]
    volumes = pods(default)["layercast-gateway"]["volumes"]
    assert next(v for v in volumes if v["name"] == "api-keys")["secret"]["items"] == [
        {"key": "keys", "path": "keys"}
    ]


def test_what_is_installed_without_helm_holds_no_secret(chart: ModuleType) -> None:
    assert not [d for d in chart.documents(chart.INSTALL.read_text()) if d["kind"] == "Secret"]


def test_every_alert_has_a_runbook(default: Objects) -> None:
    rule = next(o for o in default if o["kind"] == "PrometheusRule")
    alerts = [r for group in rule["spec"]["groups"] for r in group["rules"]]
    written = set(re.findall(r"^## (\w+)$", (ROOT / "docs" / "runbooks.md").read_text(), re.MULTILINE))
    assert {alert["alert"] for alert in alerts} == written
    for alert in alerts:
        assert alert["annotations"]["runbook_url"].endswith(f"docs/runbooks.md#{alert['alert'].lower()}")
        assert alert["labels"]["severity"] in {"warning", "critical"}


def test_every_value_is_described_by_the_schema() -> None:
    """A value that the schema does not know is refused; one that only the schema knows is a promise nobody keeps."""
    folder = ROOT / "charts" / "layercast"
    values = yaml.safe_load((folder / "values.yaml").read_text())
    schema = yaml.safe_load((folder / "values.schema.json").read_text())
    assert set(schema["properties"]) - {"global"} == set(values)
    for name, value in values.items():
        if isinstance(value, dict) and "properties" in schema["properties"][name]:
            assert set(value) == set(schema["properties"][name]["properties"]), name


def test_the_pool_sample_selects_the_gateways_and_their_port(default: Objects) -> None:
    pool = yaml.safe_load((ROOT / "manifests" / "samples" / "inferencepool.yaml").read_text())
    assert (pool["apiVersion"], pool["kind"]) == ("inference.networking.k8s.io/v1", "InferencePool")
    wanted = pool["spec"]["selector"]["matchLabels"].items()
    (port,) = (each["number"] for each in pool["spec"]["targetPorts"])
    held = {o["metadata"]["name"]: o for o in default if o["kind"] in {"Deployment", "DaemonSet"}}
    selected = {
        name: o["spec"]["template"]["spec"]["containers"][0]["ports"]
        for name, o in held.items()
        if wanted <= o["spec"]["template"]["metadata"]["labels"].items()
    }
    assert selected.keys() == {"layercast-gateway"}
    assert {"name": "http", "containerPort": port} in selected["layercast-gateway"]
