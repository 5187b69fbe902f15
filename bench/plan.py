"""How long the multicast planner takes in a large cluster, and whether random plans keep what they promise.

    python -m bench.plan [--runs 30] [--cases 10000] [--seed 1] [--limit-s 60]

Plans 300 targets from 50 holders on 1,000 nodes, then checks random clusters of up to ten nodes against
`layercast_operator.plan_invariants`. Prints a table and, last, one line of JSON. Fails (1) on any violation.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from typing import Any

from layercast_operator.multicast import (
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

NODES, LEAVES, HOLDERS, TARGETS = 1000, 32, 50, 300
CHECKPOINT_BYTES = 16 * 10**9
RATES = (1.25e9, 3.125e9, 12.5e9, 25e9)


def peer(name: str) -> PeerRef:
    """Where a peer with this name would be."""
    return PeerRef(peer_id=name, address=f"{name}:1", data_address=f"{name}:2")


def large_cluster(rng: random.Random) -> tuple[list[Holder], list[Target]]:
    """1,000 nodes under 32 leaves; a tenth of the holders sends KV, a fifth are disks."""
    nodes = [(f"n{i:04}", f"leaf{rng.randrange(LEAVES)}", rng.choice(RATES)) for i in range(NODES)]
    rng.shuffle(nodes)
    holders = [
        Holder(
            peer=peer(f"holder-{i:02}"),
            node=node,
            leaf=leaf,
            kind=HolderKind.DISK if i % 5 == 4 else HolderKind.DEVICE,
            nic_bytes_per_s=nic,
            read_bytes_per_s=2e9 if i % 5 == 4 else 30e9,
            busy="it sends KV" if i % 10 == 0 else "",
        )
        for i, (node, leaf, nic) in enumerate(nodes[:HOLDERS])
    ]
    # Two targets a node on half of the nodes used.
    spots = [*nodes[HOLDERS : HOLDERS + 200], *nodes[HOLDERS : HOLDERS + 100]]
    targets = [
        Target(peer=peer(f"target-{i:03}"), node=node, leaf=leaf, nic_bytes_per_s=nic)
        for i, (node, leaf, nic) in enumerate(spots)
    ]
    return holders, targets


def small_cluster(rng: random.Random) -> tuple[list[Holder], list[Target], list[Running]]:
    """Up to ten nodes with a few of everything anywhere: domains, NICs, KV, disks, targets on their way."""
    many_nics = rng.random() < 0.3
    nodes: list[dict[str, Any]] = [
        {
            "node": f"n{i}",
            "leaf": rng.choice("abc"),
            "nic_bytes_per_s": rng.choice((10e6, 25e6, 50e6, 100e6)),
            "nics": rng.choice((1, 2, 4)) if many_nics else 1,
            "nvlink_bytes_per_s": rng.choice((20e6, 1e9)),
            "domain": rng.choice(("", "", "", "d0")) if many_nics else "",
        }
        for i in range(rng.randint(1, 10))
    ]
    holders: dict[tuple[str, HolderKind], Holder] = {}
    for i in range(rng.randint(0, 4)):
        spot, kind = rng.choice(nodes), rng.choice(list(HolderKind))
        name = f"h{i}" if kind is HolderKind.DEVICE else f"agent-{spot['node']}"
        holders[name, kind] = Holder(
            peer=peer(name),
            kind=kind,
            read_bytes_per_s=rng.choice((10e6, 60e6, 1e9)),
            busy=rng.choice(("", "", "it sends KV")),
            leaving=rng.random() < 0.2,
            **spot,
        )
    fed = [
        Target(peer=peer(f"t{i}"), sends_kv=rng.random() < 0.3, receives_kv=rng.random() < 0.1, **spot)
        for i, spot in enumerate(rng.choices(nodes, k=rng.randint(0, 10)))
    ]
    split = rng.randint(0, len(fed)) if rng.random() < 0.4 else 0
    # Each below an earlier one, a holder, or somebody who is asked about now.
    above = [h.peer.peer_id for h in holders.values()] + [t.peer.peer_id for t in fed[split : split + 1]]
    running: list[Running] = []
    for target in fed[:split]:
        running.append(Running(target=target, upstream=rng.choice([*above, "gone"])))
        above.append(target.peer.peer_id)
    return list(holders.values()), fed[split:], running


def check_case(rng: random.Random) -> list[str]:
    """Violations of one random case."""
    holders, targets, running = small_cluster(rng)
    serving, nbytes = rng.random() < 0.7, rng.choice((10**6, 10**8, 10**10))

    def plan() -> MulticastPlan:
        return plan_multicast(
            holders=holders,
            targets=targets,
            running=running,
            checkpoint_bytes=nbytes,
            serving=serving,
            methods=tuple(Method),
        )

    first = plan()
    found = violations(Planned(holders=holders, targets=targets, running=running, plan=first))
    for listed in (holders, targets, running):
        rng.shuffle(listed)
    return found if plan() == first else [*found, "the order in which things are listed changed the plan"]


def main() -> int:
    """Measure, check, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=60.0)
    args = parser.parse_args()
    holders, targets = large_cluster(random.Random(args.seed))
    times: list[float] = []
    for _ in range(max(args.runs, 20)):
        began = time.perf_counter()
        plan = plan_multicast(
            holders=holders,
            targets=targets,
            checkpoint_bytes=CHECKPOINT_BYTES,
            serving=True,
            methods=tuple(Method),
        )
        times.append(1000 * (time.perf_counter() - began))
    bad = violations(Planned(holders=holders, targets=targets, plan=plan))
    began, cases = time.perf_counter(), 0
    while cases < args.cases and time.perf_counter() - began < args.limit_s:
        seed = args.seed * 1_000_003 + cases
        bad += [f"case {seed}: {text}" for text in check_case(random.Random(seed))]
        cases += 1
    for text in bad[:10]:
        print(text, file=sys.stderr)
    result = {
        "plan_ms": round(statistics.median(times), 2),
        "plan_ms_max": round(max(times), 2),
        "runs": len(times),
        "nodes": NODES,
        "holders": HOLDERS,
        "targets": TARGETS,
        "predicted_s": round(plan.predicted_s, 2),
        "method": plan.method.value,
        "cases": cases,
        "violations": len(bad),
        "cases_s": round(time.perf_counter() - began, 1),
    }
    for name, value in result.items():
        print(f"{name:<14}{value!s:>10}")
    print(json.dumps(result))
    return 0 if not bad and cases == args.cases else 1


if __name__ == "__main__":
    sys.exit(main())
