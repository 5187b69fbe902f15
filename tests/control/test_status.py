"""Status: one golden document of a scale-up under way, and each condition's ways of being so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layercast_operator.history import memory_of, rfc3339
from layercast_operator.modelservice import ScalingMode
from layercast_operator.snapshot import CheckpointState, NodeHealth, Rdma, ReplicaState
from layercast_operator.state import after_error
from layercast_operator.status import Report, report, report_invalid

GOLDEN = Path(__file__).with_name("golden")
TYPES = [
    "Ready",
    "Available",
    "Progressing",
    "WeightsLoaded",
    "ModelResolved",
    "MetricsAvailable",
    "GPUAvailable",
    "HostCopyAvailable",
    "RDMAReady",
    "ScalingLimited",
]


def told(p: Any, name: str = "m") -> Report:
    """The report after one more pass."""
    p.act()
    turn = replace(p.turns[name], memory=p.memories[name])
    got = report(p.models[name], p.world.snapshot(), turn, endpoint="http://127.0.0.1:8080/v1")
    p.memories[name] = got.memory
    return got


def conditions(got: Report) -> dict[str, tuple[str, str]]:
    return {c["type"]: (c["status"], c["reason"]) for c in got.status["conditions"]}


def message(got: Report, kind: str) -> str:
    return next(str(c["message"]) for c in got.status["conditions"] if c["type"] == kind)


def pilot(worlds: Any, *models: Any, **world: Any) -> Any:
    return worlds.Pilot(worlds.World(**world), *models)


def growing(worlds: Any) -> Report:
    """A live scale-up from one to three, a second after the decision."""
    p = pilot(worlds, worlds.service(scaling=worlds.scaling(1, 3)))
    p.world.demand["m"] = worlds.demand()
    p.run(6)
    told(p)
    p.world.demand["m"] = worlds.demand(1500, 6, 6)
    p.world.replicas()[0].waiting = 4
    p.run(1)
    return told(p)


def test_a_scale_up_under_way(worlds: Any) -> None:
    got = growing(worlds).status
    want = json.loads((GOLDEN / "status_growing.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(got)) == want


def test_every_condition_is_there_from_the_first_pass(worlds: Any) -> None:
    got = told(pilot(worlds, worlds.service()))
    assert [c["type"] for c in got.status["conditions"]] == TYPES
    for condition in got.status["conditions"]:
        assert condition["status"] in {"True", "False", "Unknown"}
        assert condition["reason"].isalnum() and condition["reason"][0].isupper()
        assert condition["message"]
        assert condition["observedGeneration"] == 1
        assert condition["lastTransitionTime"] == "1970-01-01T00:16:40.000Z"


def test_from_nothing_to_serving(worlds: Any) -> None:
    p = pilot(worlds, worlds.service())
    p.world.demand["m"] = worlds.demand()
    first = told(p)
    assert conditions(first)["Ready"][0] == conditions(first)["ModelResolved"][0] == "Unknown"
    assert first.message == "node-0: packing"
    p.run(1)
    loading = told(p)
    assert conditions(loading)["WeightsLoaded"] == ("False", "Loading")
    assert conditions(loading)["Ready"] == ("False", "NoReplicaServes")
    assert "m-000000" in loading.message and "%" in loading.message
    p.run(4)
    done = told(p)
    assert conditions(done) == {
        "Ready": ("True", "Serving"),
        "Available": ("True", "MinimumServing"),
        "Progressing": ("False", "Settled"),
        "WeightsLoaded": ("True", "Loaded"),
        "ModelResolved": ("True", "Resolved"),
        "MetricsAvailable": ("True", "Fresh"),
        "GPUAvailable": ("True", "EnoughDevices"),
        "HostCopyAvailable": ("False", "ElsewhereOnly"),
        "RDMAReady": ("Unknown", "NoReplica"),
        "ScalingLimited": ("False", "WithinLimits"),
    }
    assert done.message == ""


def test_times_change_with_the_status_only(worlds: Any) -> None:
    p = pilot(worlds, worlds.service())
    p.run(6)
    before = told(p)
    p.run(1)
    after = told(p)
    assert [c["lastTransitionTime"] for c in before.status["conditions"]] == [
        c["lastTransitionTime"] for c in after.status["conditions"]
    ]
    for replica in p.world.replicas():
        replica.state = ReplicaState.FAILED
    lost = told(p)
    changed = {
        c["type"] for c in lost.status["conditions"] if c["lastTransitionTime"] == rfc3339(p.world.now)
    }
    assert changed >= {"Ready", "Available", "WeightsLoaded"}
    assert "ModelResolved" not in changed


def test_a_broken_specification_is_said_while_the_old_one_serves(worlds: Any) -> None:
    p = pilot(worlds, worlds.service(problem="a.yaml: spec.replicas: must be a whole number, not text"))
    p.run(6)
    got = told(p)
    assert conditions(got)["Ready"] == ("False", "InvalidSpec")
    assert conditions(got)["Available"] == ("True", "MinimumServing")
    assert "spec.replicas" in message(got, "Ready") and got.message == ""


def test_a_file_that_never_was_one(worlds: Any) -> None:
    status, since = report_invalid("b", "b.yaml: is not YAML", before={}, now=1000.0)
    assert status["conditions"][0]["reason"] == "InvalidSpec" and status["name"] == "b"
    again, _ = report_invalid("b", "b.yaml: other", before=since, now=2000.0)
    assert again["conditions"][0]["lastTransitionTime"] == "1970-01-01T00:16:40.000Z"


def test_what_a_checkpoint_failed_at_is_told(worlds: Any) -> None:
    p = pilot(worlds, worlds.service(), nodes=1)
    p.act()
    snapshot = p.world.snapshot()
    checkpoint = replace(
        snapshot.nodes[0].checkpoints[0],
        state=CheckpointState.FAILED,
        error="file model.safetensors, tensor x",
    )
    broken = replace(snapshot, nodes=(replace(snapshot.nodes[0], checkpoints=(checkpoint,)),))
    turn = replace(p.turns["m"], memory=p.memories["m"])
    got = report(p.models["m"], broken, turn, endpoint="")
    assert conditions(got)["ModelResolved"] == ("False", "PrepareFailed")
    assert got.message == "node-0: file model.safetensors, tensor x"


def test_a_refusal_is_told_and_ends_with_an_edit(worlds: Any) -> None:
    p = pilot(worlds, worlds.service())
    (prepare,) = p.act()
    p.memories["m"] = after_error(
        p.memories["m"], prepare, code="INVALID_ARGUMENT", text="node-0: unknown scheme", now=p.world.now
    )
    for node in p.world.nodes.values():
        node.ready_at.clear()
    p.world.pass_time(5)
    got = told(p)
    assert conditions(got)["ModelResolved"] == ("False", "Refused")
    assert got.message == "node-0: unknown scheme"
    assert p.act() == []
    p.models["m"] = worlds.service(generation=2)
    assert len(p.act()) == 1


@pytest.mark.parametrize(
    ("demand", "status", "reason"),
    [(None, "Unknown", "NoMetrics"), (False, "False", "Partial"), (True, "True", "Fresh")],
)
def test_metrics(worlds: Any, demand: bool | None, status: str, reason: str) -> None:
    p = pilot(worlds, worlds.service(scaling=worlds.scaling(1, 3)))
    p.run(6)
    if demand is not None:
        p.world.demand["m"] = worlds.demand(complete=demand)
    assert conditions(told(p))["MetricsAvailable"] == (status, reason)


def test_limits_are_told(worlds: Any) -> None:
    p = pilot(worlds, worlds.service(replicas=5), nodes=2)
    p.run(6)
    got = told(p)
    assert conditions(got)["ScalingLimited"] == ("True", "TooFewDevices")
    assert message(got, "ScalingLimited") == "5 replicas are wanted, 2 devices can hold one each"
    assert conditions(got)["GPUAvailable"] == ("False", "TooFewDevices")
    assert message(got, "GPUAvailable") == "5 replicas wanted, 2 devices can hold one each"
    assert got.status["counts"] == {"desired": 5, "serving": 2, "loading": 0, "draining": 0, "active": 2}
    bounded = pilot(worlds, worlds.service(replicas=5, scaling=worlds.scaling(1, 3)))
    assert conditions(told(bounded))["ScalingLimited"] == ("True", "OutOfBounds")


def test_a_recommendation_is_a_decision_not_taken(worlds: Any) -> None:
    p = pilot(worlds, worlds.service(scaling=worlds.scaling(1, 3, mode=ScalingMode.RECOMMEND)))
    p.run(6)
    p.world.demand["m"] = worlds.demand(1500, 6, 6)
    got = told(p).status
    assert got["recommendation"]["replicas"] == 3 and got["recommendation"]["rule"] == "queue"
    assert "1500 prompt tokens wait" in got["recommendation"]["reason"]
    assert got["counts"]["desired"] == 1


def test_scaled_to_zero_is_ready(worlds: Any) -> None:
    p = pilot(worlds, worlds.service(replicas=0))
    p.run(3)
    assert conditions(told(p))["Ready"] == ("True", "ScaledToZero")


def test_a_silent_holder_is_waited_for(worlds: Any) -> None:
    p = pilot(worlds, worlds.service(replicas=2))
    p.run(8)
    for node in p.world.nodes.values():
        node.health = NodeHealth.SILENT
    assert p.run(1) == []
    assert "waits for" in p.turns["m"].plan.blocked


def test_history_survives_a_restart_and_damage(worlds: Any) -> None:
    got = growing(worlds)
    back = memory_of(json.loads(json.dumps(got.status)))
    assert back.scales == got.memory.scales
    assert {k: v.status for k, v in back.conditions.items()} == {
        k: v.status for k, v in got.memory.conditions.items()
    }
    assert back.target is None and back.resolved is None  # nothing is decided from it
    damaged = {"scales": [{"from": 1}, 3, None], "conditions": [{"type": "Ready"}, "x"]}
    empty = memory_of(damaged)
    assert empty.scales == () and empty.conditions == {}
    assert memory_of({}) == memory_of({"scales": None, "conditions": None})


IN_USE = Rdma(used=True, reason="RDMA by mlx5_0:1")
WITHOUT = Rdma(used=False, reason="this node has no RDMA device")


@pytest.mark.parametrize(
    ("rdma", "expected", "words"),
    [
        (IN_USE, ("True", "InUse"), "RDMA by mlx5_0:1; 1 device in all"),
        (WITHOUT, ("False", "NotUsed"), "1 of 1 device without; node-0 cpu:0: this node has no RDMA device"),
        (replace(WITHOUT, missed=True), ("False", "Missed"), "no RDMA device"),
    ],
)
def test_whether_rdma_is_used_and_why_not(
    worlds: Any, rdma: Rdma, expected: tuple[str, str], words: str
) -> None:
    p = pilot(worlds, worlds.service())
    p.run(6)
    p.act()
    seen = p.world.snapshot()
    nodes = tuple(
        replace(node, devices=tuple(replace(device, rdma=rdma) for device in node.devices))
        for node in seen.nodes
    )
    turn = replace(p.turns["m"], memory=p.memories["m"])
    got = report(p.models["m"], replace(seen, nodes=nodes), turn, endpoint="")
    assert conditions(got)["RDMAReady"] == expected
    assert words in message(got, "RDMAReady")
