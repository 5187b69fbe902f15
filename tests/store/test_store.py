"""A node's disk: prepared once, found again, and never half there, whatever dies in between."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from layercast_agent.checkpoint_files import verify
from layercast_agent.errors import CheckpointError, NoCapacityError
from layercast_agent.layout import Manifest
from layercast_agent.packing import MANIFEST_FILE, segment_file
from layercast_agent.store import PACKING_PREFIX, Phase, Progress, Store


def prepare(
    store: Store,
    source: Path,
    *,
    key: str = "k",
    dtype: str = "",
    progress: Callable[[Progress], Any] = lambda progress: None,
) -> Manifest:
    return store.prepare(key=key, source=f"file://{source}", revision="", dtype=dtype, progress=progress)


def leftovers(store_root: Path) -> list[str]:
    return [path.name for path in store_root.iterdir() if path.name.startswith(PACKING_PREFIX)]


def test_what_is_prepared_is_found(store: Store, llama: Path, tmp_path: Path) -> None:
    assert store.lookup("k") is None and store.manifests() == {}
    said: list[Progress] = []
    manifest = prepare(store, llama, progress=said.append)
    assert store.lookup("k") == manifest
    assert store.manifests() == {manifest.digest: manifest}
    assert store.folder(manifest.digest) == tmp_path / "store" / manifest.digest
    assert store.files(manifest.digest)["config.json"] == (llama / "config.json").read_bytes()
    assert {progress.phase for progress in said} == {Phase.PACKING}
    assert said[-1] == Progress(phase=Phase.PACKING, done_bytes=manifest.nbytes, total_bytes=manifest.nbytes)
    verify(store.folder(manifest.digest))
    assert leftovers(tmp_path / "store") == []


def test_a_restart_finds_everything_again(store: Store, llama: Path, tmp_path: Path) -> None:
    manifest = prepare(store, llama)
    shutil.rmtree(llama)
    again = Store(tmp_path / "store")
    assert again.manifests() == {manifest.digest: manifest}
    assert again.lookup("k") == manifest
    assert prepare(again, llama) == manifest  # its source is gone and not needed


def test_another_process_of_the_store_is_seen(store: Store, llama: Path, tmp_path: Path) -> None:
    other = Store(tmp_path / "store")
    manifest = prepare(store, llama)
    assert other.lookup("k") == manifest
    assert other.folder(manifest.digest).is_dir()


def test_a_key_that_changes_its_meaning_is_prepared_again(store: Store, llama: Path) -> None:
    first = prepare(store, llama)
    second = prepare(store, llama, dtype="bfloat16")
    assert second.dtype == "bfloat16" and second.digest != first.digest
    assert store.lookup("k") == second
    assert set(store.manifests()) == {first.digest, second.digest}


def test_two_keys_of_one_content_share_a_folder(store: Store, llama: Path, tmp_path: Path) -> None:
    assert prepare(store, llama, key="a") == prepare(store, llama, key="b", dtype="float32")
    assert sum(len(path.name) == 64 for path in (tmp_path / "store").iterdir()) == 1


@pytest.mark.parametrize(
    "key", ["hf://org/name@main:float32", "../../etc/passwd", "a" * 5000, ".", "..", "ü \n/\\%00", "k.json"]
)
def test_any_text_is_a_key(store: Store, llama: Path, tmp_path: Path, key: str) -> None:
    manifest = prepare(store, llama, key=key)
    assert Store(tmp_path / "store").lookup(key) == manifest
    assert store.lookup(key + "x") is None
    assert {path.name for path in tmp_path.iterdir()} == {"store", "llama"}


def test_callers_at_the_same_time_share_one_packing(llama: Path, tmp_path: Path) -> None:
    """Eight threads on two stores of one folder, as two processes would have them."""
    stores = [Store(tmp_path / "store") for _ in range(2)]
    barrier = threading.Barrier(8)
    packings: list[Progress] = []

    def one(index: int) -> Manifest:
        barrier.wait(timeout=30)
        return prepare(stores[index % 2], llama, progress=packings.append)

    with ThreadPoolExecutor(8) as threads:
        manifests = list(threads.map(one, range(8)))
    assert len({manifest.digest for manifest in manifests}) == 1
    assert sum(progress.done_bytes == 0 for progress in packings) == 1


def _prepare_in_child(root: Path, source: Path, answers: Any) -> None:
    started: list[Progress] = []
    manifest = prepare(Store(root), source, progress=started.append)
    answers.put((manifest.digest, len(started)))


def test_processes_at_the_same_time_share_one_packing(llama: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    arguments = (tmp_path / "store", llama, answers)
    children = [context.Process(target=_prepare_in_child, args=arguments) for _ in range(3)]
    for child in children:
        child.start()
    found = [answers.get(timeout=60) for _ in children]
    for child in children:
        child.join(timeout=60)
    assert len({digest for digest, _ in found}) == 1
    assert sum(reports > 0 for _, reports in found) == 1


CRASH = """
import os, signal, sys
from pathlib import Path
from layercast_agent.store import Store

def progress(said):
    if said.done_bytes >= said.total_bytes // 2:
        os.kill(os.getpid(), signal.SIGKILL)

store = Store(Path(sys.argv[1]), chunk_bytes=4096)
store.prepare(key="k", source="file://" + sys.argv[2], revision="", dtype="", progress=progress)
"""


def test_a_killed_packing_leaves_nothing_behind(llama: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    child = subprocess.run([sys.executable, "-c", CRASH, str(root), str(llama)], check=False, timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert len(leftovers(root)) == 1
    assert any((root / leftovers(root)[0]).iterdir())
    store = Store(root)
    assert leftovers(root) == []
    assert store.manifests() == {} and store.lookup("k") is None
    verify(store.folder(prepare(store, llama).digest))


def test_a_killed_packing_is_no_obstacle_without_a_restart(store: Store, llama: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    subprocess.run([sys.executable, "-c", CRASH, str(root), str(llama)], check=False, timeout=60)
    assert len(leftovers(root)) == 1
    verify(store.folder(prepare(store, llama).digest))
    assert leftovers(root) == []


def test_a_living_packing_is_not_removed(store: Store, llama: Path, tmp_path: Path) -> None:
    """A second process starts in the middle of a packing."""
    seen: list[list[str]] = []

    def progress(said: Progress) -> None:
        if not seen:
            Store(tmp_path / "store")
            seen.append(leftovers(tmp_path / "store"))

    verify(store.folder(prepare(store, llama, progress=progress).digest))
    assert len(seen[0]) == 1


def test_a_failed_packing_can_be_tried_again(store: Store, llama: Path, tmp_path: Path) -> None:
    weights = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(weights[:-1])
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"truncated.*model\.safetensors, tensor .*, offset"):
            prepare(store, llama)
    assert store.lookup("k") is None and leftovers(tmp_path / "store") == []
    (llama / "model.safetensors").write_bytes(weights)
    prepare(store, llama)


def test_a_callback_can_stop_it(store: Store, llama: Path, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(store, llama, progress=stop)
    assert leftovers(tmp_path / "store") == []
    prepare(store, llama)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: truncate(folder / segment_file(1)),
        lambda folder: (folder / segment_file(2)).unlink(),
        lambda folder: truncate(folder / MANIFEST_FILE),
        lambda folder: (folder / MANIFEST_FILE).unlink(),
    ],
)
def test_a_damaged_checkpoint_is_not_offered_and_is_replaced(
    store: Store,
    llama: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    manifest = prepare(store, llama)
    damage(store.folder(manifest.digest))
    again = Store(tmp_path / "store", chunk_bytes=4096)
    assert again.manifests() == {} and again.lookup("k") is None
    assert [record.message for record in caplog.records] == ["packed checkpoint is damaged and not offered"]
    with pytest.raises(CheckpointError, match="is not on this node's disk"):
        again.folder(manifest.digest)
    assert prepare(again, llama) == manifest
    verify(again.folder(manifest.digest))


def test_a_folder_under_another_digest_is_not_offered(store: Store, llama: Path, tmp_path: Path) -> None:
    manifest = prepare(store, llama)
    other = "0" * 64
    store.folder(manifest.digest).rename(tmp_path / "store" / other)
    assert Store(tmp_path / "store").manifests() == {}


def test_a_damaged_key_record_is_forgotten(store: Store, llama: Path, tmp_path: Path) -> None:
    manifest = prepare(store, llama)
    (record,) = (tmp_path / "store" / "keys").iterdir()
    for content in ("{", "[]", json.dumps({"key": "other", "digest": manifest.digest}), '{"digest": 7}'):
        record.write_text(content)
        assert store.lookup("k") is None
    assert prepare(store, llama) == manifest
    assert store.lookup("k") == manifest


def test_a_full_disk_says_both_sums(
    store: Store, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1000))
    with pytest.raises(NoCapacityError, match=r"needs \d+ bytes.* has 1000 free"):
        prepare(store, llama)
    assert leftovers(tmp_path / "store") == []


@pytest.mark.parametrize("digest", ["", "..", "../..", "0" * 64, "keys"])
def test_an_unknown_digest_is_refused(store: Store, digest: str) -> None:
    with pytest.raises(CheckpointError, match="is not on this node's disk"):
        store.folder(digest)


@pytest.mark.parametrize("chunk_bytes", [0, -8, 12])
def test_chunk_sizes_must_suit_the_checksum(tmp_path: Path, chunk_bytes: int) -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        Store(tmp_path, chunk_bytes=chunk_bytes)


def test_the_store_needs_no_torch(tinymodels: ModuleType, llama: Path, tmp_path: Path) -> None:
    program = (
        "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from pathlib import Path\nfrom layercast_agent.store import Store\n"
        "Store(Path(sys.argv[1])).prepare(key='k', source='file://' + sys.argv[2], revision='',"
        " dtype='bfloat16', progress=lambda progress: None)\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "store"), str(llama)], check=True, timeout=60
    )


def test_locks_end_with_their_holder(store: Store, llama: Path, tmp_path: Path) -> None:
    """What makes crash safety work: flock belongs to the open file, not to a name on disk."""
    prepare(store, llama)
    for path in (tmp_path / "store" / "locks").iterdir():
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
