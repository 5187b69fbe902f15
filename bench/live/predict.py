"""What the scheduling model says that the same arrivals would have seen: the yardstick beside the measurement.

The model is that of BlitzScale, section 5.2 (`reference` of the golden values in tests/live): a replica executes one
layer of one request at a time, a request takes equal time in each layer, activations cost nothing. Requests arrive
when they arrived in the run; the decision falls and layers arrive when they did. The choices are those that the
workers make: `live.choose_quantum` and `live.choose_take`. Pure.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

from layercast_agent.live import LiveRequest, choose_quantum, choose_take


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One scale-up from one replica to `1 + targets`; seconds.

    `service_s` is what one request costs one replica in all its layers. Layer i of a target can be executed from
    `decided_at_s + first_layer_s + i * layer_load_s` on: along a chain they differ by a chunk only.
    """

    layers: int
    service_s: float
    decided_at_s: float
    first_layer_s: float
    layer_load_s: float
    targets: int = 1

    def resident(self, layer: int, now: float) -> bool:
        """Whether the target can execute that layer."""
        return now >= self.decided_at_s + self.first_layer_s + layer * self.layer_load_s

    @property
    def complete_at_s(self) -> float:
        """When the target has its last layer."""
        return self.decided_at_s + self.first_layer_s + (self.layers - 1) * self.layer_load_s


def stop_the_world(arrivals: Sequence[float], world: World) -> list[float]:
    """Time to first token of each arrival when the new replicas join complete."""
    free = [(0.0, 0), *((world.complete_at_s, 1 + target) for target in range(world.targets))]
    heapq.heapify(free)
    waits = []
    for at in arrivals:
        ready, server = heapq.heappop(free)
        done = max(at, ready) + world.service_s
        heapq.heappush(free, (done, server))
        waits.append(done - at)
    return waits


def live(arrivals: Sequence[float], world: World) -> list[float]:
    """... when the new replicas execute what they have, and requests go between all of them by handoff."""
    return _Live(arrivals, world).run()


class _Live:
    """Loops over one queue, the source's and one for each target, from event to event."""

    def __init__(self, arrivals: Sequence[float], world: World) -> None:
        self._arrivals = arrivals
        self._world = world
        self._layer_s = world.service_s / world.layers
        self._queue: list[LiveRequest] = []
        self._done: dict[int, float] = {}
        self._next = 0
        self._source_free = 0.0
        self._target_free = [0.0] * world.targets
        self._running: list[LiveRequest | None] = [None] * world.targets

    def run(self) -> list[float]:
        now = 0.0
        while len(self._done) < len(self._arrivals):
            self._arrive(now)
            for target in range(self._world.targets):
                self._end_quantum(target, now)
            self._source_takes(now)
            for target in range(self._world.targets):
                self._target_runs(target, now)
            now = self._after(now)
        return [self._done[index] - at for index, at in enumerate(self._arrivals)]

    def _arrive(self, now: float) -> None:
        while self._next < len(self._arrivals) and self._arrivals[self._next] <= now:
            at = self._arrivals[self._next]
            self._queue.append(LiveRequest(request_id=f"{self._next:09d}", arrived_at=at, layers_done=0))
            self._next += 1

    def _end_quantum(self, target: int, now: float) -> None:
        running = self._running[target]
        if running is None or self._target_free[target] > now:
            return
        self._running[target] = None
        ended = replace(running, layers_done=running.layers_done + 1)
        if ended.layers_done == self._world.layers:
            self._done[int(ended.request_id)] = now
        else:
            self._queue.append(ended)

    def _source_takes(self, now: float) -> None:
        if self._source_free > now:
            return
        taken = choose_take(self._queue, giver_complete=False)
        if taken is None:
            return
        self._queue.remove(taken)
        self._source_free = now + (self._world.layers - taken.layers_done) * self._layer_s
        self._done[int(taken.request_id)] = self._source_free

    def _target_runs(self, target: int, now: float) -> None:
        if self._running[target] is not None:
            return
        world = self._world
        chosen = choose_quantum(
            self._queue, layers=world.layers, resident=lambda layer: world.resident(layer, now)
        )
        if chosen is not None:
            self._queue.remove(chosen)
            self._running[target], self._target_free[target] = chosen, now + self._layer_s

    def _after(self, now: float) -> float:
        """The next moment at which anything can change."""
        times = [self._source_free]
        times += [free for free, run in zip(self._target_free, self._running, strict=True) if run is not None]
        if self._next < len(self._arrivals):
            times.append(self._arrivals[self._next])
        world = self._world
        first = world.decided_at_s + world.first_layer_s
        passed = max(0, int((now - first) / world.layer_load_s) + 1) if now >= first else 0
        if passed < world.layers:
            times.append(first + passed * world.layer_load_s)
        later = [each for each in times if each > now]
        return min(later) if later else now + self._layer_s
