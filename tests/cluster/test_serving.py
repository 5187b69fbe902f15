"""From `helm install` to an answer, and what people change by hand while it serves: no request fails."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from tests.cluster.bed import PROMPTS, RELEASE, ROOT, Bed

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

SAMPLE = ROOT / "manifests" / "samples" / "minimal.yaml"
NAME = "smollm2"


@pytest.fixture(scope="module")
def served(bed: Bed) -> Iterator[Bed]:
    """The smallest sample, applied; in fp32, so that a greedy answer is one answer whatever else happens."""
    bed.kubectl("apply", "--validate=false", "-f", str(SAMPLE))
    exact = {"spec": {"replicas": 1, "model": {"dtype": "float32"}, "serving": {"contextLength": 512}}}
    bed.kubectl("patch", "modelservice", NAME, "--type=merge", "-p", json.dumps(exact))
    bed.wait(lambda: bed.serving(NAME) == 1, "one replica serves", deadline_s=240)
    yield bed
    bed.kubectl("delete", "modelservice", NAME)


@pytest.fixture(scope="module")
def right(served: Bed) -> dict[str, str]:
    """What one replica answers at rest."""
    return {prompt: served.ask(NAME, prompt) for prompt in PROMPTS}


def test_the_smallest_sample_serves(served: Bed, right: dict[str, str]) -> None:
    assert "Paris" in right["The capital of France is"]
    conditions = {c["type"]: c["status"] for c in served.status(NAME)["conditions"]}
    assert conditions["Ready"] == conditions["WeightsLoaded"] == "True"


def test_helm_test_passes(served: Bed) -> None:
    served.helm("test", RELEASE, "--timeout", "90s")


def test_kubectl_scale_loses_nothing(served: Bed, right: dict[str, str]) -> None:
    with served.traffic(NAME) as traffic:
        served.kubectl("scale", "modelservice", NAME, "--replicas=3")
        served.wait(lambda: served.serving(NAME) == 3, "three replicas serve")
        served.kubectl("scale", "modelservice", NAME, "--replicas=1")
        served.wait(lambda: len(served.status(NAME)["replicas"]) == 1, "one replica is left")
        served.wait(lambda: len(traffic.answers) >= 6, "requests go on")
    assert not traffic.wrong(right)
