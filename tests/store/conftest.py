"""Tiny checkpoints for the store's tests, and a store that cuts them into many chunks."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from layercast_agent.store import Progress, Store

TESTS = Path(__file__).resolve().parent.parent
CHUNK_BYTES = 4096  # small, so that tiny models have many chunks


@pytest.fixture
def llama(tinymodels: ModuleType, tmp_path: Path) -> Path:
    """A small Llama folder of one weights file."""
    folder: Path = tinymodels.make(tmp_path / "llama", "llama", layers=2)
    return folder


@pytest.fixture
def sharded(tinymodels: ModuleType, tmp_path: Path) -> Path:
    """A small Llama folder of three shards and an index."""
    folder: Path = tinymodels.make(tmp_path / "sharded", "llama", layers=2, shards=3)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store", pvc_root=tmp_path / "pvc", chunk_bytes=CHUNK_BYTES)


@pytest.fixture
def packed(store: Store, llama: Path) -> Path:
    """The folder of a packed small Llama."""
    manifest = store.prepare(key="k", source=f"file://{llama}", revision="", dtype="", progress=ignore)
    return store.folder(manifest.digest)


def ignore(progress: Progress) -> None:
    """A progress callback that needs nothing."""
