"""Whole chains of 2-6 nodes in virtual time: real machines, drivers, residency and memory; a network that delays,
reorders, duplicates, corrupts and is cut, nodes that die, stop, go on and send rot. A seed reproduces a run.

After every step: no more than a window in flight at any target, and every chunk that is marked holds the right bytes.
At the end, long before the run's own, every survivor is complete and equal, or stalled with one reason while no node
that it can reach has what it misses.

`LAYERCAST_FAULT_RUNS=5000 pytest tests/transfer/test_chain_simulation.py` makes more runs than CI.
"""

from __future__ import annotations

import functools
import os
import random
from collections import Counter
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest

from layercast_agent import transfer_events as ev
from layercast_agent.residency import Residency
from layercast_agent.runner import TransferDriver, TransferOutcome
from layercast_agent.transfer import Transfer
from layercast_agent.transfer_events import Chunk, TransferLimits, UpstreamSpec
from layercast_agent.transfer_states import Phase
from layercast_agent.transport.memory import Faults, MemoryLink, MemoryNetwork, MemoryNode

SEEDS = int(os.environ.get("LAYERCAST_FAULT_RUNS", "200"))
LIMITS = TransferLimits(window_chunks=3, attempts_max=6)
TICK_S = 0.1
LAST_S = 120.0
OPERATOR_S = (20.0, 40.0)  # when the operator looks at stalled targets and gives them a new list
END_DEADLINE_S = 80.0  # of virtual time, for any run
STEPS_MAX = 200_000
NO_FAULTS: Mapping[int, int] = {}


class Target:
    """A node that loads, with its driver."""

    def __init__(
        self,
        *,
        node: MemoryNode,
        network: MemoryNetwork,
        checkpoint: Any,
        upstreams: tuple[str, ...],
        segment_order: list[int],
    ) -> None:
        self.node = node
        self.network = network
        self.checkpoint = checkpoint
        self.segments: list[int] = []
        self.outcomes: list[TransferOutcome] = []
        self.checked_version = 0
        self.settled_at = 0.0
        self.waiting: list[ev.Event] = []
        manifest = checkpoint.manifest
        self.upstreams = [UpstreamSpec(peer_id=name) for name in upstreams]
        self.machine = Transfer(
            chunk_counts=[manifest.chunk_count(s.index) for s in manifest.segments],
            segment_order=segment_order,
            upstreams=self.upstreams,
            generation=1,
            now=0.0,
            limits=LIMITS,
        )
        self.driver = TransferDriver(
            transfer_id=node.name,
            machine=self.machine,
            residency=node.residency,
            open_link=lambda request: MemoryLink(request, network=network, target=node),
            post=lambda event: network.schedule(0.0, lambda: self.handle(event)),
            on_segment=self.segments.append,
            on_end=self.outcomes.append,
        )
        network.schedule(0.0, self.tick)

    def tick(self) -> None:
        self.handle(ev.Ticked())
        if self.node.alive and not self.machine.finished and self.network.now < LAST_S:
            self.network.schedule(TICK_S, self.tick)

    def handle(self, event: ev.Event) -> None:
        if not self.node.alive:
            return
        if self.node.stopped:  # a process that does not run loses nothing of what waits for it
            self.waiting.append(event)
            return
        before = self.machine.phase
        self.driver.handle(event, self.network.now)
        if self.machine.phase is not before:
            self.settled_at = self.network.now
        assert self.machine.in_flight <= LIMITS.window_chunks
        self.check_bytes()

    def check_bytes(self) -> None:
        """Every chunk that is marked since the last look holds the right bytes; at the end all are looked at."""
        residency, manifest = self.node.residency, self.checkpoint.manifest
        version, changed = residency.snapshot(since=self.checked_version)
        self.checked_version = version
        for segment in changed:
            for chunk in range(manifest.chunk_count(segment)):
                if residency.has(segment, chunk):
                    offset, nbytes = manifest.chunk_range(segment, chunk)
                    held = self.node.memories[segment].view(offset, nbytes)
                    assert held == self.checkpoint.data[segment][offset : offset + nbytes]

    def go_on(self) -> None:
        waiting, self.waiting = self.waiting, []
        for event in waiting:
            self.handle(event)

    def plan_again(self) -> None:
        """What the operator does with a stalled target: the same peers under a higher generation."""
        if self.machine.phase is Phase.STALLED:
            generation = self.machine.generation + 1
            self.handle(ev.UpstreamsReplaced(upstreams=tuple(self.upstreams), generation=generation))

    def misses(self) -> set[Chunk]:
        manifest = self.checkpoint.manifest
        return {
            Chunk(segment=s.index, chunk=c)
            for s in manifest.segments
            for c in range(manifest.chunk_count(s.index))
            if not self.node.residency.has(s.index, c)
        }


class Chain:
    """A source A and 1-5 targets behind it, each fed by its predecessor, with the others as substitutes."""

    def __init__(self, seed: int, synthetic: ModuleType, *, faults: Faults | None = None) -> None:
        self.rng = random.Random(seed)
        worst_s = self.rng.choice([0.005, 0.05, 0.4])
        drawn = Faults(
            delay_s=(0.001, worst_s),
            corrupt=self.rng.choice([0.0, 0.0, 0.02, 0.1]),
            duplicate=self.rng.choice([0.0, 0.0, 0.02, 0.1]),
        )
        self.network = MemoryNetwork(rng=self.rng, faults=faults or drawn)
        self.happened: Counter[str] = Counter()
        sizes = [self.rng.randrange(1, 200) for _ in range(self.rng.randrange(3, 7))]
        self.checkpoint = synthetic.make(sizes, chunk_bytes=32, seed=seed)
        names = "ABCDEF"[: self.rng.randrange(2, 7)]
        self.add_node("A", complete=True)
        for name in names[1:]:
            self.add_node(name, complete=False)
        self.targets = [self.target(names, index) for index in range(1, len(names))]
        for at_s in OPERATOR_S:
            for target in self.targets:
                self.network.schedule(at_s, target.plan_again)

    def add_node(self, name: str, *, complete: bool) -> None:
        checkpoint = self.checkpoint
        self.network.nodes[name] = MemoryNode(
            name,
            manifest=checkpoint.manifest,
            memories=checkpoint.memories() if complete else checkpoint.empty_memories(),
            residency=Residency(checkpoint.manifest, complete=complete),
        )

    def target(self, names: str, index: int) -> Target:
        predecessor, others = names[index - 1], [n for n in names if n not in names[index - 1 : index + 1]]
        self.rng.shuffle(others)
        order = list(range(len(self.checkpoint.data)))
        if self.rng.random() < 0.5:
            order = [*order[1:], order[0]]
        return Target(
            node=self.network.nodes[names[index]],
            network=self.network,
            checkpoint=self.checkpoint,
            upstreams=(predecessor, *others),
            segment_order=order,
        )

    def misfortune(self) -> None:
        """One more thing goes wrong, anywhere."""
        kind = self.rng.choice(["kill", "stop", "cut", "rot"])
        one, other = self.rng.sample(sorted(self.network.nodes), 2)
        self.happened[kind] += 1
        after_s = self.rng.uniform(0.2, 15.0)
        heals = self.rng.random() < 0.5
        match kind:
            case "kill":
                self.network.kill(one)
            case "stop":
                self.network.stop(one)
                if heals:
                    self.network.schedule(after_s, functools.partial(self.go_on, one))
            case "cut":
                self.network.cut(one, other)
                if heals:
                    self.network.schedule(after_s, functools.partial(self.network.heal, one, other))
            case "rot":
                self.network.nodes[one].rotten = True

    def go_on(self, name: str) -> None:
        self.network.go_on(name)
        for target in self.targets:
            if target.node.name == name:
                target.go_on()

    def run(self, faults_at: Mapping[int, int] = NO_FAULTS) -> int:
        """To the end of everything; before step n, `faults_at[n]` misfortunes. Returns the number of steps."""
        steps = 0
        while self.network.pending:
            assert steps < STEPS_MAX, "the run does not end"
            for _ in range(faults_at.get(steps, 0)):
                self.misfortune()
            self.network.step()
            steps += 1
        return steps

    def living(self) -> list[MemoryNode]:
        return [n for n in self.network.nodes.values() if n.alive and not n.stopped]

    def can_give(self, target: Target, chunk: Chunk) -> bool:
        """Whether somebody could send the chunk, if it were asked for."""
        return any(
            node.residency.has(chunk.segment, chunk.chunk)
            and self.network.reaches(node.name, target.node.name)
            for node in self.living()
            if not node.rotten
        )


def steps_to_completion(seed: int, synthetic: ModuleType) -> int:
    """How many steps the chain needs when nothing goes wrong: what follows is only idle ticks."""
    chain = Chain(seed, synthetic, faults=Faults())
    steps = 0
    while any(target.machine.phase is not Phase.COMPLETE for target in chain.targets):
        chain.network.step()
        steps += 1
    return steps


def check_end(chain: Chain) -> set[str]:
    """What is promised of every survivor; returns how they ended."""
    ends = set()
    for target in chain.targets:
        if target.node not in chain.living():
            continue
        assert target.settled_at <= END_DEADLINE_S
        if target.machine.phase is Phase.COMPLETE:
            ends.add("complete")
            assert chain.checkpoint.held_by(target.node.memories)
            assert sorted(target.segments) == list(range(len(chain.checkpoint.data)))
            assert [outcome.complete for outcome in target.outcomes] == [True]
        else:
            ends.add("stalled")
            assert target.machine.phase is Phase.STALLED
            assert target.driver.stall_reason
            assert target.outcomes == []
            assert not any(chain.can_give(target, chunk) for chunk in target.misses())
    return ends


def fault_run(seed: int, synthetic: ModuleType) -> tuple[Chain, set[str]]:
    """One run with one to four misfortunes at any step, and how its survivors ended."""
    chain = Chain(seed, synthetic)
    moments = random.Random(seed)
    steps = steps_to_completion(seed, synthetic)
    chain.run(Counter(moments.randrange(steps) for _ in range(moments.randrange(1, 5))))
    return chain, check_end(chain)


def test_chains_survive_what_a_network_does(synthetic: ModuleType) -> None:
    ends: list[set[str]] = []
    happened: Counter[str] = Counter()
    failures = 0
    for seed in range(SEEDS):
        try:
            chain, end = fault_run(seed, synthetic)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        ends.append(end)
        happened += chain.happened
        failures += sum(len(target.driver.failures) for target in chain.targets)
    # The runs are worth something only when both ends and every fault occur among them, many times.
    assert sum("complete" in end for end in ends) > SEEDS / 2
    assert sum("stalled" in end for end in ends) > SEEDS / 20
    assert failures > SEEDS
    assert all(happened[kind] > SEEDS / 4 for kind in ("kill", "stop", "cut", "rot"))


@pytest.mark.parametrize("seed", range(5))
def test_a_calm_chain_pipelines(synthetic: ModuleType, seed: int) -> None:
    """Without faults every target takes everything from its predecessor: a chain, not a star."""
    chain = Chain(1000 + seed, synthetic, faults=Faults(delay_s=(0.001, 0.01)))
    chain.run()
    assert check_end(chain) == {"complete"}
    for target in chain.targets:
        assert not target.driver.failures


def test_a_seed_reproduces_a_run(synthetic: ModuleType) -> None:
    def story(chain: Chain) -> list[Any]:
        return [(t.settled_at, t.machine.phase, tuple(t.driver.failures), t.segments) for t in chain.targets]

    assert story(fault_run(3, synthetic)[0]) == story(fault_run(3, synthetic)[0])
