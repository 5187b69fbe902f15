"""What the scheduling model says that the same arrivals would have seen: the yardstick beside the measurement.

The model is that of BlitzScale, section 5.2: a request takes equal time in each layer, activations cost nothing, a
loading replica executes one layer at a time and the source takes over the earliest request whenever it is idle. Its
figures count one request at a time; for LLMs section 5.4 weights that by what a batch was measured to take. So here: a
complete replica runs steps, which have the decodes of its requests and prompt tokens up to the step's limit in order of
arrival (a prompt may be cut), and a first token comes at the end of its step. With a limit of one prompt and answers of
one token it is the paper's model (the golden values of tests/bench/test_live_model.py). Requests arrive when they
arrived in the run; the decision falls and layers arrive when they did. The choices are those that the workers make:
`live.next_quantum`; a step takes what `live.choose_take` would. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.live.arrivals import Arrival

from layercast_agent.live import LiveRequest, next_quantum


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What a complete replica computes at once: tokens and requests; `seconds(tokens)` is what such a step takes.

    Its tokens are sent after the part `answers_after` of it: a paced CPU device pauses for the rest.
    """

    tokens_max: int
    requests_max: int
    seconds: Callable[[float], float]
    answers_after: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One scale-up from one replica to `1 + targets`; seconds.

    Layer i of a target can be executed from `decided_at_s + first_layer_s + i * layer_load_s` on: along a chain they
    differ by a chunk only.
    """

    layers: int
    steps: Steps
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


def steps_of(
    *,
    tokens_max: int,
    requests_max: int,
    prompt_tokens: float,
    output_tokens: float,
    alone_s: float,
    between_s: float,
    capacity: float,
    answers_after: float = 1.0,
) -> Steps:
    """The time of a step by its tokens, straight between what was measured of a replica at rest.

    `between_s` is a step with one token, `alone_s` one with a prompt of `prompt_tokens`, and of full ones it takes so
    many that `capacity` requests with `output_tokens` each end in a second.
    """
    known = [(1.0, between_s)]
    if prompt_tokens < tokens_max:
        full_s = tokens_max / (prompt_tokens + output_tokens - 1) / capacity
        known += [(prompt_tokens, alone_s), (tokens_max, max(full_s, alone_s))]
    else:
        known += [(tokens_max, alone_s * tokens_max / prompt_tokens)]

    def seconds(tokens: float) -> float:
        upper = next((place for place in range(1, len(known)) if tokens <= known[place][0]), len(known) - 1)
        (x0, y0), (x1, y1) = known[upper - 1], known[upper]
        return max(between_s, y0 + (y1 - y0) * (tokens - x0) / (x1 - x0))

    return Steps(
        tokens_max=tokens_max, requests_max=requests_max, seconds=seconds, answers_after=answers_after
    )


def stop_the_world(asked: Sequence[Arrival], world: World) -> list[float]:
    """Time to first token of each request when the new replicas join complete."""
    return _Run(asked, world, live=False).run()


def live(asked: Sequence[Arrival], world: World) -> list[float]:
    """... when the new replicas execute what they have, and requests go between all of them by handoff."""
    return _Run(asked, world, live=True).run()


@dataclass(slots=True, kw_only=True)
class _Request:
    """`left` of its prompt's tokens are to be computed, through the layers from `layers_done` on."""

    index: int
    asked: Arrival
    left: int
    layers_done: int = 0
    tokens: int = 0

    @property
    def seen(self) -> LiveRequest:
        """What the choices see of it."""
        return LiveRequest(
            request_id=f"{self.index:09d}",
            arrived_at=self.asked.at_s,
            layers_done=self.layers_done,
            tokens=self.asked.prompt_tokens,
        )


@dataclass(slots=True, kw_only=True)
class _Replica:
    """Busy until `free_s` with a step of `running` requests, or with one layer of the requests in `quantum`."""

    complete_at_s: float
    began_s: float = 0.0
    free_s: float = 0.0
    busy: bool = False
    running: list[_Request] = field(default_factory=list)
    computed: list[tuple[_Request, int]] = field(default_factory=list)
    quantum: list[_Request] = field(default_factory=list)


class _Run:
    """From event to event over one queue, which all replicas share."""

    def __init__(self, asked: Sequence[Arrival], world: World, *, live: bool) -> None:
        self._asked = sorted(asked, key=lambda each: each.at_s)
        self._world = world
        self._live = live
        self._queue: list[_Request] = []
        self._first: dict[int, float] = {}
        self._next = 0
        new = (_Replica(complete_at_s=world.complete_at_s) for _ in range(world.targets))
        self._replicas = [_Replica(complete_at_s=-math.inf), *new]

    def run(self) -> list[float]:
        now = 0.0
        while len(self._first) < len(self._asked):
            self._arrive(now)
            for replica in self._replicas:
                if replica.busy and replica.free_s <= now:
                    self._end(replica, now)
            for replica in self._replicas:  # the source first, as in the paper's example
                if not replica.busy:
                    self._begin(replica, now)
            now = self._after(now)
        return [self._first[index] - each.at_s for index, each in enumerate(self._asked)]

    def _arrive(self, now: float) -> None:
        while self._next < len(self._asked) and self._asked[self._next].at_s <= now:
            asked = self._asked[self._next]
            self._queue.append(_Request(index=self._next, asked=asked, left=asked.prompt_tokens))
            self._next += 1

    def _begin(self, replica: _Replica, now: float) -> None:
        if replica.complete_at_s <= now:
            self._begin_step(replica, now)
        elif self._live and now >= self._world.decided_at_s:
            self._begin_quantum(replica, now)

    def _begin_step(self, replica: _Replica, now: float) -> None:
        world, steps = self._world, self._world.steps
        decodes = sum(1 for each in replica.running if not each.left)
        budget, work = steps.tokens_max - decodes, float(decodes)
        while len(replica.running) < steps.requests_max and self._queue:
            if sum(each.left for each in replica.running) >= budget:
                break
            earliest = min(self._queue, key=lambda each: each.index)
            self._queue.remove(earliest)
            replica.running.append(earliest)
        for request in sorted(replica.running, key=lambda each: each.index):
            count = min(request.left, budget)
            if count:
                budget -= count
                # All layers done: only the head is missing, for the last token.
                work += max(1.0, count * (1 - request.layers_done / world.layers))
                replica.computed.append((request, count))
        if replica.running:
            replica.busy, replica.began_s, replica.free_s = True, now, now + steps.seconds(work)

    def _begin_quantum(self, replica: _Replica, now: float) -> None:
        world, queue = self._world, {each.seen: each for each in self._queue}
        quantum = next_quantum(
            queue,
            layers=world.layers,
            resident=lambda layer: world.resident(layer, now),
            tokens_max=world.steps.tokens_max,
        )
        if not quantum:
            return
        replica.quantum = [queue[each] for each in quantum]
        for request in replica.quantum:
            self._queue.remove(request)
        tokens = sum(each.asked.prompt_tokens for each in replica.quantum)
        replica.busy, replica.free_s = True, now + world.steps.seconds(tokens) / world.layers

    def _end(self, replica: _Replica, now: float) -> None:
        replica.busy = False
        for request in replica.quantum:
            request.layers_done += 1
        self._queue += replica.quantum
        replica.quantum = []
        for request in replica.running:
            request.tokens += not request.left
        for request, count in replica.computed:
            request.left -= count
            if not request.left:
                request.tokens = 1
                paced = self._world.steps.answers_after
                self._first[request.index] = replica.began_s + paced * (now - replica.began_s)
        replica.computed = []
        replica.running = [each for each in replica.running if each.tokens < each.asked.output_tokens]

    def _after(self, now: float) -> float:
        """The next moment at which anything can change."""
        world = self._world
        times = [replica.free_s for replica in self._replicas if replica.busy]
        times += [replica.complete_at_s for replica in self._replicas]
        if self._next < len(self._asked):
            times.append(self._asked[self._next].at_s)
        first = world.decided_at_s + world.first_layer_s
        passed = max(0, int((now - first) / world.layer_load_s) + 1) if now >= first else 0
        if passed < world.layers:
            times.append(first + passed * world.layer_load_s)
        later = [each for each in times if each > now]
        return min(later) if later else math.nextafter(now, math.inf)
