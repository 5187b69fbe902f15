"""The folder that stands for the API server: edits, breaks, deletions, and status files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from layercast_operator.cluster.local import LocalCluster

YAML = """
apiVersion: layercast.dev/v1alpha1
kind: ModelService
metadata: {{name: {name}}}
spec: {{model: {{source: "file:///x"}}, replicas: {replicas}}}
"""


class Folder:
    """A local cluster with a clock that the test moves."""

    def __init__(self, root: Path) -> None:
        self.root, self.now = root, 1000.0
        (root / "modelservices").mkdir()
        self.cluster = LocalCluster(root, clock=lambda: self.now)
        self.edits = 0

    def write(self, file: str, text: str) -> None:
        """Replace a file so that its stamp differs, as an editor would."""
        path = self.root / file
        path.write_text(text)
        self.edits += 1
        os.utime(path, ns=(self.edits * 10**9, self.edits * 10**9))

    def service(self, name: str = "a", replicas: int = 1, file: str = "") -> None:
        self.write(f"modelservices/{file or name}.yaml", YAML.format(name=name, replicas=replicas))

    def status(self, name: str) -> Any:
        return json.loads((self.root / "status" / f"{name}.json").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


async def test_services_and_cluster_are_read(folder: Folder) -> None:
    folder.service("a")
    folder.service("b", replicas=0)
    folder.write("modelservices/.hidden.yaml", "broken: [")
    folder.write("modelservices/notes.txt", "not ours")
    folder.write("cluster.json", '{"agents": {"n0": "127.0.0.1:7001"}, "gateways": ["127.0.0.1:8080"]}')
    got = await folder.cluster.desired()
    assert [(m.name, m.replicas, m.generation) for m in got.models] == [("a", 1, 1), ("b", 0, 1)]
    assert got.agents == {"n0": "127.0.0.1:7001"} and got.gateways == ("127.0.0.1:8080",)
    assert got.complete and got.problem == "" and got.invalid == ()
    assert await folder.cluster.desired() == got


async def test_a_change_of_meaning_is_a_new_generation(folder: Folder) -> None:
    folder.service("a")
    await folder.cluster.desired()
    folder.write("modelservices/a.yaml", "# a comment\n" + YAML.format(name="a", replicas=1))
    assert (await folder.cluster.desired()).models[0].generation == 1
    folder.service("a", replicas=2)
    changed = (await folder.cluster.desired()).models[0]
    assert (changed.generation, changed.replicas) == (2, 2)


async def test_a_broken_file_leaves_the_last_good_one_in_force(folder: Folder) -> None:
    folder.service("a", replicas=2)
    await folder.cluster.desired()
    folder.write("modelservices/a.yaml", "spec: [")
    broken = await folder.cluster.desired()
    assert broken.models[0].replicas == 2 and "a.yaml: is not YAML" in broken.models[0].problem
    assert broken.complete
    folder.service("a", replicas=3)
    mended = (await folder.cluster.desired()).models[0]
    assert (mended.replicas, mended.problem, mended.generation) == (3, "", 2)


async def test_a_file_that_was_never_good_is_reported_and_deletes_nothing(folder: Folder) -> None:
    folder.service("a")
    folder.write("modelservices/b.yaml", YAML.format(name="b", replicas="many"))
    got = await folder.cluster.desired()
    (invalid,) = got.invalid
    assert invalid.name == "b" and "b.yaml: spec.replicas: must be a whole number" in invalid.problem
    assert not got.complete  # it may be the one that a running replica belongs to


async def test_one_name_in_two_files(folder: Folder) -> None:
    folder.service("a", replicas=1)
    folder.service("a", replicas=5, file="second")
    got = await folder.cluster.desired()
    assert [m.replicas for m in got.models] == [1]
    assert got.invalid[0].name == "second" and "'a' is taken by a.yaml" in got.invalid[0].problem


async def test_a_missing_file_counts_as_deleted_after_a_moment(folder: Folder) -> None:
    folder.service("a")
    await folder.cluster.desired()
    (folder.root / "modelservices/a.yaml").unlink()
    assert len((await folder.cluster.desired()).models) == 1
    folder.now += 0.9
    assert len((await folder.cluster.desired()).models) == 1
    folder.now += 0.2
    gone = await folder.cluster.desired()
    assert gone.models == () and gone.complete


async def test_a_folder_that_cannot_be_listed_deletes_nothing(folder: Folder) -> None:
    folder.service("a")
    await folder.cluster.desired()
    (folder.root / "modelservices").rename(folder.root / "elsewhere")
    folder.now += 60
    got = await folder.cluster.desired()
    assert [m.name for m in got.models] == ["a"] and not got.complete


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cluster.json: "),
        ("[]", "must be a mapping"),
        ('{"agents": ["x"]}', "agents: must map node names to host:port"),
        ('{"agents": {"n": "nowhere"}}', "agents: must map"),
        ('{"gateways": "127.0.0.1:1"}', "gateways: must be a list"),
    ],
)
async def test_a_broken_cluster_file_leaves_the_last_good_one(folder: Folder, text: str, words: str) -> None:
    assert "cluster.json" in (await folder.cluster.desired()).problem
    folder.write("cluster.json", '{"agents": {"n0": "h:1"}, "gateways": []}')
    await folder.cluster.desired()
    folder.write("cluster.json", text)
    got = await folder.cluster.desired()
    assert got.agents == {"n0": "h:1"} and words in got.problem


async def test_status_is_written_when_it_changes_and_every_second(folder: Folder) -> None:
    path = folder.root / "status/a.json"
    await folder.cluster.write_status("a", {"name": "a", "n": 1})
    first = path.stat().st_ino
    await folder.cluster.write_status("a", {"name": "a", "n": 1})
    assert path.stat().st_ino == first
    await folder.cluster.write_status("a", {"name": "a", "n": 2})
    second = path.stat().st_ino
    assert second != first and folder.status("a") == {"name": "a", "n": 2}
    folder.now += 1.0
    await folder.cluster.write_status("a", {"name": "a", "n": 2})
    assert path.stat().st_ino != second
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.json"]
    await folder.cluster.forget("a")
    await folder.cluster.forget("a")
    assert not path.exists()


async def test_the_generation_goes_on_after_a_restart(folder: Folder) -> None:
    folder.service("a")
    await folder.cluster.write_status("a", {"name": "a", "observedGeneration": 7})
    restarted = LocalCluster(folder.root, clock=lambda: folder.now)
    assert (await restarted.desired()).models[0].generation == 7
    assert await restarted.last_status("a") == {"name": "a", "observedGeneration": 7}
    (folder.root / "status/a.json").write_text("{half")
    assert await restarted.last_status("a") is None
