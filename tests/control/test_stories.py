"""Stories in a world made of values: a node dies at any step, anything happens in any order, and all ends well."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.control.world import NBYTES

from layercast_operator.actions import StartReplica, StartTransfer, StopReplica
from layercast_operator.modelservice import Disaggregation
from layercast_operator.snapshot import NodeHealth, ReplicaState, Role

SERVING = ReplicaState.SERVING


def pilot(worlds: Any, *models: Any, **world: Any) -> Any:
    return worlds.Pilot(worlds.World(**world), *models)


def check(p: Any, most: int, done: list[Any]) -> None:
    """Invariants 4 and 6 of the design, after every step."""
    arriving = {ReplicaState.LOADING, ReplicaState.LIVE, ReplicaState.LEADING}
    active = [r for r in p.world.replicas() if r.state in {*arriving, SERVING}]
    assert len(active) <= most
    feeding = {r.replica_id: r.upstream for r in active if r.upstream and r.state is not SERVING}
    for start in feeding:
        path = [start]
        while (upstream := feeding.get(path[-1])) is not None:
            assert upstream not in path, f"a cycle: {path}"
            path.append(upstream)
    # Planning again on the state after the plan gives nothing more to do, unless the plan itself made room.
    again = [a for name in p.models if not (turn := p.turn(name)).changed for a in turn.plan.actions]
    if not any(isinstance(action, StopReplica) for action in done):
        new = {action.subject for action in done if isinstance(action, StartReplica)}
        # Those that waited for the new ones, to load different parts, are fed together with them.
        new |= {r.replica_id for r in active if any(t.plan.waits_for_members for t in p.turns.values())}
        left = [a for a in again if not (isinstance(a, StartTransfer) and a.subject in new)]
        assert left == [], f"planned again: {left}"
    asked = {(type(action), action.subject) for action in done}
    assert not asked & {(type(action), action.subject) for action in again}


def run_checked(p: Any, seconds: float, most: int) -> None:
    """Checked passes; where nothing has happened for a while, time goes faster."""
    end, quiet = p.world.now + seconds, 0
    while p.world.now < end:
        done = p.act()
        check(p, most, done)
        quiet = 0 if done else quiet + 1
        p.world.pass_time(0.2 if quiet < 12 else 2.0)


@pytest.mark.parametrize("killed", ["node-0", "node-1", "node-2"])
@pytest.mark.parametrize("step", range(1, 40, 6))
def test_any_node_may_vanish_at_any_step_of_a_scale_up(worlds: Any, killed: str, step: int) -> None:
    p = pilot(worlds, worlds.service(scaling=worlds.scaling(1, 3)))
    p.world.demand["m"] = worlds.demand()
    for index in range(40):
        if index == 12:
            p.world.demand["m"] = worlds.demand(1500, 6, 6)
        if index == step:
            p.world.kill(killed)
        check(p, 3, p.act())
        p.world.pass_time(0.2)
    run_checked(p, 12, 3)
    assert len(p.world.replicas(SERVING)) == 2, "all that two nodes can hold"
    assert all(r.done == 800 for r in p.world.replicas())
    p.world.revive(killed)
    run_checked(p, 8, 3)
    assert len(p.world.replicas(SERVING)) == 3
    assert p.run(2) == [], "what is settled stays so"


events = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.sampled_from(["kill", "revive", "silence", "demand", "calm", "blind", "fail", "scale", "kv"]),
        st.integers(0, 3),
    ),
    max_size=14,
)


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink])
@given(script=events, devices=st.integers(1, 2), least=st.integers(0, 2), disaggregated=st.booleans())
def test_any_story_ends_well(
    worlds: Any, script: list[Any], devices: int, least: int, *, disaggregated: bool
) -> None:
    tell(worlds, script, devices, least, disaggregated=disaggregated)


def tell(worlds: Any, script: list[Any], devices: int, least: int, *, disaggregated: bool = False) -> None:
    """A story: events with pauses between them; then all nodes are well again, and all must end well."""
    scaling = worlds.scaling(least, 4, scale_down_s=2.0)
    roles = Disaggregation() if disaggregated else None
    service = worlds.service(scaling=scaling, replicas=max(least, 1), disaggregation=roles)
    p = pilot(worlds, service, nodes=4, devices=devices)
    for pause, event, index in script:
        for _ in range(pause):
            check(p, 4, p.act())
            check_roles(p)
            p.world.pass_time(0.2)
        happen(worlds, p, event, index)
    for node in p.world.nodes.values():
        if not node.alive:
            p.world.revive(node.name)
        node.health = NodeHealth.FRESH
    for replica in p.world.replicas():
        replica.kv_used = replica.running = 0
    p.world.demand["m"] = worlds.demand(1500, 6, 6)
    run_checked(p, 90, 4)  # longer than the longest rest
    assert {r.state for r in p.world.replicas()} == {SERVING}
    assert 3 <= len(p.world.replicas()) <= 4
    found = {r.role for r in p.world.replicas()}
    assert found == ({Role.PREFILL, Role.DECODE} if disaggregated else {Role.BOTH})
    assert p.run(1) == []


def check_roles(p: Any) -> None:
    """A replica that is to decode holds everything already; where one computed prompts, one still does."""
    decode = [r for r in p.world.replicas() if r.role is Role.DECODE]
    assert all(r.done >= NBYTES for r in decode), "one that decodes was loaded"


def happen(worlds: Any, p: Any, event: str, index: int) -> None:
    """One event of a story."""
    name = f"node-{index}"
    if event == "kill":
        p.world.kill(name)
    elif event == "revive":
        p.world.revive(name)
    elif event == "silence" and p.world.nodes[name].alive:
        p.world.nodes[name].health = NodeHealth.SILENT
    elif event == "demand":
        p.world.demand["m"] = worlds.demand(700.0 * (index + 1), 5, 5)
    elif event == "calm":
        p.world.demand["m"] = worlds.demand()
    elif event == "kv":
        for replica in p.world.replicas(SERVING):
            replica.kv_used, replica.running = 30 * index, index
    elif event == "blind":
        p.world.demand.clear()
    elif event == "fail":
        for replica in p.world.replicas()[:index]:
            replica.state = ReplicaState.FAILED
    elif event == "scale":
        p.models["m"] = replace(p.models["m"], replicas=index, generation=p.models["m"].generation + 1)
