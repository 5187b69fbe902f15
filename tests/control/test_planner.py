"""Plans taking effect in a world made of values: whole scale-ups and scale-downs, and a node dying at any step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from layercast_operator.actions import (
    DrainReplica,
    StartReplica,
    StartTransfer,
    StopReplica,
)
from layercast_operator.modelservice import ModelSource, ScalePolicy, ScalingMode
from layercast_operator.pending import PendingReplica, with_pending
from layercast_operator.planner import plan_orphans
from layercast_operator.policy import Rule
from layercast_operator.snapshot import NodeHealth, PeerRef, ReplicaState
from layercast_operator.turn import take_turn

SERVING = ReplicaState.SERVING


def ids(peers: Iterable[PeerRef | None]) -> list[str]:
    """Names of peers; the own disk is "-"."""
    return ["-" if peer is None else peer.peer_id for peer in peers]


def pilot(worlds: Any, *models: Any, **world: Any) -> Any:
    return worlds.Pilot(worlds.World(**world), *models)


def kinds(actions: list[Any]) -> list[str]:
    return [type(action).__name__ for action in actions]


def test_the_first_replica_is_prepared_started_and_fed_from_its_own_disk(worlds: Any) -> None:
    p = pilot(worlds, worlds.service(step_tokens=64))
    p.world.demand["m"] = worlds.demand()
    log = p.run(6)
    assert kinds(log) == ["PrepareCheckpoint", "StartReplica", "StartTransfer"]
    prepare, start, transfer = log
    assert prepare.node == start.node == transfer.node == "node-0"
    assert (start.manifest_peer, start.context_length_max, start.batch_size_max) == (None, 2048, 16)
    assert start.step_tokens_max == 64
    assert start.replica_id == "m-000000" and transfer.transfer_id == "m-000000-t"
    assert transfer.upstreams == (None,) and transfer.live_source is None
    assert transfer.segment_order == (0, 4, 1, 2, 3)
    assert transfer.lead == (), "it executes what it has while the rest arrives"
    assert all(action.why for action in log)
    assert [r.state for r in p.world.replicas()] == [SERVING]


def test_growing_live_makes_a_chain_behind_the_serving_replica(worlds: Any) -> None:
    p = pilot(worlds, worlds.service(scaling=worlds.scaling(1, 3)))
    p.world.demand["m"] = worlds.demand()
    p.run(6)
    p.world.demand["m"] = worlds.demand(1500, 6, 6)  # 3 of 1000 tokens/s each: ceil(2.14)..3
    p.world.replicas(SERVING)[0].waiting = 4
    began = p.world.now
    log = p.run(1)
    starts = [a for a in log if isinstance(a, StartReplica)]
    transfers = [a for a in log if isinstance(a, StartTransfer)]
    assert [a.node for a in starts] == ["node-1", "node-2"]
    assert ids(a.manifest_peer for a in starts) == ["m-000000", "m-000000"]
    first, second = transfers
    assert ids(first.upstreams) == ["m-000000", "node-0"]
    assert ids(second.upstreams) == ["m-000001", "m-000000", "node-0"]
    for transfer in transfers:
        assert ids([transfer.live_source]) == ["m-000000"]
        assert transfer.segment_order == (1, 2, 3, 0, 4)
        assert transfer.generation == int(1000 * (began + 0.2))
    record = p.memories["m"].scales[-1]
    assert (record.replicas_from, record.replicas_to, record.rule) == (1, 3, "queue")
    assert [(r.replica_id, r.source) for r in record.replicas] == [
        ("m-000001", "m-000000"),
        ("m-000002", "m-000001"),
    ]
    p.run(6)
    assert len(p.world.replicas(SERVING)) == 3


def test_stop_the_world_executes_nothing_before_all_is_there(worlds: Any) -> None:
    stop = worlds.scaling(1, 3, policy=ScalePolicy.STOP_THE_WORLD)
    p = pilot(worlds, worlds.service(scaling=stop))
    p.world.demand["m"] = worlds.demand()
    p.run(6)
    p.world.demand["m"] = worlds.demand(1500, 6, 6)
    transfers = [a for a in p.run(1) if isinstance(a, StartTransfer)]
    assert len(transfers) == 2
    for transfer in transfers:
        assert transfer.live_source is None and transfer.segment_order == (0, 1, 2, 3, 4)


def test_live_targets_are_spread_over_sources_with_the_most_waiting_first(worlds: Any) -> None:
    p = pilot(worlds, worlds.service(replicas=2), nodes=5)
    p.run(8)
    one, two = p.world.replicas(SERVING)
    one.waiting, two.waiting = 1, 9
    p.models["m"] = worlds.service(replicas=5, generation=2)
    transfers = [a for a in p.run(0.6) if isinstance(a, StartTransfer)]
    sources = ids(t.live_source for t in transfers)
    assert sources == [two.replica_id, one.replica_id, two.replica_id]


def test_shrinking_drains_then_stops_the_emptiest_and_newest(worlds: Any) -> None:
    p = pilot(worlds, worlds.service(replicas=3))
    p.run(10)
    a, b, c = p.world.replicas(SERVING)
    a.waiting, b.waiting, c.waiting = 0, 2, 0
    c.assigned_at += 1
    p.models["m"] = worlds.service(replicas=2, generation=2)
    log = p.run(2)
    assert [(type(x).__name__, x.replica_id) for x in log] == [
        ("DrainReplica", c.replica_id),
        ("StopReplica", c.replica_id),
    ]
    assert log[0].grace_s == 20.0 and "3 are there, 2 wanted" in log[0].why
    assert p.memories["m"].scales[-1].rule == "manual"


def test_replicas_that_only_load_go_first_and_the_source_stays(worlds: Any) -> None:
    p = pilot(worlds, worlds.service())
    p.run(6)
    p.models["m"] = worlds.service(replicas=3, generation=2)
    p.run(0.6)
    p.models["m"] = worlds.service(replicas=1, generation=3)
    gone = {a.replica_id for a in p.run(4) if isinstance(a, DrainReplica | StopReplica)}
    assert gone == {"m-000001", "m-000002"}
    assert [r.replica_id for r in p.world.replicas(SERVING)] == ["m-000000"]


def test_to_zero_and_back_on_a_request(worlds: Any) -> None:
    p = pilot(worlds, worlds.service(replicas=0, scaling=worlds.scaling(0, 2, scale_down_s=2.0)))
    p.world.demand["m"] = worlds.demand()
    p.run(3)
    assert p.world.replicas() == [] and kinds(p.world.log) == ["PrepareCheckpoint"] * 3
    assert len({action.node for action in p.world.log}) == 3, (
        "from k disks k replicas wake up k times as fast"
    )
    p.world.demand["m"] = worlds.demand(10, 1, 1)
    p.run(4)
    assert len(p.world.replicas(SERVING)) == 1
    assert p.memories["m"].scales[-1].rule == "from-zero"
    p.world.demand["m"] = worlds.demand()
    p.run(6)
    assert p.world.replicas() == []
    assert p.memories["m"].scales[-1].replicas_to == 0


def test_the_last_copy_anywhere_is_kept_until_there_is_another(worlds: Any) -> None:
    p = pilot(worlds, worlds.service(replicas=2))
    p.run(8)
    p.world.kill("node-0")  # its disk held the only packed copy
    p.models["m"] = worlds.service(replicas=0, generation=2)
    first = p.step()
    assert kinds(first) == ["PrepareCheckpoint"] and first[0].node == "node-2"
    assert "last complete copy" in p.turns["m"].plan.blocked
    assert len(p.world.replicas(SERVING)) == 1
    p.run(4)
    assert p.world.replicas() == []


def test_a_stalled_transfer_gets_new_upstreams_by_a_higher_generation(worlds: Any) -> None:
    p = pilot(worlds, worlds.service())
    p.run(6)
    p.models["m"] = worlds.service(replicas=2, generation=2)
    p.run(1)
    (target,) = p.world.replicas(ReplicaState.LIVE)
    before = target.generation
    p.world.kill("node-0")
    log = p.run(0.4)
    assert target.stalled
    log += p.run(8)
    assert "PrepareCheckpoint" in kinds(log)  # nobody is left who has it all
    replacements = [a for a in log if isinstance(a, StartTransfer) and a.replica_id == target.replica_id]
    assert replacements and replacements[0].generation > before
    assert replacements[0].live_source is None  # nobody serves
    assert "stalled" in replacements[0].why
    assert len(p.world.replicas(SERVING)) == 2


def test_an_upstream_that_is_gone_is_replaced_once(worlds: Any) -> None:
    p = pilot(worlds, worlds.service(replicas=1), nodes=4)
    p.run(6)
    p.models["m"] = worlds.service(replicas=3, generation=2)
    p.run(1.2)
    last = next(r for r in p.world.replicas() if r.replica_id == "m-000002")
    assert last.upstream == "m-000001"
    p.world.kill("node-1")
    p.world.pass_time(0)
    # The target has moved on by itself; a target that has not would still name the dead one.
    last.upstream = "m-000001"
    log = p.act()
    (transfer,) = [a for a in log if isinstance(a, StartTransfer)]
    assert transfer.replica_id == "m-000002" and "m-000001 is gone" in transfer.why
    assert ids(transfer.upstreams)[0] == "m-000000"
    assert not [a for a in p.act() if isinstance(a, StartTransfer) and a.replica_id == "m-000002"]


def test_failed_replicas_are_stopped_and_tried_again_after_a_rest(worlds: Any) -> None:
    p = pilot(worlds, worlds.service(), nodes=1)
    p.run(6)
    rests = []
    for _ in range(3):
        (replica,) = p.world.replicas()
        replica.state = ReplicaState.FAILED
        failed_at = p.world.now
        (stop,) = p.step()
        assert isinstance(stop, StopReplica) and stop.failed
        while not p.world.replicas():
            p.step()
        rests.append(round(p.world.now - failed_at))
    assert rests == [1, 2, 4]
    assert p.memories["m"].scales[-1].rule == "repair"


def test_a_new_checkpoint_replaces_the_old_without_a_gap(worlds: Any) -> None:
    p = pilot(worlds, worlds.service(replicas=3))
    p.run(10)
    new = ModelSource(source="file:///models/m2", revision="", dtype="float32")
    p.models["m"] = worlds.service(replicas=3, generation=2, model=new)
    fewest = 3
    for _ in range(150):
        p.step()
        fewest = min(fewest, len(p.world.replicas(SERVING)))
    assert fewest == 2  # no spare device: one at a time
    assert {r.digest for r in p.world.replicas()} == {f"digest-of-{new.key}"}
    assert len(p.world.replicas(SERVING)) == 3


def test_a_spare_device_makes_the_change_without_losing_one(worlds: Any) -> None:
    p = pilot(worlds, worlds.service(replicas=2))
    p.run(10)
    new = ModelSource(source="file:///models/m2", revision="", dtype="float32")
    p.models["m"] = worlds.service(replicas=2, generation=2, model=new)
    fewest = 2
    for _ in range(150):
        p.step()
        fewest = min(fewest, len(p.world.replicas(SERVING)))
    assert fewest == 2
    assert {r.digest for r in p.world.replicas()} == {f"digest-of-{new.key}"}


def test_two_models_never_get_one_device(worlds: Any) -> None:
    p = pilot(worlds, worlds.service("a", replicas=3), worlds.service("b", replicas=3), nodes=4)
    p.run(10)  # the world refuses two replicas on one device
    assert len(p.world.replicas(SERVING)) == 4
    assert p.turns["b"].decision.limited == "3 replicas are wanted, 1 device can hold one each"


def test_nothing_is_started_before_every_node_has_answered(worlds: Any) -> None:
    p = pilot(worlds, worlds.service())
    p.run(6)
    fresh = worlds.Pilot(p.world, worlds.service(replicas=1))
    snapshot = p.world.snapshot(unseen=("node-0",))
    turn = take_turn(
        model=fresh.models["m"],
        policy=None,
        snapshot=snapshot,
        memory=fresh.memories["m"],
        new_id=p.world.new_id,
    )
    assert turn.plan.actions == () and "node-0" in turn.plan.blocked
    assert turn.decision.rule is Rule.UNKNOWN and turn.memory.target is None
    assert fresh.act() == []  # and when it has, the replica that it holds is enough


def test_after_a_restart_what_runs_goes_on_and_nothing_shrinks_before_a_window(worlds: Any) -> None:
    scaling = worlds.scaling(1, 3, scale_down_s=3.0)
    p = pilot(worlds, worlds.service(scaling=scaling))
    p.world.demand["m"] = worlds.demand()
    p.run(6)
    p.world.demand["m"] = worlds.demand(1500, 6, 6)
    p.run(8)
    p.world.demand["m"] = worlds.demand()
    restarted = worlds.Pilot(p.world, worlds.service(scaling=scaling))
    assert restarted.run(2.8) == []
    assert restarted.memories["m"].target == 3
    assert restarted.memories["m"].scales == ()
    assert kinds(restarted.run(1.6)) == ["DrainReplica", "StopReplica"]


def test_recommending_decides_and_does_not_act(worlds: Any) -> None:
    advise = worlds.scaling(1, 3, mode=ScalingMode.RECOMMEND)
    p = pilot(worlds, worlds.service(scaling=advise))
    p.run(6)
    p.world.demand["m"] = worlds.demand(1500, 6, 6)
    assert p.run(2) == []
    assert p.turns["m"].recommendation.replicas == 3
    p.models["m"] = worlds.service(replicas=2, scaling=advise, generation=2)
    assert "StartReplica" in kinds(p.run(1))
    p.models["m"] = worlds.service(replicas=2, scaling=worlds.scaling(1, 3), generation=3)
    p.run(1)
    assert p.memories["m"].target == 3


def test_spec_replicas_moves_a_scaled_service_at_once_and_restarts_the_window(worlds: Any) -> None:
    scaling = worlds.scaling(1, 3, scale_down_s=4.0)
    p = pilot(worlds, worlds.service(scaling=scaling))
    p.world.demand["m"] = worlds.demand()
    p.run(6)
    p.models["m"] = worlds.service(replicas=9, scaling=scaling, generation=2)
    p.act()
    assert p.memories["m"].target == 3
    assert p.turns["m"].decision.rule is Rule.MANUAL
    assert "1 to 3" in p.turns["m"].decision.limited
    p.run(3.6)
    assert p.memories["m"].target == 3


def test_wants_that_devices_cannot_meet_are_met_when_they_come_back(worlds: Any) -> None:
    p = pilot(worlds, worlds.service(replicas=3), nodes=2)
    p.run(8)
    assert len(p.world.replicas(SERVING)) == 2
    assert p.turns["m"].decision.limited == "3 replicas are wanted, 2 devices can hold one each"
    p.world.kill("node-1")
    p.run(2)
    p.world.revive("node-1")
    p.run(5)
    assert len(p.world.replicas(SERVING)) == 2


def test_replicas_of_deleted_models_are_drained_and_stopped(worlds: Any) -> None:
    p = pilot(worlds, worlds.service("a"), worlds.service("b"), nodes=2)
    p.run(8)
    snapshot = p.world.snapshot()
    assert plan_orphans(snapshot, {"a", "b"}).actions == ()
    (drain,) = plan_orphans(snapshot, {"a"}).actions
    assert isinstance(drain, DrainReplica) and drain.model == "b"
    p.world.apply([drain])
    assert plan_orphans(p.world.snapshot(), {"a"}).actions == ()
    p.world.pass_time(1)
    (stop,) = plan_orphans(p.world.snapshot(), {"a"}).actions
    assert isinstance(stop, StopReplica)
    assert plan_orphans(p.world.snapshot(unseen=("node-9",)), {"a"}).actions == ()


def test_what_was_asked_for_and_is_not_seen_yet_is_not_asked_again(worlds: Any) -> None:
    p = pilot(worlds, worlds.service())
    p.run(1)
    world, node = p.world, p.world.nodes["node-0"]
    node.replicas.clear()
    pending = [
        PendingReplica(
            replica_id="m-zzzzzz",
            model="m",
            digest=world.digest(p.models["m"].model.key),
            node="node-0",
            device_id="cpu:0",
        )
    ]
    snapshot = with_pending(world.snapshot(), pending)
    (replica,) = snapshot.replicas("m")
    assert replica.pending and not snapshot.nodes[0].devices[0].idle
    turn = take_turn(
        model=p.models["m"],
        policy=None,
        snapshot=snapshot,
        memory=p.memories["m"],
        new_id=world.new_id,
    )
    assert turn.plan.actions == ()
    assert with_pending(p.world.snapshot(), []) == p.world.snapshot()


def test_a_silent_node_is_neither_commanded_nor_replaced(worlds: Any) -> None:
    p = pilot(worlds, worlds.service())
    p.run(6)
    p.world.nodes["node-0"].health = NodeHealth.SILENT
    assert p.run(2) == []
    p.models["m"] = worlds.service(replicas=2, generation=2)
    assert all(a.node != "node-0" for a in p.run(2))
