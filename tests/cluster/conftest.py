"""One installation and one served model for all cluster tests; Helm installs at the first and uninstalls at the end.

What is installed first is the chart of the commit before; it is upgraded to this one while requests run, and the
tests are of what the upgrade left.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.bed import CHART, NAMESPACE, PROMPTS, ROOT, Bed, Traffic

SAMPLE = ROOT / "manifests" / "samples" / "minimal.yaml"
# In fp32 a greedy answer is one answer, whatever else happens.
EXACT: dict[str, Any] = {"replicas": 1, "model": {"dtype": "float32"}, "serving": {"contextLength": 512}}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with an operator of their own come first: the installed one looks at all namespaces, and would act too."""
    items.sort(key=lambda item: "bed" in getattr(item, "fixturenames", ()))


def _chart() -> Any:
    spec = importlib.util.spec_from_file_location("layercast_tools_chart", ROOT / "tools" / "chart.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _chart_before(folder: Path) -> Path:
    """The chart of the commit before; this one where there is no history."""
    command = ["git", "-C", str(ROOT), "archive", "HEAD~1", "charts/layercast"]
    found = subprocess.run(command, capture_output=True, check=False)
    if found.returncode:
        return CHART
    with tarfile.open(fileobj=BytesIO(found.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder / "charts" / "layercast"


@pytest.fixture(scope="session")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """The installation. LAYERCAST_KEEP=1 takes one that is there and leaves it behind, to be looked at."""
    if not os.environ.get("KUBECONFIG") or shutil.which("kubectl") is None:
        pytest.skip("there is no KUBECONFIG, or no kubectl")
    made = Bed(_chart().helm())
    if made.is_installed() and os.environ.get("LAYERCAST_KEEP"):
        made.install()
    else:
        made.install(chart=_chart_before(tmp_path_factory.mktemp("before")))
    yield made
    made.report()
    if not os.environ.get("LAYERCAST_KEEP"):
        made.uninstall()
        made.kubectl("delete", "namespace", NAMESPACE)


@pytest.fixture(scope="session")
def applied(bed: Bed) -> Bed:
    """The smallest sample, applied, and one replica of it, before the upgrade."""
    bed.kubectl("apply", "--validate=false", "-f", str(SAMPLE))
    bed.patch(EXACT)
    bed.wait(lambda: bed.serving() == 1, "one replica serves", deadline_s=240)
    return bed


@pytest.fixture(scope="session")
def right(applied: Bed) -> dict[str, str]:
    """What one replica answers at rest."""
    return {prompt: applied.ask(prompt) for prompt in PROMPTS}


@pytest.fixture(scope="session")
def upgrade(applied: Bed, right: dict[str, str]) -> Traffic:
    """The requests that ran while the release was upgraded and every pod replaced."""
    if os.environ.get("LAYERCAST_KEEP"):
        pytest.skip("LAYERCAST_KEEP: the installation that is there is not upgraded")
    applied.patch({"replicas": 2})
    applied.wait(lambda: applied.serving() == 2, "two replicas serve", deadline_s=180)
    before = applied.replica_ids()
    with applied.traffic() as traffic:
        components = ("operator", "gateway", "agent")
        applied.flags = tuple(f"--set={each}.podAnnotations.test/upgraded=yes" for each in components)
        applied.install()
        took_s = applied.wait(
            lambda: applied.serving() == 2 and not before & applied.replica_ids(),
            "two replicas serve on new agents",
            deadline_s=240,
        )
        applied.note("two replicas again after helm upgrade", took_s)
        count = len(traffic.answers)
        applied.wait(lambda: len(traffic.answers) >= count + 4, "requests go on")
    return traffic


@pytest.fixture(scope="session")
def served(applied: Bed, request: pytest.FixtureRequest) -> Bed:
    """One replica of the smallest sample, with this commit's chart."""
    if not os.environ.get("LAYERCAST_KEEP"):
        request.getfixturevalue("upgrade")
    applied.patch(EXACT)
    applied.wait(lambda: applied.serving() == 1, "one replica serves", deadline_s=240)
    return applied


@pytest.fixture
def at(served: Bed) -> Iterator[Any]:
    """Brings the service to a number of replicas; afterwards the specification is what it was."""

    def bring(replicas: int) -> Bed:
        served.patch({"replicas": replicas})
        served.wait(lambda: served.serving() == replicas, f"{replicas} replicas serve", deadline_s=180)
        return served

    yield bring
    served.patch({"scaling": None, **EXACT})
