"""One installation and one served model for all cluster tests; Helm installs at the first and uninstalls at the end."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from tests.cluster.bed import NAMESPACE, PROMPTS, ROOT, Bed

SAMPLE = ROOT / "manifests" / "samples" / "minimal.yaml"
# In fp32 a greedy answer is one answer, whatever else happens.
EXACT: dict[str, Any] = {"replicas": 1, "model": {"dtype": "float32"}, "serving": {"contextLength": 512}}


def _chart() -> Any:
    spec = importlib.util.spec_from_file_location("layercast_tools_chart", ROOT / "tools" / "chart.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def bed() -> Iterator[Bed]:
    """The installation. LAYERCAST_KEEP=1 takes one that is there and leaves it behind, to be looked at."""
    if not os.environ.get("KUBECONFIG") or shutil.which("kubectl") is None:
        pytest.skip("there is no KUBECONFIG, or no kubectl")
    made = Bed(_chart().helm())
    made.install()
    yield made
    made.report()
    if not os.environ.get("LAYERCAST_KEEP"):
        made.uninstall()
        made.kubectl("delete", "namespace", NAMESPACE)


@pytest.fixture(scope="session")
def served(bed: Bed) -> Bed:
    """The smallest sample, applied, and one replica of it."""
    bed.kubectl("apply", "--validate=false", "-f", str(SAMPLE))
    bed.patch(EXACT)
    bed.wait(lambda: bed.serving() == 1, "one replica serves", deadline_s=240)
    return bed


@pytest.fixture(scope="session")
def right(served: Bed) -> dict[str, str]:
    """What one replica answers at rest."""
    return {prompt: served.ask(prompt) for prompt in PROMPTS}


@pytest.fixture
def at(served: Bed) -> Iterator[Any]:
    """Brings the service to a number of replicas; afterwards the specification is what it was."""

    def bring(replicas: int) -> Bed:
        served.patch({"replicas": replicas})
        served.wait(lambda: served.serving() == replicas, f"{replicas} replicas serve", deadline_s=180)
        return served

    yield bring
    served.patch({"scaling": None, **EXACT})
