"""What goes into the images: little into the two that decide and forward, and archives that a runtime can load."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

SITE_PACKAGES_BYTES_MAX = 150_000_000
HEAVY = {"torch", "transformers", "accelerate", "numpy", "safetensors"}


@pytest.mark.parametrize("component", ["operator", "gateway"])
def test_deciding_and_forwarding_need_no_engine(images: ModuleType, component: str) -> None:
    distributions = images.closure(component)
    assert not HEAVY & {distribution.name for distribution in distributions}
    size = sum(
        source.stat().st_size for distribution in distributions for _, source in images.files_of(distribution)
    )
    assert 10_000_000 < size < SITE_PACKAGES_BYTES_MAX, f"{size / 1e6:.0f} MB"


def test_the_agent_has_the_engine(images: ModuleType) -> None:
    assert {"torch", "transformers", "grpcio"} <= {d.name for d in images.closure("agent")}


def test_a_layer_is_reproducible_and_belongs_to_root(images: ModuleType, tmp_path: Path) -> None:
    first = images.source_layer(tmp_path / "one.tar", "gateway")
    second = images.source_layer(tmp_path / "two.tar", "gateway")
    assert first.content_digest == second.content_digest


def test_an_archive_names_its_image_and_its_user(
    images: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With libraries left out, which take long: the format is the same."""
    monkeypatch.setattr(images, "closure", lambda _component: ())
    python = images.source_layer(tmp_path / "python.tar", "gateway")
    archive = images.build("gateway", python=python, out=tmp_path, name="registry.local/gateway:1")
    with tarfile.open(archive) as tar:

        def content(name: str) -> bytes:
            file = tar.extractfile(name)
            assert file is not None
            return file.read()

        index = json.loads(content("index.json"))["manifests"][0]
        assert index["annotations"]["io.containerd.image.name"] == "registry.local/gateway:1"
        manifest = json.loads(content("blobs/sha256/" + index["digest"].removeprefix("sha256:")))
        config = json.loads(content("blobs/sha256/" + manifest["config"]["digest"].removeprefix("sha256:")))
        assert config["config"]["User"] == "65532:65532"
        assert config["config"]["Entrypoint"][-1] == "layercast_gateway"
        assert len(config["rootfs"]["diff_ids"]) == len(manifest["layers"]) == 3
        for layer in manifest["layers"]:
            member = tar.getmember("blobs/sha256/" + layer["digest"].removeprefix("sha256:"))
            assert member.size == layer["size"]
