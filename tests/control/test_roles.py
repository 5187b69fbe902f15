"""Prefill/decode disaggregation: how replicas are divided, whose role changes, and what demand calls for."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from layercast.agent.v1alpha1 import agent_pb2
from layercast.route.v1alpha1 import route_pb2
from tests.control.world import STEP_S, Pilot, World, demand, peer, scaling, service

from layercast_operator.actions import SetReplicaRole, StartReplica, StartTransfer
from layercast_operator.agents import node_of
from layercast_operator.modelservice import Disaggregation, RoleBounds
from layercast_operator.pending import PendingRole, with_pending
from layercast_operator.policy import KvUse, PolicyInput, decide, role_needs
from layercast_operator.replacing import victims_of
from layercast_operator.roles import Division, RoleNeeds, assign, divide, division_of
from layercast_operator.routes import RouteInput, route_of
from layercast_operator.snapshot import Replica, ReplicaState, Role

SPLIT = Disaggregation()
SERVING = ReplicaState.SERVING


def divided(total: int, prefill: int, decode: int, *, needs: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    found = divide(
        total,
        SPLIT,
        needs=RoleNeeds(prefill=needs[0], decode=needs[1]),
        current=Division(prefill=prefill, decode=decode),
    )
    return found.prefill, found.decode


def test_a_division() -> None:
    assert divided(0, 0, 0) == (0, 0)
    assert divided(1, 1, 0) == (0, 0), "one replica does both"
    assert divided(2, 0, 0) == (1, 1)
    assert divided(5, 0, 0) == (3, 2)
    assert divided(4, 3, 1) == (3, 1), "little demand changes nothing"
    assert divided(4, 3, 1, needs=(1, 2)) == (2, 2), "prefill can spare one"
    assert divided(4, 1, 3, needs=(2, 1)) == (2, 2), "and so can decode"
    assert divided(4, 2, 2, needs=(3, 3)) == (2, 2), "nobody can spare any"
    assert divided(6, 2, 2, needs=(4, 2)) == (4, 2), "the new ones go where they are wanted"
    assert divided(3, 2, 2, needs=(0, 2)) == (1, 2), "the one that goes is not missed"
    assert divided(5, 4, 0, needs=(1, 3)) == (2, 3)


BOUNDS = st.builds(
    lambda least, more: RoleBounds(least=least, most=least + more if more else 0),
    st.integers(1, 4),
    st.integers(0, 4),
)


@given(
    st.integers(0, 20),
    st.builds(Disaggregation, prefill=BOUNDS, decode=BOUNDS),
    st.builds(RoleNeeds, prefill=st.integers(0, 12), decode=st.integers(0, 12)),
    st.builds(Division, prefill=st.integers(0, 12), decode=st.integers(0, 12)),
)
def test_every_division_is_whole_and_stays(
    total: int, bounds: Disaggregation, needs: RoleNeeds, current: Division
) -> None:
    found = divide(total, bounds, needs=needs, current=current)
    if total < 2:
        assert found == Division()
        return
    assert found.total == total
    assert found.prefill >= 1 and found.decode >= 1
    if total >= bounds.prefill.least + bounds.decode.least:
        assert found.prefill >= bounds.prefill.least
        roomy = not bounds.prefill.most or total - bounds.decode.least <= bounds.prefill.most
        assert found.decode >= bounds.decode.least or not roomy
    assert divide(total, bounds, needs=needs, current=found) == found, (
        "a division that took effect changes no more"
    )


def replica(name: str, role: Role = Role.BOTH, state: ReplicaState = SERVING, **fields: Any) -> Replica:
    return Replica(
        replica_id=name,
        model="m",
        digest="d",
        node=fields.pop("node", f"node-{name}"),
        device_id="cpu:0",
        state=state,
        peer=peer(name),
        role=role,
        **fields,
    )


def changes(*replicas: Replica, prefill: int, decode: int, sharing: tuple[str, ...] = ()) -> dict[str, Role]:
    division = Division(prefill=prefill, decode=decode)
    fresh = {r.node for r in replicas}
    return {a.replica_id: a.role for a in assign(replicas, division, sharing=sharing, fresh=fresh)}


def test_the_emptiest_prefill_replica_becomes_one_that_decodes() -> None:
    busy, idle = replica("a", Role.PREFILL, requests_running=3), replica("b", Role.PREFILL)
    assert changes(busy, idle, prefill=1, decode=1) == {"b": Role.DECODE}
    assert changes(busy, idle, prefill=1, decode=1, sharing=("b",)) == {"a": Role.DECODE}
    assert changes(replica("n", requests_running=9), idle, prefill=1, decode=1) == {"n": Role.DECODE}
    assert changes(replica("a"), replica("b"), prefill=1, decode=1) == {"a": Role.DECODE, "b": Role.PREFILL}


def test_the_last_that_computes_prompts_does_not() -> None:
    loading = replica("b", Role.PREFILL, ReplicaState.LOADING)
    assert changes(replica("a", Role.PREFILL), loading, prefill=1, decode=1) == {}
    live = replica("b", Role.PREFILL, ReplicaState.LIVE)
    assert changes(replica("a", Role.PREFILL), live, prefill=0, decode=2) == {}


def test_one_that_decodes_changes_only_when_it_is_empty() -> None:
    full = [replica("p", Role.PREFILL), *(replica(n, Role.DECODE, requests_running=1) for n in "ab")]
    assert changes(*full, prefill=2, decode=1) == {}
    idle = replica("c", Role.DECODE)
    assert changes(*full, idle, prefill=2, decode=2) == {"c": Role.PREFILL}


def test_who_is_alone_does_both() -> None:
    assert changes(replica("a", Role.DECODE, requests_running=1), prefill=0, decode=0) == {"a": Role.BOTH}


REPLICAS = st.lists(
    st.builds(
        replica,
        st.text("abcdef", min_size=1, max_size=3),
        st.sampled_from(Role),
        st.sampled_from([SERVING, ReplicaState.LOADING, ReplicaState.LIVE, ReplicaState.DRAINING]),
        requests_running=st.integers(0, 2),
        pending=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda r: r.replica_id,
)


@given(REPLICAS, st.integers(0, 8), st.integers(0, 8))
def test_prompts_always_have_somebody(replicas: list[Replica], prefill: int, decode: int) -> None:
    division = Division(prefill=prefill, decode=decode)
    fresh = {r.node for r in replicas}
    told = assign(replicas, division, sharing=(), fresh=fresh)
    assert len({a.replica_id for a in told}) == len(told), "one change a replica"
    after = {r.replica_id: r.role for r in replicas} | {a.replica_id: a.role for a in told}
    by_id = {r.replica_id: r for r in replicas}
    for change in told:
        changed = by_id[change.replica_id]
        assert change.role is not changed.role and not changed.pending
        if change.role is Role.DECODE:
            assert changed.state is SERVING
        if changed.role is Role.DECODE and division.total:
            assert not changed.requests
    able = [r for r in replicas if r.state is SERVING and not r.pending]
    if any(r.role is not Role.DECODE for r in able):
        assert any(after[r.replica_id] is not Role.DECODE for r in able)


def test_who_goes_is_of_the_role_that_has_too_many() -> None:
    crew = [
        replica("a", Role.PREFILL),
        replica("b", Role.PREFILL),
        replica("c", Role.DECODE, requests_running=5),
    ]
    one_left = victims_of(crew, 1, Division(prefill=1, decode=1))
    assert [r.role for r in one_left] == [Role.PREFILL]
    decodes = [replica("a", Role.PREFILL), *(replica(n, Role.DECODE, requests_running=2) for n in "bc")]
    assert [r.role for r in victims_of(decodes, 1, Division(prefill=1, decode=1))] == [Role.DECODE]


def policy_input(**changes: Any) -> PolicyInput:
    values: dict[str, Any] = {
        "now": 0.0,
        "current": 2,
        "capacity": None,
        "demand": demand(),
        "kv": KvUse(used=0, pages_per_replica=100, page_tokens=16),
        "prefill_tokens_per_s": 1000.0,
        "load_time_s": 5.0,
        "below_since": None,
        "disaggregation": SPLIT,
        **changes,
    }
    return PolicyInput(**values)


def test_needs_of_roles_are_added_and_decode_is_scaled_before_its_demand_is_there() -> None:
    """2,800 tokens: 4 prefill replicas at 0.7 s of queue; their KV, 175 pages, soon fills two that decode."""
    bounds = scaling(least=2, most=20)
    burst = policy_input(demand=demand(tokens=2800, waiting=7, in_flight=7))
    assert role_needs(bounds, burst) == RoleNeeds(prefill=4, decode=2)
    scaled = decide(bounds, burst)
    assert scaled.replicas == 8, "the middle of 4 + 2 to 6 + 3, rounded up"
    colocated = decide(bounds, policy_input(demand=burst.demand, disaggregation=None))
    assert colocated.replicas == 5
    calm = policy_input(demand=demand(in_flight=3), kv=KvUse(used=190, pages_per_replica=100, page_tokens=16))
    assert role_needs(bounds, calm) == RoleNeeds(prefill=0, decode=2)
    assert role_needs(bounds, policy_input(demand=None)) == RoleNeeds()


def test_a_role_calls_for_no_more_than_it_may_have() -> None:
    few = Disaggregation(prefill=RoleBounds(least=1, most=2), decode=RoleBounds(least=1, most=3))
    flood = policy_input(demand=demand(tokens=1e6, waiting=9, in_flight=9), disaggregation=few)
    assert role_needs(scaling(least=2, most=50), flood) == RoleNeeds(prefill=2, decode=3)
    assert decide(scaling(least=2, most=50), flood).replicas == 5


def crew_of(world: World) -> dict[Role, int]:
    roles = [r.role for r in world.replicas()]
    return {role: roles.count(role) for role in Role if role in roles}


def disaggregated(**changes: Any) -> Any:
    return service(replicas=2, disaggregation=SPLIT, **changes)


def test_two_replicas_come_up_as_one_of_each() -> None:
    world = World(nodes=3)
    pilot = Pilot(world, disaggregated())
    pilot.run(8)
    assert crew_of(world) == {Role.PREFILL: 1, Role.DECODE: 1}
    assert not pilot.run(4), "a division that took effect is not planned again"


def test_decode_grows_by_mutation_and_prefill_by_loading() -> None:
    """Parameters leave the replica that decodes, whose NIC sends nothing else; the new one goes live as prefill."""
    world = World(nodes=4)
    pilot = Pilot(world, disaggregated(scaling=scaling(least=2, most=4)))
    pilot.run(8)
    decode = next(r for r in world.replicas() if r.role is Role.DECODE)
    decode.kv_used = 99
    world.demand["m"] = demand(in_flight=5)
    actions = pilot.run(STEP_S * 4)
    started = [a for a in actions if isinstance(a, StartReplica)]
    assert started
    fed = next(a for a in actions if isinstance(a, StartTransfer) and a.replica_id == started[0].replica_id)
    assert fed.upstreams[0] is not None and fed.upstreams[0].peer_id == decode.replica_id
    prefill = next(r for r in world.replicas(SERVING) if r.role is Role.PREFILL)
    assert fed.live_source is not None and fed.live_source.peer_id == prefill.replica_id
    actions += pilot.run(12)
    mutated = [a.replica_id for a in actions if isinstance(a, SetReplicaRole) and a.role is Role.DECODE]
    assert mutated and mutated[0] != decode.replica_id
    assert crew_of(world)[Role.DECODE] == 2
    assert all(r.state is SERVING for r in world.replicas())


def test_mutation_costs_no_load() -> None:
    """Prompts are done, their KV stays: one that computed prompts decodes from now on, and nothing is started."""
    world = World(nodes=4)
    pilot = Pilot(world, service(replicas=4, disaggregation=SPLIT))
    pilot.run(10)
    assert crew_of(world) == {Role.PREFILL: 2, Role.DECODE: 2}
    for each in world.replicas():
        each.kv_used, each.running = (95, 4) if each.role is Role.DECODE else (40, 1)
    world.demand["m"] = demand(in_flight=10)
    actions = pilot.run(STEP_S * 3)
    assert [type(a) for a in actions] == [SetReplicaRole]
    assert crew_of(world) == {Role.PREFILL: 1, Role.DECODE: 3}


def test_the_division_is_what_replicas_say() -> None:
    crew = [replica("a", Role.PREFILL), replica("b", Role.DECODE), replica("c")]
    assert division_of(crew) == Division(prefill=1, decode=1)


def test_routes_and_agents_tell_roles() -> None:
    crew = [replica("a", Role.PREFILL), replica("b", Role.DECODE), replica("c")]
    route = route_of(RouteInput(model=service(), resolved=None, replicas=crew, message=""))
    wanted = [
        route_pb2.ENDPOINT_ROLE_PREFILL,
        route_pb2.ENDPOINT_ROLE_DECODE,
        route_pb2.ENDPOINT_ROLE_UNSPECIFIED,
    ]
    assert [endpoint.role for endpoint in route.endpoints] == wanted
    told = agent_pb2.GetStatusResponse(
        replicas=[agent_pb2.Replica(replica_id="a", role=agent_pb2.REPLICA_ROLE_DECODE)]
    )
    assert node_of(told, name="n", polled_at=0.0).replicas[0].role is Role.DECODE


def test_a_role_that_was_given_counts_before_it_is_seen() -> None:
    """Else the next pass might choose another replica for the same place, and nobody would compute prompts."""
    world = World(nodes=3)
    pilot = Pilot(world, disaggregated())
    pilot.run(8)
    seen = world.snapshot()
    prefill = next(r for r in seen.replicas("m") if r.role is Role.PREFILL)
    given_role = PendingRole(replica_id=prefill.replica_id, node=prefill.node, role=Role.DECODE)
    after = with_pending(seen, [], [], [given_role])
    assert [r.role for r in after.replicas("m")] == [Role.DECODE, Role.DECODE]
