"""Chains: the paper's examples, and what must hold for every plan (design section 8, points 4 and 7)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercast_operator.binomial import ticks_needed
from layercast_operator.multicast import (
    FORWARD_BYTES,
    Holder,
    HolderKind,
    Method,
    MulticastPlan,
    Running,
    Target,
    plan_multicast,
)
from layercast_operator.plan_invariants import Planned, violations
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


def test_in_a_star_nobody_forwards_and_sources_share_the_targets() -> None:
    targets = [target(f"t{i}", f"n{i}") for i in range(1, 5)]
    got = plan(
        [holder("s", "n0"), holder("r", "n5"), holder("d", "n6", kind=HolderKind.DISK)], targets, star=True
    )
    assert got.method is Method.STAR and sorted(map(str, edges(got).values())) == ["r", "r", "s", "s"]
    # Two flows leave each source: half its NIC for each, where a chain has all of it for both.
    assert {hop.predicted_s for hop in got.hops} == {8.0}
    late = [Running(target=t, upstream="r") for t in targets[:2]]
    assert edges(plan([holder("s", "n0"), holder("r", "n5")], targets[2:3], running=late, star=True)) == {
        "t3": "s"
    }
    assert plan([], targets, star=True).unfed == ("t1", "t2", "t3", "t4")


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


def test_nobody_is_live_without_a_complete_replica_or_while_kv_arrives() -> None:
    decode = plan([holder("s", "n0")], [target("t", "n1", receives_kv=True)])
    assert not decode.hops[0].live and "KV would arrive" in decode.hops[0].live_reason
    first = plan([holder("s", "n0")], [target("t", "n1")], serving=False)
    assert not first.hops[0].live and "no complete replica" in first.hops[0].live_reason


def test_a_neighbour_of_a_busy_sender_shares_its_nic() -> None:
    # The host copy beside a prefill replica is no way around its KV; inside the node it disturbs nobody.
    busy = holder("prefill", "n0", busy="it sends KV")
    beside = holder("agent-0", "n0", kind=HolderKind.HOST)
    got = plan([busy, beside, holder("s", "n9", nic_bytes_per_s=50 * MB)], [target("t", "n1")])
    assert edges(got) == {"t": "s"} and not got.notes
    inside = plan([busy], [target("x", "n0"), target("y", "n0")])
    assert edges(inside) == {"x": "prefill", "y": "x"} and not inside.notes


def test_a_target_beside_a_busy_sender_ends_its_chain() -> None:
    got = plan(
        [holder("prefill", "n0", busy="it sends KV"), holder("s", "n9")],
        [target("a", "n1"), target("b", "n2"), target("x", "n0")],
    )
    assert edges(got) == {"a": "s", "b": "a", "x": "prefill"}


def test_one_busy_sender_is_enough() -> None:
    busy = [holder(f"p{i}", f"n{i}", busy="it sends KV") for i in range(3)]
    got = plan(busy, [target(f"t{i}", f"m{i}") for i in range(4)])
    assert edges(got) == {"t0": "p0", "t1": "t0", "t2": "t1", "t3": "t2"}
    assert got.notes == ("p0 sends parameters although it sends KV: nobody else has them",)


def test_shards_go_over_all_nics_and_are_gathered_inside() -> None:
    wide: dict[str, Any] = {"nics": 4, "nvlink_bytes_per_s": 1000 * MB}
    copies = [holder(f"s{i}", "n0", **wide) for i in range(4)]
    got = plan(copies, [target(f"{n}{i}", f"n-{n}", **wide) for n in "xy" for i in range(4)])
    assert edges(got) == {f"x{i}": f"s{i}" for i in range(4)} | {f"y{i}": f"x{i}" for i in range(4)}
    assert [(hop.shard, hop.shards) for hop in got.hops] == [(i, 4) for i in range(4)] * 2
    # T = |M|/(g B) + (g-1)/g |M|/B_nvl, and one unit of forwarding for the second hop.
    expected = 400 / (4 * 100) + 3 / 4 * 400 / 1000
    assert got.hops[0].predicted_s == pytest.approx(expected)
    assert got.hops[7].predicted_s == pytest.approx(expected + FORWARD_BYTES / (100 * MB))
    assert "gathered inside" in got.hops[0].why
    # Where NVLink is no faster than a NIC, one NIC does it.
    slow: dict[str, Any] = {"nics": 4, "nvlink_bytes_per_s": 50 * MB}
    alone = plan([holder("s", "n0", **slow)], [target(f"x{i}", "n1", **slow) for i in range(4)])
    assert all(hop.shards == 1 for hop in alone.hops)


def test_an_nvlink_domain_is_one_logical_node() -> None:
    got = plan(
        [holder("s", "n0")],
        [target("x0", "n1", domain="rack"), target("y", "n3"), target("x1", "n2", domain="rack")],
    )
    assert edges(got)["x1"] == "x0"
    assert "NVLink" in next(hop.why for hop in got.hops if hop.target == "x1")


def test_chains_send_different_parts_first_while_nobody_serves() -> None:
    holders = [holder(f"s{i}", f"n{i}") for i in range(4)]
    targets = [target(f"t{i}", f"m{i}") for i in range(8)]
    first = plan(holders, targets, serving=False)
    assert {hop.shift.index for hop in first.hops} == {0, 1, 2, 3}
    assert all(hop.shift.of == 4 for hop in first.hops)
    assert first.covered_s == pytest.approx(1.0) and first.predicted_s > 4.0
    shifts = {hop.target: hop.shift for hop in first.hops}
    assert all(shifts[t] == shifts[up] for t, up in edges(first).items() if up in shifts)
    served = plan(holders, targets)
    assert {hop.shift.of for hop in served.hops} == {1}


def test_the_schedule_that_ends_sooner_is_chosen() -> None:
    many = [target(f"t{i:03}", f"m{i}") for i in range(63)]
    both: dict[str, Any] = {"methods": tuple(Method)}
    short = plan([holder("s", "n0")], many, checkpoint_bytes=int(40 * MB), **both)
    assert short.method is Method.BINOMIAL and "ends sooner" in short.method_reason
    assert short.predicted_s < plan([holder("s", "n0")], many, checkpoint_bytes=int(40 * MB)).predicted_s
    assert short.groups[0].source == "s" and len(short.groups[0].targets) == 63
    # Two groups in shifted order have everything together in half of the ticks.
    two = [holder("s", "n0"), holder("z", "n1")]
    shifted = plan(two, many, checkpoint_bytes=int(40 * MB), serving=False, **both)
    assert shifted.method is Method.BINOMIAL and {hop.shift.of for hop in shifted.hops} == {2}
    blocks, ticked = shifted.groups[0].blocks, ticks_needed(33, shifted.groups[0].blocks)
    assert shifted.covered_s == pytest.approx(shifted.predicted_s * -(-blocks // 2) / ticked, rel=0.05)
    few = plan([holder("s", "n0")], many[:2], **both)
    assert few.method is Method.CHAIN and "chains are no slower" in few.method_reason
    inside = plan([holder("s", "n0")], [target("x", "n1"), target("y", "n1")], **both)
    assert inside.method is Method.CHAIN and "inside their nodes" in inside.method_reason
    # Everybody sends in every tick, so nobody whose KV leaves that way goes live.
    prefill = [target(f"t{i:03}", f"m{i}", sends_kv=True) for i in range(63)]
    prefilling = plan([holder("s", "n0")], prefill, checkpoint_bytes=int(40 * MB), **both)
    assert prefilling.method is Method.BINOMIAL and not any(hop.live for hop in prefilling.hops)


rates = st.sampled_from([10 * MB, 25 * MB, 50 * MB, 100 * MB])


Network = tuple[list[Holder], list[Target], list[Running]]


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Up to eight nodes, some with several NICs, a few holders, and targets of which some are on their way."""
    nodes: list[dict[str, Any]] = [
        {
            "node": f"n{i}",
            "leaf": draw(st.sampled_from("abc")),
            "nic_bytes_per_s": draw(rates),
            "nics": draw(st.sampled_from([1, 1, 2, 4])),
            "domain": draw(st.sampled_from(["", "", "rack"])),
        }
        for i in range(draw(st.integers(1, 8)))
    ]
    holders: dict[tuple[str, HolderKind], Holder] = {}
    for i in range(draw(st.integers(1, 4))):
        spot, kind = draw(st.sampled_from(nodes)), draw(st.sampled_from(list(HolderKind)))
        name = f"h{i}" if kind is HolderKind.DEVICE else f"agent-{spot['node']}"
        busy, leaving = draw(st.sampled_from(["", "", "it sends KV"])), draw(st.booleans())
        values = {**spot, "kind": kind, "read_bytes_per_s": draw(rates), "busy": busy, "leaving": leaving}
        holders[name, kind] = holder(name, **values)
    fed = [
        Target(peer=peer(f"t{i}"), sends_kv=draw(st.booleans()), **spot)
        for i, spot in enumerate(draw(st.lists(st.sampled_from(nodes), max_size=8)))
    ]
    above = ["gone", *(h.peer.peer_id for h in holders.values())]
    running: list[Running] = []
    for _ in range(draw(st.integers(0, len(fed)))):
        running.append(Running(target=fed.pop(), upstream=draw(st.sampled_from(above))))
        above.append(running[-1].target.peer.peer_id)
    return list(holders.values()), fed, running


@given(networks(), st.randoms(use_true_random=False), st.booleans(), st.booleans())
def test_every_plan(network: Network, shuffler: Any, serving: bool, star: bool) -> None:
    holders, targets, running = network
    values: dict[str, Any] = {"running": running, "serving": serving, "methods": tuple(Method), "star": star}
    got = plan(holders, targets, **values)
    assert not violations(Planned(holders=holders, targets=targets, running=running, plan=got))
    # The order in which things are listed means nothing.
    for listed in network:
        shuffler.shuffle(listed)
    assert plan(holders, targets, **values) == got


BAD_PLANS: dict[str, tuple[Any, str]] = {
    "twice": (lambda hops: [hops[0], *hops], "not every target once"),
    "missing": (lambda hops: hops[1:], "not every target once"),
    "cycle": (lambda hops: [replace(hops[0], upstream=peer("b")), *hops[1:]], "cycle"),
    "from nowhere": (lambda hops: [replace(hops[0], upstream=peer("who")), *hops[1:]], "which has nothing"),
    "no disk": (lambda hops: [replace(hops[0], upstream=None), *hops[1:]], "which has nothing"),
    "grows": (lambda hops: [hops[0], replace(hops[1], bytes_per_s=1e12)], "more arrives"),
    "waits": (lambda hops: [replace(hops[0], alternatives=(peer("b"),)), hops[1]], "neither a copy nor"),
    "kv": (lambda hops: [replace(hops[0], upstream=peer("prefill")), hops[1]], "beside KV"),
    "shards": (lambda hops: [replace(hops[0], shards=2), hops[1]], "gets shards"),
    "no reason": (lambda hops: [replace(hops[0], live_reason=""), hops[1]], "no reason"),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_what_is_wrong_with_a_plan_is_found(name: str) -> None:
    spoil, expected = BAD_PLANS[name]
    holders = [holder("s", "n0"), holder("prefill", "n9", busy="it sends KV")]
    targets = [target("a", "n1"), target("b", "n2")]
    good = plan(holders, targets)
    assert not violations(Planned(holders=holders, targets=targets, plan=good))
    bad = replace(good, hops=tuple(spoil(list(good.hops))))
    found = violations(Planned(holders=holders, targets=targets, plan=bad))
    assert any(expected in text for text in found), found
