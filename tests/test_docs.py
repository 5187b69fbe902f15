"""Documents that name files, functions and commands must not outlive them.

In README, CONTRIBUTING and docs/, text in backticks that looks like a path of this repository must exist;
with `path.py:Name` or `path.py:Class.method` the name must be defined there. Relative links must lead
somewhere, `make X` must be a target, and `layercast X` a command. Decision records are exempt: they are history.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *sorted(
    str(file.relative_to(ROOT)) for file in (ROOT / "docs").glob("*.md")
))  # fmt: skip
TOP = {
    "operator",
    "node_agent",
    "gateway",
    "cli",
    "proto",
    "tests",
    "tools",
    "docs",
    "manifests",
    "bench",
    "charts",
}
# Folders that the documents may announce: they come with an issue that is still open.
ANNOUNCED = {"tests/cluster"}

Problems = list[str]


def names_in(document: str) -> list[tuple[int, str]]:
    """(line, text) of everything in single backticks, and of every word of fenced blocks."""
    found = []
    fenced = False
    for number, line in enumerate(document.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced:
            found += [(number, word) for word in line.split()]
        else:
            found += [(number, text) for text in re.findall(r"`([^`]+)`", line)]
    return found


def bad_path(text: str) -> str | None:
    """What is wrong with a text that looks like a path of this repository; None when nothing is."""
    path, _, name = text.rstrip(".,").partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.*-]+)*/?", path) or path.split("/")[0] not in TOP or "/" not in path:
        return None
    if path.rstrip("/") in ANNOUNCED:
        return None
    if not any(ROOT.glob(path.rstrip("/"))):
        return f"{path} does not exist"
    if name and name not in _defined(ROOT / path):
        return f"{path} does not define {name}"
    return None


def bad_paths(document: str) -> Problems:
    return [f"{line}: {problem}" for line, text in names_in(document) if (problem := bad_path(text))]


def bad_links(document: str, folder: Path) -> Problems:
    """Relative links and pictures that lead nowhere."""
    return [
        f"{number}: {target} does not exist"
        for number, line in enumerate(document.splitlines(), start=1)
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", line)
        if "://" not in target and not (folder / target).exists()
    ]


def named(document: str, program: str) -> set[str]:
    """First words after `program` where it is called: in backticks or in fenced blocks."""
    lines = re.findall(r"`([^`\n]+)`", document) + re.findall(r"^ *(\S.*)$", _fenced(document), re.M)
    calls = [re.match(rf"(?:\S+/)?{program} +([a-z][a-z-]*)(?![\w.=/])", line.strip()) for line in lines]
    return {call[1] for call in calls if call}


def _fenced(document: str) -> str:
    return "\n".join(re.findall(r"^```\w*\n(.*?)^```", document, re.M | re.S))


@cache
def _defined(path: Path) -> frozenset[str]:
    """Names defined in a Python file or called in a proto: functions, classes, methods, constants."""
    if path.suffix == ".proto":
        return frozenset(re.findall(r"(?:service|rpc|message|enum) (\w+)", path.read_text()))
    names = set()
    for node in ast.parse(path.read_text()).body:
        names |= _names_of(node)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner}" for member in node.body for inner in _names_of(member)}
    return frozenset(names)


def _names_of(node: ast.stmt) -> set[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Assign(targets=targets):
            return {target.id for target in targets if isinstance(target, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
    return set()


# --- the documents ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_and_names_exist(name: str) -> None:
    problems = bad_paths((ROOT / name).read_text())
    assert not problems, "\n" + "\n".join(f"{name}:{problem}" for problem in problems)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    problems = bad_links((ROOT / name).read_text(), (ROOT / name).parent)
    assert not problems, "\n" + "\n".join(f"{name}:{problem}" for problem in problems)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    wanted = {word for name in DOCUMENTS for word in named((ROOT / name).read_text(), "make")}
    assert wanted, "the documents name no target, which is hardly true"
    assert wanted <= targets


def test_commands_exist() -> None:
    help_text = subprocess.run(
        [sys.executable, "-m", "layercast_cli", "--help"],
        capture_output=True, text=True, timeout=60, check=True, cwd=ROOT,
    ).stdout  # fmt: skip
    wanted = {word for name in DOCUMENTS for word in named((ROOT / name).read_text(), "layercast")}
    assert {"up", "demo", "get", "scale"} <= wanted
    missing = [command for command in wanted if not re.search(rf"\b{command}\b", help_text)]
    assert not missing, f"`layercast --help` does not know {missing}"


OTHERS_SAMPLES = {"hpa.yaml": "HorizontalPodAutoscaler", "keda.yaml": "ScaledObject"}
"""Samples of objects that are not ours and point at a ModelService."""
POOL_SAMPLE = "inferencepool.yaml"
"""A sample that points at the gateways' pods."""


def test_samples_are_model_services() -> None:
    samples = sorted((ROOT / "manifests" / "samples").glob("*.yaml"))
    assert samples, "there are no samples"
    for sample in samples:
        for document in yaml.safe_load_all(sample.read_text()):
            assert document["metadata"]["name"], sample
            if sample.name == POOL_SAMPLE:
                continue  # tests/chart compares it with the gateways' pods
            if sample.name in OTHERS_SAMPLES:
                assert document["kind"] == OTHERS_SAMPLES[sample.name], sample
                assert document["spec"]["scaleTargetRef"]["kind"] == "ModelService", sample
                continue
            kind = (document["apiVersion"], document["kind"])
            assert kind == ("layercast.dev/v1alpha1", "ModelService"), sample
            assert document["spec"]["model"]["source"], sample


def test_users_are_not_sent_to_folders_that_they_do_not_have() -> None:
    """The repository stands alone; only CI may look whether something lies beside it."""
    files = [ROOT / name for name in DOCUMENTS] + sorted((ROOT / "docs").rglob("*.md"))
    offenders = [str(file.relative_to(ROOT)) for file in files if "shared/" in file.read_text()]
    assert not offenders


# --- the checks, each against a sample that breaks it -------------------------------------------------------


def test_bad_names_are_found() -> None:
    text = "See `tests/nothing.py`, `tests/test_docs.py:nobody`, and `tests/test_docs.py:names_in`.\n"
    assert bad_paths(text) == [
        "1: tests/nothing.py does not exist",
        "1: tests/test_docs.py does not define nobody",
    ]
    assert bad_paths("```\ncat docs/nothing.md\n```\n") == ["2: docs/nothing.md does not exist"]
    assert bad_paths("`out/demo/result.json`, `path.py`, `a/b`, and `proto/layercast/**`") == []


def test_bad_links_are_found() -> None:
    text = "[a](docs/nothing.md) [b](README.md#top) [c](https://example.com/x)"
    assert bad_links(text, ROOT) == ["1: docs/nothing.md does not exist"]


def test_commands_are_found() -> None:
    fenced = "```\n.venv/bin/layercast get\nlayercast-agent --help\n```\n"
    text = f"Run `make it-so` and `layercast up -f x`.\n\n{fenced}"
    assert named(text, "make") == {"it-so"}
    assert named(text, "layercast") == {"up", "get"}
