"""Nodes that are to be left: replicas move first, serving all the while, and go only when others serve."""

from __future__ import annotations

from typing import Any

from layercast_operator.actions import DrainReplica, StartReplica, StopReplica
from layercast_operator.snapshot import NodeFacts, ReplicaState

SERVING = ReplicaState.SERVING


def settled(worlds: Any, *, nodes: int, replicas: int, **changes: Any) -> Any:
    """Replicas that serve, one a node."""
    pilot = worlds.Pilot(worlds.World(nodes), worlds.service(replicas=replicas, **changes))
    pilot.run(12)
    assert len(pilot.world.replicas(SERVING)) == replicas
    return pilot


def home(pilot: Any) -> str:
    return str(next(name for name, node in pilot.world.nodes.items() if node.replicas))


def leave(pilot: Any, name: str, why: str = "cordoned") -> None:
    pilot.world.nodes[name].facts = NodeFacts(leaving=why)


def test_a_cordoned_node_is_left_after_another_replica_serves(worlds: Any) -> None:
    pilot = settled(worlds, nodes=3, replicas=1)
    left = home(pilot)
    leave(pilot, left)
    for _ in range(60):
        pilot.step()
        assert pilot.world.replicas(SERVING), "a moment without a replica that serves"
    assert not pilot.world.nodes[left].replicas
    drains = [a for a in pilot.world.log if isinstance(a, DrainReplica)]
    assert len(drains) == 1 and drains[0].node == left and "cordoned" in drains[0].why


def test_all_replicas_of_a_node_move_and_the_number_stays(worlds: Any) -> None:
    pilot = worlds.Pilot(worlds.World(3, devices=2), worlds.service(replicas=3))
    pilot.run(12)
    leave(pilot, home(pilot))
    left = home(pilot)
    for _ in range(80):
        pilot.step()
        assert len(pilot.world.replicas(SERVING)) >= 3 - len(pilot.world.replicas(ReplicaState.DRAINING))
    assert not pilot.world.nodes[left].replicas
    assert len(pilot.world.replicas(SERVING)) == 3
    assert pilot.act() == []


def test_without_another_place_a_replica_stays_and_serves(worlds: Any) -> None:
    pilot = settled(worlds, nodes=2, replicas=2)
    leave(pilot, home(pilot))
    before = len(pilot.world.log)
    pilot.run(10)
    assert len(pilot.world.replicas(SERVING)) == 2
    assert not any(isinstance(a, DrainReplica | StopReplica) for a in pilot.world.log[before:])
    assert "cordoned" in pilot.turns["m"].plan.blocked


def test_a_node_that_is_uncordoned_in_time_keeps_its_replica(worlds: Any) -> None:
    pilot = settled(worlds, nodes=2, replicas=1)
    node = home(pilot)
    kept = next(iter(pilot.world.nodes[node].replicas))
    leave(pilot, node)
    pilot.step()
    pilot.world.nodes[node].facts = NodeFacts()
    pilot.run(10)
    assert [r.replica_id for r in pilot.world.replicas(SERVING)] == [kept]


def test_a_cordoned_node_takes_no_new_replica(worlds: Any) -> None:
    pilot = worlds.Pilot(worlds.World(3), worlds.service(replicas=3))
    leave(pilot, "node-1")
    pilot.run(12)
    starts = {a.node for a in pilot.world.log if isinstance(a, StartReplica)}
    assert starts == {"node-0", "node-2"}
    assert len(pilot.world.replicas(SERVING)) == 2


def test_replicas_are_only_where_the_labels_are_and_follow_them(worlds: Any) -> None:
    world = worlds.World(3)
    for name, zone in (("node-0", "a"), ("node-1", "b"), ("node-2", "b")):
        world.nodes[name].facts = NodeFacts(labels={"zone": zone})
    pilot = worlds.Pilot(world, worlds.service(replicas=2, node_selector={"zone": "b"}))
    pilot.run(12)
    assert {name for name, node in world.nodes.items() if node.replicas} == {"node-1", "node-2"}
    pilot.models["m"] = worlds.service(replicas=1, node_selector={"zone": "a"}, generation=2)
    for _ in range(80):
        pilot.step()
        assert pilot.world.replicas(SERVING)
    assert {name for name, node in world.nodes.items() if node.replicas} == {"node-0"}
