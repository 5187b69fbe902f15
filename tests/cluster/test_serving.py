"""From `helm install` to an answer, and what people change by hand while it serves: no request fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.cluster.bed import RELEASE, Bed

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
Right = dict[str, str]


def test_the_smallest_sample_serves(served: Bed, right: Right) -> None:
    assert "Paris" in right["The capital of France is"]
    # Answers come before the last layer does.
    served.wait(lambda: conditions_of(served)["WeightsLoaded"] == "True", "all parameters are there")
    assert conditions_of(served)["Ready"] == "True"


def conditions_of(served: Bed) -> dict[str, str]:
    """Status by type."""
    return {c["type"]: c["status"] for c in served.status()["conditions"]}


def test_the_doctor_finds_nothing(served: Bed) -> None:
    said = ""

    def content() -> bool:
        nonlocal said
        code, said = served.doctor()
        return code == 0

    # One answer, not two: while operators hand over (an upgrade just ended) he rightly finds nobody who acts.
    served.wait(content, "the doctor is content", deadline_s=60)
    assert "FAILED" not in said, said
    for what in ("definition", "rights", "leader", "agents reached", "gateways reached", "certificates"):
        assert any(line.startswith("ok") and what in line for line in said.splitlines()), said


def test_helm_test_passes(served: Bed) -> None:
    served.helm("test", RELEASE, "--timeout", "90s")


def test_kubectl_scale_loses_nothing(served: Bed, right: Right, at: Callable[[int], Bed]) -> None:
    with served.traffic() as traffic:
        served.kubectl("scale", "modelservice", "smollm2", "--replicas=3")
        took_s = served.wait(lambda: served.serving() == 3, "three replicas serve")
        served.note("kubectl scale 1 to 3, under load", took_s)
        served.kubectl("scale", "modelservice", "smollm2", "--replicas=1")
        served.wait(lambda: len(served.status().get("replicas", ())) == 1, "one replica is left")
        served.wait(lambda: len(traffic.answers) >= 6, "requests go on")
    assert not traffic.wrong(right)


def test_a_new_revision_loses_nothing(served: Bed, right: Right, at: Callable[[int], Bed]) -> None:
    old = {replica["replicaId"] for replica in served.status()["replicas"]}
    with served.traffic() as traffic:
        served.patch({"model": {"revision": "second"}})
        took_s = served.wait(
            lambda: served.serving() == 1 and not old & served.replica_ids(), "the new one serves alone"
        )
        served.note("rollout of a revision, under load", took_s)
        served.wait(lambda: len(traffic.answers) >= 4, "requests go on")
    served.patch({"model": {"revision": None}})
    assert not traffic.wrong(right)
