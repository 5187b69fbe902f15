"""Live scale-up: who executes which layer of which request while parameters arrive.

This is ZigZag in its ILP-free form (BlitzScale, OSDI'25, section 5.2 and figure 16). Two loops share one
queue, which lives at the target, the replica that is still loading:

* the target runs exactly one layer at a time: of the earliest request whose next layer is resident, and, as a layer's
  parameters are read once for all, of others that wait for the same layer, as many as a step computes;
* the source, a complete and overloaded replica, takes the earliest request whenever it is idle, with the
  layers done so far, and runs the rest; where a step computes several prompts, as many as the next one does
  (docs/adr/0030).

Requests therefore wait and gather layers at the target instead of being pushed, half done, to a busy source:
the longer the wait, the more of the work is already done. Naive best-effort (always hand over after the
resident layers) keeps the source the bottleneck and can be slower than not executing at all while loading.

The two choices below are all there is to it. They are pure: the worker asks them with its real queue, and
`simulate` asks the same functions in a toy world, whose completion times are the unit test's golden values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRequest:
    """What the choice depends on. `tokens` of its prefix; 0 where that plays no part."""

    request_id: str
    arrived_at: float
    layers_done: int
    tokens: int = 0


def _order(request: LiveRequest) -> tuple[float, str]:
    return (request.arrived_at, request.request_id)


def choose_quantum(
    queue: Iterable[LiveRequest], *, layers: int, resident: Callable[[int], bool]
) -> LiveRequest | None:
    """The target's loop: the request of which one layer runs next.

    `resident(layer)` says whether a layer can be executed. A request that has all `layers` waits for the head
    and is nobody's quantum. None when no resident layer is of use to anyone.
    """
    ready = (r for r in queue if r.layers_done < layers and resident(r.layers_done))
    return min(ready, key=_order, default=None)


def join_quantum(chosen: LiveRequest, queue: Iterable[LiveRequest], *, tokens_max: int) -> list[LiveRequest]:
    """Whose same layer runs in one go with the chosen request's: earliest first, at most `tokens_max` tokens in all.

    The chosen one is the first, however long it is. The paper's quantum is one layer of one batch, too: its parameters
    are read once, so several short prompts cost less together than one after the other.
    """
    joined, tokens = [chosen], chosen.tokens
    for request in sorted(queue, key=_order):
        if request == chosen or request.layers_done != chosen.layers_done:
            continue
        if tokens + request.tokens > tokens_max:
            break
        joined.append(request)
        tokens += request.tokens
    return joined


def next_quantum(
    queue: Collection[LiveRequest], *, layers: int, resident: Callable[[int], bool], tokens_max: int
) -> list[LiveRequest]:
    """The requests of which the target runs one layer next; none when no resident layer is of use to anyone."""
    chosen = choose_quantum(queue, layers=layers, resident=resident)
    return [] if chosen is None else join_quantum(chosen, queue, tokens_max=tokens_max)


def choose_take(queue: Iterable[LiveRequest], *, giver_complete: bool) -> LiveRequest | None:
    """The source's loop: the request that it takes over when idle.

    A complete giver keeps its head, which it can finish by itself as soon as anybody could, and lets the
    others be taken: that is how the two leave cooperation. None when nothing may be taken.
    """
    waiting = sorted(queue, key=_order)
    if giver_complete:
        waiting = waiting[1:]
    return waiting[0] if waiting else None


class Strategy(Enum):
    """How a second replica helps the first; the last is the one that is built."""

    NONE = "none"
    STOP_THE_WORLD = "stop-the-world"
    BEST_EFFORT = "best-effort"
    LIVE = "live"


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """When a request ended, in layer-times, and how its layers were split."""

    at: int
    target_layers: int
    source_layers: int


def simulate(*, layers: int, layer_load_time: int, requests: int, strategy: Strategy) -> list[Completion]:
    """Completion of `requests` equal requests that all wait at time 0, when the first layer is resident.

    Time is counted in executions of one layer of one request; one further layer arrives every
    `layer_load_time` of them. This is the toy model behind the golden values of the design: pairing is kept
    for the whole set, activations cost nothing, and where both act at the same moment the source acts first.
    """
    match strategy:
        case Strategy.NONE:
            return _simulate_servers(layers=layers, requests=requests, second_from=None)
        case Strategy.STOP_THE_WORLD:
            loaded_at = (layers - 1) * layer_load_time
            return _simulate_servers(layers=layers, requests=requests, second_from=loaded_at)
        case Strategy.BEST_EFFORT:
            return _simulate_best_effort(layers=layers, layer_load_time=layer_load_time, requests=requests)
        case Strategy.LIVE:
            return _simulate_live(layers=layers, layer_load_time=layer_load_time, requests=requests)


def _simulate_servers(*, layers: int, requests: int, second_from: int | None) -> list[Completion]:
    """First come, first served on one replica, or on two once the second is complete."""
    free_at = [0] if second_from is None else [0, second_from]
    done = []
    for _ in range(requests):
        server = min(range(len(free_at)), key=free_at.__getitem__)
        free_at[server] += layers
        on_target = server == 1
        done.append(
            Completion(
                at=free_at[server],
                target_layers=layers if on_target else 0,
                source_layers=0 if on_target else layers,
            )
        )
    return done


def _simulate_best_effort(*, layers: int, layer_load_time: int, requests: int) -> list[Completion]:
    """Hand over after what is resident, at most half of the layers: what not to do."""
    target_free = source_free = 0
    done = []
    for _ in range(requests):
        resident = min(layers, 1 + target_free // layer_load_time)
        part = min(resident, layers // 2)
        target_free += part
        source_free = max(source_free, target_free) + layers - part
        done.append(Completion(at=source_free, target_layers=part, source_layers=layers - part))
    return done


def _simulate_live(*, layers: int, layer_load_time: int, requests: int) -> list[Completion]:
    """Both loops, tick by tick, with the very choices of the worker."""
    queue = [LiveRequest(request_id=f"{i:06d}", arrived_at=0.0, layers_done=0) for i in range(requests)]
    done: dict[str, Completion] = {}
    source_free_at = 0
    now = 0
    while queue:
        resident_layers = min(layers, 1 + now // layer_load_time)
        if source_free_at <= now:
            taken = choose_take(queue, giver_complete=False)
            if taken is not None:
                queue.remove(taken)
                left = layers - taken.layers_done
                source_free_at = now + left
                done[taken.request_id] = Completion(
                    at=source_free_at, target_layers=taken.layers_done, source_layers=left
                )
        _run_quantum(queue, layers=layers, resident_layers=resident_layers)
        now += 1
        for finished in [r for r in queue if r.layers_done == layers]:
            queue.remove(finished)
            done[finished.request_id] = Completion(at=now, target_layers=layers, source_layers=0)
    return [done[key] for key in sorted(done)]


def _run_quantum(queue: list[LiveRequest], *, layers: int, resident_layers: int) -> None:
    chosen = choose_quantum(queue, layers=layers, resident=lambda layer: layer < resident_layers)
    if chosen is not None:
        queue[queue.index(chosen)] = replace(chosen, layers_done=chosen.layers_done + 1)


def mean_completion(completions: Sequence[Completion]) -> float:
    """Mean completion time in layer-times."""
    return sum(c.at for c in completions) / len(completions)
