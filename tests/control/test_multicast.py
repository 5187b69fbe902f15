"""Chains: the paper's examples, and what must hold for every plan (design section 8, points 4 and 6)."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercast_operator.multicast import (
    FORWARD_BYTES,
    Holder,
    HolderKind,
    MulticastPlan,
    Running,
    Target,
    plan_multicast,
)
from layercast_operator.snapshot import PeerRef

MB = 1e6


def peer(name: str) -> PeerRef:
    return PeerRef(peer_id=name, address=f"{name}:1", data_address=f"{name}:2")


def holder(name: str, node: str, **changes: Any) -> Holder:
    values: dict[str, Any] = {
        "peer": peer(name),
        "node": node,
        "leaf": "a",
        "kind": HolderKind.DEVICE,
        "nic_bytes_per_s": 100 * MB,
        "read_bytes_per_s": 10_000 * MB,
        **changes,
    }
    return Holder(**values)


def target(name: str, node: str, rate: float = 100 * MB, **changes: Any) -> Target:
    return Target(peer=peer(name), node=node, leaf=changes.pop("leaf", "a"), nic_bytes_per_s=rate, **changes)


def plan(holders: list[Holder], targets: list[Target], **changes: Any) -> MulticastPlan:
    values: dict[str, Any] = {"checkpoint_bytes": int(400 * MB), "serving": True, **changes}
    return plan_multicast(holders=holders, targets=targets, **values)


def edges(got: MulticastPlan) -> dict[str, str | None]:
    return {hop.target: None if hop.upstream is None else hop.upstream.peer_id for hop in got.hops}


def test_one_source_makes_one_chain() -> None:
    got = plan([holder("s", "n0")], [target("t1", "n1"), target("t2", "n2"), target("t3", "n3")])
    assert edges(got) == {"t1": "s", "t2": "t1", "t3": "t2"}
    # |M|/B + (n-1) c/B: the last waits for two units more than the first.
    first, _, last = (hop.predicted_s for hop in got.hops)
    assert first == pytest.approx(4.0)
    assert last == pytest.approx(4.0 + 2 * FORWARD_BYTES / (100 * MB))


def test_the_fast_come_first() -> None:
    # Figure 13b: S -> T2 -> T1 halves the time of the fast one and costs the slow one nothing.
    got = plan(
        [holder("s", "n0")],
        [target("slow", "n1", 50 * MB), target("fast", "n2", 100 * MB)],
    )
    assert edges(got) == {"fast": "s", "slow": "fast"}
    assert [round(hop.predicted_s, 1) for hop in got.hops] == [4.0, 8.1]


def test_one_chain_a_source_and_the_same_leaf_first() -> None:
    got = plan(
        [holder("sa", "n0", leaf="a"), holder("sb", "n1", leaf="b")],
        [target(f"a{i}", f"na{i}", leaf="a") for i in range(2)]
        + [target(f"b{i}", f"nb{i}", leaf="b") for i in range(2)],
    )
    assert edges(got) == {"a0": "sa", "a1": "a0", "b0": "sb", "b1": "b0"}


def test_devices_of_one_node_are_fed_inside_it() -> None:
    got = plan(
        [holder("s", "n0")],
        [target("x0", "n1"), target("y0", "n2"), target("x1", "n1"), target("y1", "n2")],
    )
    assert edges(got) == {"x0": "s", "x1": "x0", "y0": "x1", "y1": "y0"}


def test_a_source_that_sends_kv_is_left_out_unless_there_is_no_other() -> None:
    busy = holder("prefill", "n0", busy="it sends KV to decode replicas")
    got = plan([busy, holder("decode", "n1")], [target("t", "n2")])
    assert edges(got) == {"t": "decode"}
    alone = plan([busy], [target("t", "n2")])
    assert edges(alone) == {"t": "prefill"}
    assert "sends KV" in alone.notes[0]


def test_copies_on_disk_are_second_choice() -> None:
    disk = holder("agent-1", "n1", kind=HolderKind.DISK, read_bytes_per_s=500 * MB)
    got = plan([disk, holder("s", "n0")], [target("t", "n2")])
    assert edges(got) == {"t": "s"}
    assert got.hops[0].alternatives == (peer("agent-1"),)
    without = plan([disk], [target("t", "n2")], serving=False)
    assert edges(without) == {"t": "agent-1"}
    assert not without.hops[0].live and "no complete replica" in without.hops[0].live_reason


def test_the_own_disk_starts_the_chain_of_first_replicas() -> None:
    disk = holder("agent-0", "n0", kind=HolderKind.DISK, read_bytes_per_s=500 * MB)
    got = plan([disk], [target("t0", "n0"), target("t1", "n1"), target("t2", "n2")], serving=False)
    assert edges(got) == {"t0": None, "t1": "t0", "t2": "t1"}
    assert "its own disk" in got.hops[0].why


def test_the_own_disk_wins_when_it_is_faster_than_the_network() -> None:
    for rate, expected in ((500 * MB, None), (50 * MB, "s")):
        disk = holder("agent-1", "n1", kind=HolderKind.DISK, read_bytes_per_s=rate)
        got = plan([holder("s", "n0"), disk], [target("t", "n1")])
        assert edges(got) == {"t": expected}
        assert (None if expected else peer("s")) in got.hops[0].alternatives


def test_alternatives_survive_the_death_of_any_upstream() -> None:
    holders = [
        holder("s1", "n0"),
        holder("s2", "n1"),
        holder("agent-9", "n9", kind=HolderKind.DISK, read_bytes_per_s=MB),
    ]
    got = plan(holders, [target(f"t{i}", f"m{i}") for i in range(4)])
    chains = edges(got)
    assert chains == {"t0": "s1", "t1": "s2", "t2": "t0", "t3": "t1"}
    last = next(hop for hop in got.hops if hop.target == "t2")
    assert [a.peer_id if a else None for a in last.alternatives] == ["s1", "s2", "agent-9"]


def test_new_targets_join_the_tail_of_a_running_chain() -> None:
    running = [
        Running(target=target("t1", "n1"), upstream="s"),
        Running(target=target("t2", "n2"), upstream="t1"),
    ]
    got = plan([holder("s", "n0")], [target("t3", "n3")], running=running)
    assert edges(got) == {"t3": "t2"}
    assert [a.peer_id for a in got.hops[0].alternatives if a] == ["s", "t1"]


def test_a_stalled_target_is_never_fed_by_its_own_descendants() -> None:
    running = [Running(target=target("below", "n2"), upstream="stalled")]
    nobody = plan([], [target("stalled", "n1")], running=running)
    assert nobody.unfed == ("stalled",) and not nobody.hops
    somebody = plan([holder("s", "n0")], [target("stalled", "n1")], running=running)
    assert edges(somebody) == {"stalled": "s"}
    assert all(a is None or a.peer_id != "below" for a in somebody.hops[0].alternatives)


def test_only_tails_go_live_where_kv_leaves_in_the_same_direction() -> None:
    prefill = [target(f"t{i}", f"n{i}", sends_kv=True) for i in range(1, 4)]
    got = plan([holder("s", "n0")], prefill)
    assert [hop.live for hop in got.hops] == [False, False, True]
    assert "same direction" in got.hops[0].live_reason
    colocated = plan([holder("s", "n0")], [target(f"t{i}", f"n{i}") for i in range(1, 4)])
    assert all(hop.live for hop in colocated.hops)


def test_a_thousand_nodes_take_a_moment() -> None:
    holders = [holder(f"s{i:03}", f"n{i}", leaf=f"l{i % 16}") for i in range(50)]
    targets = [target(f"t{i:03}", f"m{i}", leaf=f"l{i % 16}") for i in range(950)]
    began = time.perf_counter()
    got = plan(holders, targets)
    assert len(got.hops) == 950
    assert time.perf_counter() - began < 5.0


rates = st.sampled_from([10 * MB, 25 * MB, 50 * MB, 100 * MB])


@st.composite
def networks(draw: st.DrawFn) -> tuple[list[Holder], list[Target]]:
    """Up to eight nodes with a few holders and targets anywhere on them."""
    nodes = [(f"n{i}", draw(st.sampled_from("abc")), draw(rates)) for i in range(draw(st.integers(1, 8)))]
    holders: list[Holder] = []
    targets: list[Target] = []
    for i in range(draw(st.integers(1, 4))):
        node, leaf, nic = draw(st.sampled_from(nodes))
        kind = draw(st.sampled_from(list(HolderKind)))
        busy = draw(st.sampled_from(["", "", "it sends KV"]))
        name = f"h{i}" if kind is HolderKind.DEVICE else f"agent-{node}-{kind.name}"
        if all(h.peer.peer_id != name for h in holders):
            holders.append(
                holder(
                    name,
                    node,
                    leaf=leaf,
                    kind=kind,
                    nic_bytes_per_s=nic,
                    read_bytes_per_s=draw(rates),
                    busy=busy,
                )
            )
    for i in range(draw(st.integers(0, 8))):
        node, leaf, nic = draw(st.sampled_from(nodes))
        targets.append(target(f"t{i}", node, nic, leaf=leaf))
    return holders, targets


@given(networks(), st.randoms(use_true_random=False))
def test_every_plan(network: tuple[list[Holder], list[Target]], shuffler: Any) -> None:
    holders, targets = network
    got = plan(holders, targets)
    by_target = {hop.target: hop for hop in got.hops}
    # Each target once, all of them fed: there is a holder.
    assert sorted(by_target) == sorted(t.peer.peer_id for t in targets)
    assert len(got.hops) == len(targets) and not got.unfed
    place = {t.peer.peer_id: t.node for t in targets}
    roots = {h.peer.peer_id for h in holders}
    nics = {t.peer.peer_id: t.nic_bytes_per_s for t in targets}
    for hop in got.hops:
        path = [hop.target]
        while (upstream := by_target[path[-1]].upstream) is not None and upstream.peer_id in by_target:
            assert upstream.peer_id not in path, "a cycle"
            path.append(upstream.peer_id)
        # Chains start at holders, or at the own disk of the first member.
        if upstream is None:
            own = [h for h in holders if h.kind is HolderKind.DISK and h.node == place[path[-1]]]
            assert own, "a disk that has nothing"
        else:
            assert upstream.peer_id in roots
        # Bandwidth does not grow along a chain: what arrives, and the members' own.
        arriving = [by_target[name].bytes_per_s for name in path]
        assert arriving == sorted(arriving), "more arrives below than above"
        members = [nics[name] for name in path]
        assert members == sorted(members), "a faster member below a slower one"
        # Alternatives are complete holders or own ancestors: nobody waits in a circle.
        for alternative in hop.alternatives:
            known = alternative is None or alternative.peer_id in roots
            assert known or (alternative is not None and alternative.peer_id in path[1:])
        assert hop.upstream not in hop.alternatives
    # The order in which things are listed means nothing.
    shuffler.shuffle(holders)
    shuffler.shuffle(targets)
    assert plan(holders, targets).hops == got.hops
    # A busy sender is a source only when nobody else is.
    busy = {h.peer.peer_id for h in holders if h.busy}
    if len(busy) < len(holders):
        assert not busy & {hop.upstream.peer_id for hop in got.hops if hop.upstream}
