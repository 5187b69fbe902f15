"""What each process may import, checked by importing it, and that the pinned versions are the promised ones.

import-linter reads the source; these tests run it: a fresh interpreter in which a forbidden library cannot be
imported loads every module of the package, so a lazy or indirect import at start-up is found too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent

# None in sys.modules makes `import torch` fail as if it were not installed.
IMPORT_ALL = """
import importlib, pkgutil, sys
package_name, *forbidden = sys.argv[1:]
for name in forbidden:
    sys.modules[name] = None
package = importlib.import_module(package_name)
if hasattr(package, "__path__"):
    for module in pkgutil.walk_packages(package.__path__, package_name + "."):
        importlib.import_module(module.name)
"""

# Modules without torch, though their package has it: the pure decisions, and the agent's own process.
LIGHT_MODULES = (
    "layercast_agent.__main__",
    "layercast_agent.engine.scheduler",
    "layercast_agent.engine.sequence",
    "layercast_agent.layout",
    "layercast_agent.live",
    "layercast_agent.residency",
    "layercast_agent.transfer",
)


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _import_all(name: str, *forbidden: str) -> None:
    result = _python("-c", IMPORT_ALL, name, *forbidden, PYTHONSAFEPATH="1")
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("package", ["layercast_operator", "layercast_gateway"])
def test_operator_and_gateway_run_without_the_engines_libraries(package: str) -> None:
    _import_all(package, "torch", "transformers", "numpy", "safetensors", "accelerate")


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_pure_modules_and_the_agent_run_without_torch(module: str) -> None:
    _import_all(module, "torch", "transformers", "accelerate")


def test_a_forbidden_import_is_found() -> None:
    result = _python("-c", IMPORT_ALL, "layercast_agent.errors", "pathlib", PYTHONSAFEPATH="1")
    assert result.returncode != 0
    assert "import of pathlib halted" in result.stderr


def test_operator_is_still_the_standard_librarys() -> None:
    """The folder operator/ lies in the repository's root; it must never become a package."""
    code = "import sys; sys.modules.pop('operator', None); import operator; print(operator.__file__)"
    result = _python("-c", code)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).parent == Path(sysconfig.get_path("stdlib"))


def _project() -> dict[str, list[Requirement]]:
    """Requirements of the distribution by extra; "" has those of every process."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {name: [Requirement(line) for line in lines] for name, lines in groups.items()}


def _pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line.strip() and not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_constraints_pin_every_dependency_within_its_range() -> None:
    pins = _pins()
    wanted = [r for group in _project().values() for r in group if r.name != "layercast"]
    unpinned = [r.name for r in wanted if canonicalize_name(r.name) not in pins]
    assert not unpinned, f"constraints.txt lacks {unpinned}"
    outside = [str(r) for r in wanted if not r.specifier.contains(pins[canonicalize_name(r.name)])]
    assert not outside, f"constraints.txt pins outside {outside}"


def test_operator_and_gateway_extras_name_no_heavy_library() -> None:
    heavy = {"torch", "transformers", "numpy", "safetensors", "accelerate"}
    groups = _project()
    for extra in ("", "operator", "gateway"):
        assert not heavy & {requirement.name for requirement in groups[extra]}, extra


def test_generated_code_accepts_the_oldest_runtime_that_we_promise() -> None:
    """Generated files refuse a runtime older than their generator; the lower bounds must say so."""
    lower = {r.name: min(Version(s.version) for s in r.specifier) for r in _project()[""]}
    generated = ROOT / "proto" / "gen" / "layercast" / "agent" / "v1alpha1"
    grpc_text = (generated / "agent_pb2_grpc.py").read_text()
    grpc_version = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", grpc_text)
    protobuf_text = (generated / "agent_pb2.py").read_text()
    protobuf_version = re.search(r"# Protobuf Python Version: ([\d.]+)", protobuf_text)
    assert grpc_version and Version(grpc_version[1]) <= lower["grpcio"]
    assert protobuf_version and Version(protobuf_version[1]) <= lower["protobuf"]
