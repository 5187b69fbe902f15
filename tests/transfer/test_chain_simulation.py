"""Whole chains in virtual time: real machines, residency and memory; a network that delays, reorders,
corrupts, kills and stops. A seed reproduces a run.

After every step: no more than a window in flight at any target, and every chunk that is marked holds the
right bytes. At the end every survivor is complete and equal, or stalled with a reason while no living node
has what it misses.
"""

from __future__ import annotations

import functools
import random
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

SEEDS = 150
LIMITS = TransferLimits(window_chunks=3, attempts_max=6)
TICK_S = 0.1
LAST_S = 120.0


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
        manifest = checkpoint.manifest
        self.machine = Transfer(
            chunk_counts=[manifest.chunk_count(s.index) for s in manifest.segments],
            segment_order=segment_order,
            upstreams=[UpstreamSpec(peer_id=name) for name in upstreams],
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
        if not self.node.alive or self.node.stopped:
            return
        self.driver.handle(event, self.network.now)
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

    def misses(self) -> set[Chunk]:
        manifest = self.checkpoint.manifest
        return {
            Chunk(segment=s.index, chunk=c)
            for s in manifest.segments
            for c in range(manifest.chunk_count(s.index))
            if not self.node.residency.has(s.index, c)
        }


class Chain:
    """A source A and 1-4 targets behind it, each fed by its predecessor, with the others as substitutes."""

    def __init__(self, seed: int, synthetic: ModuleType) -> None:
        self.rng = random.Random(seed)
        worst_s = self.rng.choice([0.005, 0.05, 0.4])
        self.network = MemoryNetwork(
            rng=self.rng,
            faults=Faults(delay_s=(0.001, worst_s), corrupt=self.rng.choice([0.0, 0.0, 0.02, 0.1])),
        )
        sizes = [self.rng.randrange(1, 200) for _ in range(self.rng.randrange(3, 7))]
        self.checkpoint = synthetic.make(sizes, chunk_bytes=32, seed=seed)
        names = "ABCDE"[: self.rng.randrange(2, 6)]
        self.add_node("A", complete=True)
        for name in names[1:]:
            self.add_node(name, complete=False)
        self.targets = [self.target(names, index) for index in range(1, len(names))]

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

    def misfortunes(self) -> None:
        """Deaths and stops at random moments, of anybody, the source too."""
        for name in self.network.nodes:
            fate = self.rng.random()
            at_s = self.rng.uniform(0.0, 1.5)
            if fate < 0.25:
                self.network.schedule(at_s, functools.partial(self.network.kill, name))
            elif fate < 0.35:
                self.network.schedule(at_s, functools.partial(self.stop, name))

    def stop(self, name: str) -> None:
        self.network.nodes[name].stopped = True

    def run(self) -> None:
        while self.network.pending:
            self.network.step()

    def living(self) -> list[MemoryNode]:
        return [n for n in self.network.nodes.values() if n.alive and not n.stopped]

    def held_somewhere(self, chunk: Chunk) -> bool:
        return any(node.residency.has(chunk.segment, chunk.chunk) for node in self.living())


def check_end(chain: Chain) -> set[str]:
    """What is promised of every survivor; returns how they ended."""
    ends = set()
    for target in chain.targets:
        if target.node not in chain.living():
            continue
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
            assert not any(chain.held_somewhere(chunk) for chunk in target.misses())
    return ends


def test_chains_survive_what_a_network_does(synthetic: ModuleType) -> None:
    ends: list[set[str]] = []
    failures = 0
    for seed in range(SEEDS):
        chain = Chain(seed, synthetic)
        chain.misfortunes()
        chain.run()
        try:
            ends.append(check_end(chain))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
        failures += sum(len(target.driver.failures) for target in chain.targets)
    # The runs are worth something only when both ends and many faults occur among them.
    assert sum("complete" in end for end in ends) > SEEDS / 2
    assert any("stalled" in end for end in ends)
    assert failures > SEEDS


@pytest.mark.parametrize("seed", range(5))
def test_a_calm_chain_pipelines(synthetic: ModuleType, seed: int) -> None:
    """Without faults every target takes everything from its predecessor: a chain, not a star."""
    chain = Chain(1000 + seed, synthetic)
    chain.network.faults = Faults(delay_s=(0.001, 0.01))
    chain.run()
    assert check_end(chain) == {"complete"}
    for target in chain.targets:
        assert not target.driver.failures
