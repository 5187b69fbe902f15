"""Demand makes replicas: up live, down again, to zero, and from zero; with Prometheus, and when it dies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.cluster.bed import Bed

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
Right = dict[str, str]

SCALING = {
    "min": 1,
    "max": 3,
    "targets": {"queueSeconds": {"low": 0.1, "high": 0.3}},
    "windows": {"scaleDownSeconds": 5},
}
# Of 289 tokens: eight such prompts are seconds of work for one replica, and each is within its context of 512.
PREFACE = 100


def test_demand_moves_the_number_of_replicas(served: Bed, right: Right, at: Callable[[int], Bed]) -> None:
    with served.prometheus() as prometheus:
        served.patch({"scaling": SCALING})
        with served.traffic(clients=8, max_tokens=4, preface=PREFACE) as traffic:
            took_s = served.wait(lambda: served.serving() == 3, "load brought three replicas", deadline_s=180)
            served.note("1 to 3 replicas by demand from Prometheus, under load", took_s)
            prometheus.kill()
            count = len(traffic.answers)
            took_s = served.wait(
                lambda: served.condition("MetricsAvailable") == ("False", "PrometheusSilent"),
                "the status says that Prometheus is silent",
            )
            served.note("the death of Prometheus is in the status", took_s)
            served.wait(lambda: len(traffic.answers) >= count + 8, "requests go on without Prometheus")
        code, said = served.doctor()
        assert code == 1 and "FAILED  Prometheus" in said, said
        assert not traffic.failures() and not traffic.disagreeing()
        assert served.serving() == 3, "what is unknown shrinks nothing"
        prometheus.start()
        served.patch({"scaling": {**SCALING, "min": 0}})
        took_s = served.wait(
            lambda: not served.replica_ids(), "nothing is left without demand", deadline_s=240
        )
        served.note("3 to 0 replicas without demand, from the start of Prometheus on", took_s)
        prometheus.kill()
        # Prometheus is configured and dead: the gateways alone tell of the request that waits.
        took_s = served.timed(
            lambda: served.ask("The capital of France is") == right["The capital of France is"]
        )
        served.note("an answer from zero replicas, without Prometheus", took_s)
