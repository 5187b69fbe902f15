"""What all areas share: the tiny random models, which are made by code and belong to no package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs one at a time comes first: the other half of pytest-xdist has the rest to do meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


@pytest.fixture(scope="session")
def tinymodels() -> ModuleType:
    """The module `tests/tinymodels.py`."""
    path = Path(__file__).with_name("tinymodels.py")
    spec = importlib.util.spec_from_file_location("tinymodels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
