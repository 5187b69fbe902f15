"""What must not work says why."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from tests.cluster.bed import Bed

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


def service(name: str, **spec: Any) -> str:
    """A ModelService as JSON."""
    return json.dumps(
        {
            "apiVersion": "layercast.dev/v1alpha1",
            "kind": "ModelService",
            "metadata": {"name": name},
            "spec": spec,
        }
    )


def test_a_malformed_service_is_refused_by_the_api_server(bed: Bed) -> None:
    with pytest.raises(subprocess.SubprocessError, match=r"spec\.replicas"):
        bed.kubectl(
            "create",
            "--validate=false",
            "-f",
            "-",
            given=service("bad", model={"source": "hf://a/b"}, replicas=-1),
        )
    with pytest.raises(subprocess.SubprocessError, match=r"spec\.model"):
        bed.kubectl("create", "--validate=false", "-f", "-", given=service("bad"))


def test_a_path_that_leaves_its_volume_is_refused(bed: Bed) -> None:
    source = "pvc://models/../../../etc"
    text = service("escape", model={"source": source}, replicas=1)
    try:
        bed.kubectl("create", "--validate=false", "-f", "-", given=text)
    except subprocess.SubprocessError as refused:
        assert "source" in str(refused)
        return
    bed.wait(lambda: "leaves its volume" in json.dumps(bed.status("escape")), "the reason is in the status")
    bed.kubectl("delete", "modelservice", "escape")
