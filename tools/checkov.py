"""Holds checkov's findings on the rendered chart against those that are meant, each with its reason.

A finding that is not listed fails, and so does an entry that finds nothing any more. `make check-security` gives
checkov a virtual environment of its own, because it pins a hundred libraries.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "charts" / "layercast"
PODS = ("DaemonSet.layercast.layercast-agent", "Deployment.layercast.layercast-gateway",
        "Deployment.layercast.layercast-operator", "Pod.layercast.layercast-test")  # fmt: skip
OPERATOR, AGENT, TEST = PODS[2], PODS[0], PODS[3]

Finding = tuple[str, str]

MEANT: dict[Finding, str] = {
    **{("CKV_K8S_43", pod): "the digest of a release is known after the chart is written" for pod in PODS},
    **{
        ("CKV_K8S_15", pod): "a tag of ours never changes; clusters without a registry load images"
        for pod in PODS
    },
    **{("CKV_K8S_11", pod): "a CPU limit throttles first tokens; requests divide the cores" for pod in PODS},
    ("CKV_K8S_38", OPERATOR): "it is the one that talks to the API server",
    (
        "CKV_K8S_25",
        AGENT,
    ): "CHOWN, in the init container that gives the store's folder away; off with store.prepare",
    ("CKV_K8S_13", AGENT): "checkpoints are as large as they are: the user sets it for their nodes",
    ("CKV_K8S_8", TEST): "it ends",
    ("CKV_K8S_9", TEST): "nobody sends it anything",
    ("CKV2_K8S_6", TEST): "it listens on nothing",
}


def found(checkov: str, helm: str) -> set[Finding]:
    """(check, object) of everything that checkov has against the chart's defaults."""
    command = [helm, "template", "layercast", str(CHART), "--namespace", "layercast"]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "chart.yaml")
        file.write_text(rendered)
        options = ("--framework", "kubernetes", "--output", "json", "--skip-download", "--soft-fail")
        said = subprocess.run(
            [checkov, "-f", str(file), *options], capture_output=True, text=True, check=True
        )
    report = json.loads(said.stdout)
    if report["summary"]["parsing_errors"] or not report["summary"]["passed"]:
        raise SystemExit(f"checkov could not read the chart: {report['summary']}")
    return {(check["check_id"], check["resource"]) for check in report["results"]["failed_checks"]}


def main() -> int:
    """`checkov.py CHECKOV HELM`; 1 when findings and what is meant differ."""
    findings = found(*sys.argv[1:])
    for check, resource in sorted(findings - MEANT.keys()):
        sys.stderr.write(f"{resource}: {check}; mend it, or say in tools/checkov.py why it is meant\n")
    for check, resource in sorted(MEANT.keys() - findings):
        sys.stderr.write(f"{resource}: {check} finds nothing any more; take it out of tools/checkov.py\n")
    return 1 if findings != MEANT.keys() else 0


if __name__ == "__main__":
    sys.exit(main())
