"""A scale-up under load: live against stop-the-world, with the target's parameters arriving at a paced rate.

There is one GPU and there are two replicas, so this runs in simulated time with measured work: every step, layer,
export and import is executed, alone on the GPU, and its measured duration moves the clock of the replica that did it;
parameters and handed-over states arrive after their bytes at the link's rate. What is executed is real: the target's
parameters are what was copied into its regions so far, states go through `export_state` and `import_state`, the
choices are `live`'s, and the tokens must be those of the source alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from bench.gpu.part import (
    Figures,
    Setting,
    engine_of,
    main,
    random_memories,
    request,
    segments_of,
    synchronize,
    views,
)

from layercast_agent import live
from layercast_agent.device import DeviceMemory
from layercast_agent.engine.cuda import CudaModel
from layercast_agent.engine.engine import Engine
from layercast_agent.engine.model import LayeredModel, build_model, shape_of
from layercast_agent.engine.sequence import Sequence, TokenEvent
from layercast_agent.layout import SegmentSpec
from layercast_agent.worker.engine_loop import live_request

EQUAL_MIN = 0.9
STRATEGIES = (live.Strategy.NONE, live.Strategy.STOP_THE_WORLD, live.Strategy.LIVE)


@dataclass(slots=True, kw_only=True)
class Replica:
    """An engine and the time until which it is busy."""

    engine: Engine
    free_at: float = 0.0

    @property
    def idle(self) -> bool:
        return not self.engine.waiting and not self.engine.running


@dataclass(slots=True, kw_only=True)
class Run:
    """One scale-up. Times are simulated seconds since its start; `arrives` is by segment."""

    strategy: live.Strategy
    device: torch.device
    bytes_per_s: float
    source: Replica
    target: Replica
    queue: list[Sequence]
    arrives: dict[int, float]
    land: Callable[[int], None]
    landed: set[int] = field(default_factory=set)
    first: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    helped: dict[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.landed) == len(self.arrives)

    def until_done(self, total: int) -> None:
        """Lets whoever is free first act, until every request has its token."""
        while len(self.tokens) < total:
            on_source = self.source.free_at <= self.target.free_at
            replica = self.source if on_source else self.target
            self._arrive(replica.free_at)
            acted = self._source() if on_source else self._target()
            if not acted:
                other = self.target if on_source else self.source
                later = [t for t in (other.free_at, *self.arrives.values()) if t > replica.free_at]
                replica.free_at = min(later, default=replica.free_at + 1e-3)

    def _arrive(self, now: float) -> None:
        for segment, at in self.arrives.items():
            if at <= now and segment not in self.landed:
                self.land(segment)
                self.landed.add(segment)

    def _timed(self, replica: Replica, function: Callable[..., Any], *arguments: object) -> Any:
        synchronize(self.device)
        started = time.perf_counter()
        result = function(*arguments)
        synchronize(self.device)
        replica.free_at += time.perf_counter() - started
        return result

    def _step(self, replica: Replica) -> None:
        events: list[TokenEvent] = self._timed(replica, replica.engine.step)
        for event in events:
            self.first[event.request_id] = replica.free_at
            self.tokens[event.request_id] = event.token_id
            if replica is self.target:
                self.helped[event.request_id] = replica.engine.model.shape.layers

    def _source(self) -> bool:
        if self.source.idle:
            mine = {seq.request_id: seq for seq in self.target.engine.waiting}
            both = {seq.request_id: seq for seq in self.queue} | mine
            complete = self.complete and self.strategy is live.Strategy.LIVE
            chosen = live.choose_take(map(live_request, both.values()), giver_complete=complete)
            if chosen is None:
                return False
            self._take(both[chosen.request_id], at_target=chosen.request_id in mine)
        self._step(self.source)
        return True

    def _take(self, seq: Sequence, *, at_target: bool) -> None:
        """Into the source, with the layers that the target has run."""
        own = request(seq.request_id, 1, 1, vocabulary=2, seed=0, arrived_at=seq.arrived_at)
        own.prompt = seq.prompt
        if not at_target:
            self.queue.remove(seq)
            self.source.engine.add(own)
            return
        # A layer that the target is in the middle of is waited for.
        self.source.free_at = max(self.source.free_at, self.target.free_at)
        layers_done = seq.layers_done
        self.source.engine.add(own)
        state = self._timed(self.source, self.target.engine.export_state, seq)
        self.source.free_at += state.numel() / self.bytes_per_s
        self._timed(self.source, self.source.engine.import_state, own, layers_done, state.numpy().data)
        self.target.engine.release(seq)
        self.helped[seq.request_id] = layers_done

    def _target(self) -> bool:
        engine = self.target.engine
        if self.complete and self.strategy is not live.Strategy.NONE:
            if self.target.idle and self.queue:
                engine.add(self.queue.pop(0))
            if self.target.idle:
                return False
            self._step(self.target)
            return True
        return self.strategy is live.Strategy.LIVE and self._quantum(engine)

    def _quantum(self, engine: Engine) -> bool:
        able = {seq.request_id: seq for seq in engine.waiting}
        able |= {seq.request_id: seq for seq in self.queue if engine.has_room(seq)}
        queue = [live_request(seq) for seq in able.values()]
        quantum = live.next_quantum(
            queue,
            layers=engine.model.shape.layers,
            resident=lambda layer: layer + 1 in self.landed,
            tokens_max=engine.limits.step_tokens_max,
        )
        if not quantum:
            return False
        seqs = [able[each.request_id] for each in quantum]
        for seq in seqs:
            if seq in self.queue:
                self.queue.remove(seq)
                # Offered by the source, with its embeddings.
                self._timed(self.target, self.source.engine.embed, seq)
                engine.add(seq)
        self._timed(self.target, engine.run_layer, *seqs)
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What all runs share: the source's model and parameters, and the target's regions."""

    setting: Setting
    source: LayeredModel
    segments: tuple[SegmentSpec, ...]
    memories: list[torch.Tensor]
    regions: list[DeviceMemory]
    requests: int
    length: int

    def run(self, strategy: live.Strategy, gbit_per_s: float) -> Run:
        """One scale-up at that rate, from all requests waiting to the last token."""
        target = self.target()
        order = list(range(len(self.segments)))
        if strategy is live.Strategy.LIVE:
            order = [*order[1:-1], 0, order[-1]]  # layers first: decision 3
        arrives, sent = {}, 0
        for index in order:
            sent += self.segments[index].nbytes
            arrives[index] = sent / (gbit_per_s / 8 * 1e9)

        def land(index: int) -> None:
            memory = self.regions[index].tensor
            memory.copy_(self.memories[index])
            target.attach(views(self.segments[index], memory, target.shape.dtype))

        vocabulary = self.source.shape.vocab_size
        run = Run(
            strategy=strategy,
            device=self.setting.device,
            bytes_per_s=gbit_per_s / 8 * 1e9,
            source=Replica(engine=self._engine(self.source)),
            target=Replica(engine=self._engine(target)),
            queue=[
                request(f"{i:03d}", self.length, 1, vocabulary=vocabulary, seed=i, arrived_at=i / 1e6)
                for i in range(self.requests)
            ],
            arrives=arrives,
            land=land,
        )
        run.until_done(self.requests)
        return run

    def target(self) -> LayeredModel:
        """A model as a warm worker has it when the load begins: built, its kernels compiled."""
        model = build_model(config=self.setting.config(), shape=self.source.shape, device=self.setting.device)
        if isinstance(model, CudaModel):
            model.prepare()
        return model

    def _engine(self, model: LayeredModel) -> Engine:
        return engine_of(model, positions=12 * (self.length + 16), batch_size=4, step_tokens=self.length)


def measure(setting: Setting) -> Figures:
    """First tokens and duration at each rate and strategy."""
    config = setting.config()
    source = build_model(config=config, shape=shape_of(config, "bfloat16"), device=setting.device)
    segments = segments_of(source)
    memories = random_memories(source, segments)
    for segment, memory in zip(segments, memories, strict=True):
        source.attach(views(segment, memory, source.shape.dtype))
    world = World(
        setting=setting,
        source=source,
        segments=segments,
        memories=memories,
        regions=[DeviceMemory(segment.nbytes, setting.device) for segment in segments],
        requests=setting.choose(full=48, shake=24, small=4),
        length=2048 if not setting.small else 48,
    )
    figures: Figures = {}
    world.run(live.Strategy.NONE, 400.0)  # warms up
    alone = world.run(live.Strategy.NONE, 400.0)
    figures["alone_ttft_mean_s"] = statistics.mean(alone.first.values())
    # On a CPU the tiny model computes slower than any network brings it.
    for gbit in (100.0, 200.0, 400.0) if not setting.small else (0.01,):
        for strategy in STRATEGIES[1:]:
            figures |= _figures(world.run(strategy, gbit), alone, f"{strategy.value}_{gbit:g}g")
    return figures


def _figures(run: Run, alone: Run, name: str) -> Figures:
    # In bf16 a batch of another shape rounds differently, and random parameters make near ties.
    equal = sum(run.tokens[key] == token for key, token in alone.tokens.items()) / len(alone.tokens)
    if equal < EQUAL_MIN:
        raise SystemExit(f"{name}: only {equal:.0%} of the tokens are those of one replica")
    times = sorted(run.first.values())
    loaded = max(run.arrives.values())
    helped = {key: run.first[key] for key, layers in run.helped.items() if layers > 0}
    layers = run.source.engine.model.shape.layers
    shares = [f"{run.helped.get(key, 0)}" for key in sorted(run.first)]
    print(
        f"{name}: load {loaded:.3f} s, layers of each request by the target ({layers} in all): {' '.join(shares)}"
    )
    figures: Figures = {
        f"{name}_ttft_mean_s": statistics.mean(times),
        f"{name}_ttft_p95_s": times[int(0.95 * (len(times) - 1))],
        f"{name}_all_s": times[-1],
        f"{name}_tokens_equal": equal,
    }
    if helped:
        figures[f"{name}_target_first_token_of_load"] = min(helped.values()) / loaded
    return figures


if __name__ == "__main__":
    main(measure)
