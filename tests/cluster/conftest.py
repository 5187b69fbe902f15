"""One installation for all cluster tests: installed by Helm at the first, uninstalled and looked over at the end."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from tests.cluster.bed import NAMESPACE, RELEASE, ROOT, Bed


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
    if not os.environ.get("LAYERCAST_KEEP"):
        made.kubectl("delete", "modelservices", "--all", "--timeout=60s")
        made.helm("uninstall", RELEASE, "--wait")
        made.kubectl("delete", "namespace", NAMESPACE)
