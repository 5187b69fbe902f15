"""Where replicas go and who prepares: tables, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercast_operator.estimators import Correction, What
from layercast_operator.feeding import holders_of
from layercast_operator.placement import capacity, choose_preparer, estimate, place_replicas
from layercast_operator.snapshot import Device, Node, NodeHealth, Snapshot, WorkerState
from layercast_operator.topology import Holder, HolderKind

NBYTES = 800


@pytest.fixture
def seen(worlds: Any) -> Snapshot:
    """Three idle nodes; the first has the checkpoint on disk."""
    world = worlds.World(nodes=3)
    world.nodes["node-0"].ready_at["d"] = 0.0
    snapshot: Snapshot = world.snapshot()
    return snapshot


def change(snapshot: Snapshot, index: int, **changes: Any) -> Snapshot:
    nodes = list(snapshot.nodes)
    nodes[index] = replace(nodes[index], **changes)
    return replace(snapshot, nodes=tuple(nodes))


def device(**changes: Any) -> tuple[Device, ...]:
    values: dict[str, Any] = {
        "device_id": "cpu:0",
        "memory_bytes": 1600,
        "worker_state": WorkerState.IDLE,
        **changes,
    }
    return (Device(**values),)


def place(snapshot: Snapshot, count: int = 3, **changes: Any) -> Any:
    values: dict[str, Any] = {"avoid": (), "checkpoint_bytes": NBYTES, **changes}
    return place_replicas(snapshot, count=count, holders=holders_of(snapshot, "d"), **values)


def test_the_soonest_parameters_come_first(seen: Snapshot) -> None:
    faster = change(seen, 0, disk_bytes_per_s=4000)
    got = place(faster, 1).places[0]
    assert (got.node, got.device_id) == ("node-0", "cpu:0")
    assert got.predicted_s == pytest.approx(0.2)
    assert "from its own disk" in got.why


def test_all_places_are_different_and_the_lack_is_explained(seen: Snapshot) -> None:
    got = place(seen, 5)
    assert [p.node for p in got.places] == ["node-0", "node-1", "node-2"]
    assert got.missing == "no idle device: 3 occupied"
    assert place(seen, 3).missing == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"devices": device(worker_state=WorkerState.WARMING)},
            "waits for cpu:0 of node-1, which is warming",
        ),
        ({"devices": device(worker_state=WorkerState.DEAD)}, "1 dead"),
        ({"devices": device(error="no driver")}, "1 broken (no driver)"),
        ({"devices": device(memory_bytes=799)}, "1 too small (the parameters take 0 MB)"),
        ({"devices": device(replica_id="x", worker_state=WorkerState.ASSIGNED)}, "occupied"),
        ({"health": NodeHealth.SILENT}, "1 on a node that is silent"),
        ({"health": NodeHealth.LOST}, "1 on a node that is lost"),
    ],
)
def test_what_makes_a_device_unfit(seen: Snapshot, changes: dict[str, Any], words: str) -> None:
    got = place(change(seen, 1, **changes), 3)
    assert sorted(p.node for p in got.places) == ["node-0", "node-2"]
    assert words in got.missing


def test_nodes_in_back_off_and_promised_devices_are_left_alone(seen: Snapshot) -> None:
    got = place(seen, 3, avoid={"node-1"}, taken={("node-2", "cpu:0")})
    assert [p.node for p in got.places] == ["node-0"]
    assert "1 waiting after a failure" in got.missing


def test_equal_nodes_are_filled_evenly(worlds: Any) -> None:
    world = worlds.World(nodes=2, devices=2)
    got = place(world.snapshot(), 4)
    assert [(p.node, p.device_id) for p in got.places] == [
        ("node-0", "cpu:0"),
        ("node-1", "cpu:0"),
        ("node-0", "cpu:1"),
        ("node-1", "cpu:1"),
    ]


def test_the_three_ways_of_parameters(seen: Snapshot) -> None:
    holders = holders_of(seen, "d")
    node: Node = seen.nodes[1]

    def best(node: Node, nbytes: int, holders: Sequence[Holder]) -> tuple[float, str]:
        arrival = estimate(node, checkpoint_bytes=nbytes, holders=holders)
        return arrival.seconds, arrival.words

    assert best(node, 800, ()) == (800 / 50e6, "from the origin")
    assert best(node, 800, holders) == (2.0, "from node-0")
    fast = [replace(holders[0], nic_bytes_per_s=1e9, read_bytes_per_s=2e9)]
    wide = replace(node, egress_bytes_per_s=10**9)
    assert best(wide, 10**9, fast) == (1.0, "from node-0")


def test_what_transfers_took_decides_among_ways_of_one_rate(seen: Snapshot) -> None:
    (disk,) = holders_of(seen, "d")
    device = replace(disk, kind=HolderKind.DEVICE, node="node-2", peer=seen.nodes[2].peer)
    slow = {(What.TRANSFER, "disk"): Correction(log_factor=math.log(4.0), samples=9)}
    alone = estimate(seen.nodes[0], checkpoint_bytes=800, holders=[disk], estimates=slow)
    assert alone.prior_s == 2.0 and alone.seconds == pytest.approx(8.0)
    both = estimate(seen.nodes[0], checkpoint_bytes=800, holders=[disk, device], estimates=slow)
    assert (both.way, both.seconds) == ("device", 2.0)
    (place,) = place_replicas(
        seen, count=1, checkpoint_bytes=800, holders=[disk], avoid=(), estimates=slow
    ).places
    assert (place.way, place.parameters_s) == ("disk", 2.0) and place.predicted_s == pytest.approx(8.0)


def test_capacity_counts_what_could_hold_a_replica(seen: Snapshot) -> None:
    assert capacity(seen, model="m", checkpoint_bytes=NBYTES) == 3
    assert capacity(seen, model="m", checkpoint_bytes=1601) == 0
    assert capacity(change(seen, 0, health=NodeHealth.LOST), model="m", checkpoint_bytes=NBYTES) == 2
    assert capacity(change(seen, 0, health=NodeHealth.SILENT), model="m", checkpoint_bytes=NBYTES) == 3
    assert capacity(replace(seen, unseen=("node-9",)), model="m", checkpoint_bytes=NBYTES) is None


def test_the_preparer_has_room_and_has_not_failed(seen: Snapshot) -> None:
    roomy = change(seen, 2, devices=device(memory_bytes=9999))
    assert choose_preparer(roomy, failures={}, avoid=())[0] == "node-2"  # type: ignore[index]
    assert choose_preparer(roomy, failures={"node-2": 1}, avoid=())[0] == "node-0"  # type: ignore[index]
    assert choose_preparer(roomy, failures={}, avoid={"node-0", "node-1", "node-2"}) is None


@given(count=st.integers(0, 8), silent=st.sets(st.integers(0, 3)), nodes=st.integers(0, 4))
def test_no_device_is_promised_twice(worlds: Any, count: int, silent: set[int], nodes: int) -> None:
    world = worlds.World(nodes=nodes, devices=2)
    for index in silent & set(range(nodes)):
        world.nodes[f"node-{index}"].health = NodeHealth.SILENT
    got = place(world.snapshot(), count)
    chosen = [(p.node, p.device_id) for p in got.places]
    assert len(chosen) == len(set(chosen)) <= count
    assert len(chosen) == min(count, 2 * (nodes - len(silent & set(range(nodes)))))
    assert bool(got.missing) == (len(chosen) < count)


def test_a_warming_device_beside_the_copy_is_worth_waiting_for(seen: Snapshot) -> None:
    slow = change(seen, 0, devices=device(worker_state=WorkerState.WARMING), egress_bytes_per_s=80)
    got = place(slow, 1)
    assert (got.places, got.warming) == ((), 1)
    assert got.missing == "waits for cpu:0 of node-0, which is warming"


def test_a_warming_device_is_not_waited_for_where_the_network_is_faster(seen: Snapshot) -> None:
    fast = change(seen, 0, devices=device(worker_state=WorkerState.WARMING), egress_bytes_per_s=8000)
    got = place(fast, 1)
    assert [p.node for p in got.places] == ["node-1"]
    assert (got.warming, got.missing) == (0, "")
