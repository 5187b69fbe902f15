"""Where host copies live: placed apart, waited for, re-placed after a loss, and never the last one dropped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.control.hostworld import HostPilot, HostWorld, SimCopy
from tests.control.world import NBYTES, demand, scaling, service

from layercast_operator.actions import (
    DrainReplica,
    DropHostCopy,
    PrepareCheckpoint,
    StartHostCopy,
    StartReplica,
    StartTransfer,
)
from layercast_operator.hostcopies import plan_host_copies
from layercast_operator.lastcopies import COPY_WAIT_S
from layercast_operator.modelservice import ModelSource, ScalePolicy
from layercast_operator.snapshot import NodeHealth, ReplicaState


def pilot(*models: Any, **world: Any) -> HostPilot:
    return HostPilot(HostWorld(**world), *models)


def digest(p: HostPilot, name: str = "m") -> str:
    return p.world.digest(p.models[name].model.key)


def scale(p: HostPilot, replicas: int, name: str = "m", **changes: Any) -> None:
    model = p.models[name]
    p.models[name] = replace(model, replicas=replicas, generation=model.generation + 1, **changes)


def test_one_copy_is_kept_away_from_the_device_that_holds_it() -> None:
    p = pilot(service())
    log = p.run(10)
    starts = [a for a in log if isinstance(a, StartHostCopy)]
    assert [(a.node, a.digest, a.nbytes) for a in starts] == [("node-1", digest(p), NBYTES)]
    assert starts[0].manifest_peer is not None and starts[0].why
    assert p.world.host_copies(digest(p)) == ["node-1"]
    assert [r.replica_id for r in p.world.replicas()] == ["m-000000"]
    assert p.run(5) == [], "what is settled stays so"


def test_a_copy_beside_the_only_replica_moves_away_once_that_serves() -> None:
    p = pilot(service(replicas=0))
    p.run(6)
    (first,) = p.world.host_copies(digest(p))
    scale(p, 1)
    p.run(2)
    assert next(n.name for n in p.world.nodes.values() if n.replicas) == first, "it loads where the copy is"
    for _ in range(60):
        step_and_check(p, "m")
        assert p.world.host_copies(digest(p)), "never without one on the way"
    (moved,) = p.world.host_copies(digest(p))
    assert moved != first
    assert p.run(3) == []


def test_models_are_spread_over_nodes() -> None:
    models = [service(name, replicas=0) for name in ("a", "b", "c")]
    p = pilot(*models)
    p.run(8)
    assert sorted(p.world.host_copies(digest(p, name))[0] for name in "abc") == ["node-0", "node-1", "node-2"]


def test_the_last_device_copy_waits_for_the_host_copy() -> None:
    p = pilot(service())
    p.run(3)
    p.world.copies = {name: {} for name in p.world.nodes}
    scale(p, 0)
    log: list[Any] = []
    while not any(isinstance(a, DrainReplica) for a in log):
        assert p.world.now < 1030
        assert len(p.world.in_memory(digest(p))) >= 1
        log += p.step()
    assert p.world.host_copies(digest(p)), "complete before the drain"
    p.run(3)
    assert p.world.replicas() == [] and len(p.world.host_copies(digest(p))) == 1
    scale(p, 1)
    log = p.run(5)
    assert p.serving() == 1
    (transfer,) = [a for a in log if isinstance(a, StartTransfer)]
    assert transfer.upstreams[0] is not None, "fed from host memory, not from disk"


def test_without_host_memory_a_disk_is_the_last_resort_and_nobody_waits() -> None:
    p = pilot(service(), pool=0)
    p.run(4)
    scale(p, 0)
    p.run(2)
    assert p.world.replicas() == []
    assert p.plan.hopeless == {digest(p): "no node has so much host memory"}


def test_the_wait_has_an_end() -> None:
    p = pilot(service())
    p.run(4)
    frozen = SimCopy((), 1, followers=1)  # a copy that never fills
    p.world.copies = {"node-0": {}, "node-1": {digest(p): frozen}, "node-2": {}}
    scale(p, 0)
    began = p.world.now
    while p.world.replicas():
        p.step()
        frozen.upstreams, frozen.done = (), 0.0
        assert p.world.now - began < 2 * COPY_WAIT_S
    assert p.world.now - began > COPY_WAIT_S


@pytest.mark.parametrize("replicas", [0, 1])
def test_a_lost_copy_is_placed_again_on_another_node(replicas: int) -> None:
    p = pilot(service(replicas=replicas))
    p.run(8)
    (lost,) = p.world.host_copies(digest(p))
    p.world.kill(lost)
    p.run(6)
    (found,) = p.world.host_copies(digest(p))
    assert found != lost
    p.world.revive(lost)
    assert [a for a in p.run(3) if not isinstance(a, PrepareCheckpoint)] == []


def test_a_node_that_has_just_come_back_is_not_the_first_choice() -> None:
    p = pilot(service(replicas=0))
    p.run(8)
    (lost,) = p.world.host_copies(digest(p))
    p.world.kill(lost)
    p.world.revive(lost)
    p.run(6)
    assert p.world.host_copies(digest(p)) not in ([lost], [])


def test_a_silent_node_is_waited_for() -> None:
    p = pilot(service())
    p.run(8)
    (silent,) = p.world.host_copies(digest(p))
    p.world.nodes[silent].health = NodeHealth.SILENT
    assert p.run(3) == []


def test_a_copy_that_nobody_waits_for_rests_while_replicas_load() -> None:
    p = pilot(service())
    p.run(2.4)
    (copy,) = [c for held in p.world.copies.values() for c in held.values()]
    assert 0 < copy.done < NBYTES or p.serving()
    p.world.copies["node-1"] = {digest(p): SimCopy((), 1, done=10.0)}
    p.run(0.2)
    scale(p, 3)
    log = p.run(1.2)
    rests = [a for a in log if isinstance(a, StartHostCopy) and not a.upstreams]
    assert [a for a in log if isinstance(a, StartReplica)] and (
        rests or p.world.copies["node-1"][digest(p)].upstreams
    )
    p.run(12)
    assert p.serving() == 3 and p.world.host_copies(digest(p)) == ["node-1"]


def test_pressure_takes_from_those_that_devices_hold_and_never_the_last() -> None:
    p = pilot(service("a"), service("b"), nodes_count=2, pool=NBYTES, devices_each=2)
    p.run(12)
    assert p.world.host_copies(digest(p, "a")) and p.world.host_copies(digest(p, "b"))
    p.models["c"], p.memories["c"] = service("c", replicas=0), type(p.memories["a"])()
    log = p.run(8)
    drops = [a for a in log if isinstance(a, DropHostCopy)]
    assert len(drops) == 1 and "devices hold this one" in drops[0].why
    assert p.world.host_copies(digest(p, "c"))
    # Nothing is left to take: two pools, and each of the two others needs its copy on the way to zero.
    for name in ("a", "b"):
        scale(p, 0, name)
    for _ in range(100):
        p.step()
        assert all(p.world.in_memory(digest(p, name)) or name != "c" for name in "abc")
    told = set(p.plan.hopeless.values())
    assert told == {"host memory is full of last copies"}
    assert sum(bool(p.world.host_copies(digest(p, name))) for name in "abc") == 2


def test_surplus_copies_go_and_so_do_those_of_nobody() -> None:
    p = pilot(service())
    p.run(8)
    p.world.copies["node-0"][digest(p)] = SimCopy((), 1, done=NBYTES)
    p.world.copies["node-2"]["digest-of-nobody"] = SimCopy((), 1, done=NBYTES)
    log = p.run(2)
    assert {(a.node, a.digest) for a in log if isinstance(a, DropHostCopy)} == {
        ("node-0", digest(p)),
        ("node-2", "digest-of-nobody"),
    }


def test_nothing_is_thrown_away_before_everybody_is_known() -> None:
    p = pilot(service())
    p.world.copies["node-2"]["digest-of-nobody"] = SimCopy((), 1, done=NBYTES)
    snapshot = p.world.snapshot()
    assert plan_host_copies(snapshot, [], all_known=False).actions == ()
    assert plan_host_copies(replace(snapshot, unseen=("node-9",)), [], all_known=True).actions == ()
    assert len(plan_host_copies(snapshot, [], all_known=True).actions) == 1


def test_a_rollout_keeps_the_new_checkpoint_in_memory_before_an_old_replica_makes_way() -> None:
    p = pilot(service(), nodes_count=1)
    p.run(8)
    old = digest(p)
    source = ModelSource(source="file:///models/m2", revision="", dtype="float32")
    scale(p, 1, model=source)
    log = p.run(10)
    assert digest(p) != old
    drained = next(i for i, a in enumerate(log) if isinstance(a, DrainReplica))
    assert any(isinstance(a, StartHostCopy) and a.digest == digest(p) for a in log[:drained])
    assert [r.digest for r in p.world.replicas(ReplicaState.SERVING)] == [digest(p)]
    p.run(4)
    assert p.world.host_copies(old, complete=False) == [], "nobody wants the old one any more"


def cached(policy: ScalePolicy, least: int = 0, **changes: Any) -> Any:
    return service(replicas=1, scaling=scaling(least, 3, policy=policy, **changes))


def test_host_cache_keeps_a_copy_on_every_node_and_loads_from_the_own_one() -> None:
    p = pilot(cached(ScalePolicy.HOST_CACHE, 1))
    p.world.demand["m"] = demand()
    p.run(10)
    assert sorted(p.world.host_copies(digest(p))) == ["node-0", "node-1", "node-2"]
    p.world.demand["m"] = demand(1500, 6, 6)
    transfers = [a for a in p.run(3) if isinstance(a, StartTransfer)]
    assert len(transfers) == 2
    for transfer in transfers:
        assert transfer.upstreams[0] is not None and transfer.upstreams[0].peer_id == transfer.node
        assert transfer.live_source is None
    p.run(5)
    assert p.serving() == 3


def test_ttl_cache_loads_a_miss_from_disk_and_forgets_after_a_while() -> None:
    p = pilot(cached(ScalePolicy.TTL_CACHE, scale_down_s=1.0, host_cache_s=5.0))
    p.world.demand["m"] = demand()
    p.run(3)
    prepared = {a.node for a in p.world.log if isinstance(a, PrepareCheckpoint)}
    assert prepared == {"node-0", "node-1", "node-2"}, "every disk has it"
    p.world.demand["m"] = demand(100, 1, 1)
    p.run(4)
    (first,) = p.world.replicas()
    node = next(n.name for n in p.world.nodes.values() if n.replicas)
    assert p.world.host_copies(digest(p)) == [node], "where it served, and nowhere else"
    transfers = [a for a in p.world.log if isinstance(a, StartTransfer)]
    assert all({u.peer_id for u in a.upstreams if u is not None} <= {a.node} for a in transfers)
    p.world.demand["m"] = demand()
    p.run(5)
    assert p.world.replicas() == [] and p.world.host_copies(digest(p)) == [node], (
        "kept, in case it comes back"
    )
    p.run(6)
    assert p.world.host_copies(digest(p)) == []
    assert first.done == NBYTES


events = st.lists(
    st.tuples(
        st.integers(0, 10),
        st.sampled_from(["kill", "revive", "silence", "answer", "scale", "lose"]),
        st.integers(0, 3),
        st.sampled_from("ab"),
    ),
    max_size=16,
)


@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink])
@given(script=events, pools=st.integers(1, 3))
def test_whatever_happens_the_invariant_comes_back(script: list[Any], pools: int) -> None:
    tell(script, pools)


def tell(script: list[Any], pools: int) -> None:
    """A story of losses; then all nodes are well, and every checkpoint is in memory, with one host copy at most."""
    models = [service("a"), service("b", replicas=0)]
    p = pilot(*models, nodes_count=4, pool=pools * NBYTES)
    p.run(6)
    for pause, event, index, name in script:
        for _ in range(pause):
            step_and_check(p)
        happen(p, event, index, name)
    for node in p.world.nodes.values():
        if not node.alive:
            p.world.revive(node.name)
        node.health = NodeHealth.FRESH
    p.settle(90)  # longer than the longest rest
    for name in "ab":
        held = p.world.host_copies(digest(p, name))
        assert len(held) == 1, (name, held)
    assert p.run(1) == []


def step_and_check(p: HostPilot, names: str = "ab") -> None:
    """No decision may take the last copy in memory away; only losses may."""
    before = {name: bool(p.world.in_memory(digest(p, name))) for name in names}
    p.step()
    for name in names:
        assert p.world.in_memory(digest(p, name)) or not before[name], f"the last copy of {name} was let go"


def happen(p: HostPilot, event: str, index: int, name: str) -> None:
    node = p.world.nodes[f"node-{index}"]
    if event == "kill":
        p.world.kill(node.name)
        p.world.copies[node.name] = {}
    elif event == "revive" and not node.alive:
        p.world.revive(node.name)
    elif event == "silence" and node.alive:
        node.health = NodeHealth.SILENT
    elif event == "answer" and node.alive:
        node.health = NodeHealth.FRESH
    elif event == "scale":
        scale(p, index % 3, name)
    elif event == "lose":
        p.world.copies[node.name].clear()
