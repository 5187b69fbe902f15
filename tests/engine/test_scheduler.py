"""The scheduler by itself, under arbitrary traffic: no page leaks, nobody starves, budgets hold.

What pages hold while they are shared is followed in test_scheduler_long.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercast_agent.engine.pages import PageAllocator
from layercast_agent.engine.scheduler import EngineLimits, Scheduler
from layercast_agent.engine.sequence import SamplingParams, Sequence
from layercast_agent.errors import NoCapacityError, RequestError, RequestTooLongError

LAYERS = 3
CONTEXT = 40


def make(name: str, *, prompt: int, output: int, arrived_at: float = 0.0, replayed: int = 0) -> Sequence:
    return Sequence(
        request_id=name,
        attempt=1,
        gateway_id="g",
        prompt=(1,) * (prompt - 1) + (ord(name[-1]),) if prompt else (),
        generated=[1] * replayed,
        sampling=SamplingParams(max_tokens=output),
        arrived_at=arrived_at,
    )


def scheduler(
    *, pages: int = 12, page_size: int = 4, prefix_caching: bool = True, **limits: int
) -> Scheduler:
    values = {"batch_size_max": 3, "step_tokens_max": 7, "waiting_max": 100, "context_length_max": CONTEXT}
    return Scheduler(
        pages=PageAllocator(pages),
        page_size=page_size,
        layers=LAYERS,
        limits=EngineLimits(**values | limits, prefix_caching=prefix_caching),
    )


@dataclass(slots=True)
class Simulation:
    """Executes plans like the engine does, with a marker where tensors would be, and checks after each move."""

    subject: Scheduler
    finished: list[str] = field(default_factory=list)
    steps: int = 0

    def step(self) -> None:
        before = {seq.request_id: seq.prefilling for seq in self.subject.running}
        works = self.subject.plan()
        self.steps += 1
        assert sum(work.count for work in works) <= self.subject.limits.step_tokens_max
        assert max(Counter(work.seq.request_id for work in works).values(), default=1) == 1
        decoding = {name for name, prefilling in before.items() if not prefilling}
        preempted = {seq.request_id for seq in self.subject.waiting}
        assert decoding - preempted <= {work.seq.request_id for work in works}, "a decode was left out"
        self.check()
        for work in works:
            assert work.count > 0
            assert len(work.seq.pages) * 4 >= work.stop, "work beyond the reserved pages"
            whole = work.first_layer == LAYERS
            assert work.start == (work.seq.prefix_length - 1 if whole else work.seq.computed)
            self.subject.advance(work)
            if work.seq.computed == work.seq.prefix_length:
                work.seq.generated.append(1)
            if work.seq.finish(CONTEXT) is not None:
                self.finished.append(work.seq.request_id)
                self.subject.remove(work.seq)
        self.check()

    def run_layer(self, place: int) -> None:
        able = [seq for seq in self.subject.waiting if seq.layers_done < LAYERS]
        if not able:
            return
        seq = able[place % len(able)]
        if seq.pages or self.subject.has_room(seq):
            self.subject.reserve(seq)
            hidden: Any = "hidden states"
            seq.hidden = hidden
            seq.layers_done += 1

    def check(self) -> None:
        everyone = (*self.subject.waiting, *self.subject.running)
        held = {page for seq in everyone for page in seq.pages}
        assert len(held) == self.subject.pages.used, "a page leaked"
        assert len(self.subject.running) <= self.subject.limits.running_max
        for queue in (self.subject.waiting, self.subject.running):
            assert [seq.order for seq in queue] == sorted(seq.order for seq in queue)


REQUESTS = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(0, 3), st.integers(0, 5)),
    min_size=1,
    max_size=12,
)
MOVES = st.lists(
    st.tuples(st.sampled_from(["add", "step", "layer", "cancel"]), st.integers(0, 11)), max_size=60
)


@given(requests=REQUESTS, moves=MOVES, budget=st.integers(1, 20), pages=st.integers(10, 30))
def test_any_traffic(
    requests: list[tuple[int, int, int, int]], moves: list[tuple[str, int]], budget: int, pages: int
) -> None:
    run = Simulation(scheduler(pages=pages, step_tokens_max=budget))
    queued = [
        make(f"r{i}", prompt=prompt, output=output, replayed=min(replayed, output - 1), arrived_at=arrived)
        for i, (prompt, output, replayed, arrived) in enumerate(requests)
    ]
    cancelled = set()
    for move, place in moves:
        if move == "add" and queued:
            run.subject.add(queued.pop())
        elif move == "step":
            run.step()
        elif move == "layer":
            run.run_layer(place)
        elif move == "cancel":
            everyone = (*run.subject.waiting, *run.subject.running)
            if everyone:
                cancelled.add(everyone[place % len(everyone)].request_id)
                run.subject.remove(everyone[place % len(everyone)])
        run.check()
    for seq in queued:
        run.subject.add(seq)
    while run.subject.waiting or run.subject.running:
        assert run.steps < 5000, "somebody starves"
        run.step()
    assert sorted(run.finished) == sorted({f"r{i}" for i in range(len(requests))} - cancelled)
    assert run.subject.pages.used == 0


def test_a_large_request_is_not_overtaken_for_ever() -> None:
    """Small ones keep coming; the large one runs as soon as those before it are done."""
    run = Simulation(scheduler(pages=10, batch_size_max=4, step_tokens_max=16))
    run.subject.add(make("first", prompt=4, output=8))
    run.step()
    run.subject.add(make("large", prompt=28, output=12, arrived_at=1))
    for index in range(40):
        run.subject.add(make(f"small-{index:02}", prompt=4, output=8, arrived_at=2 + index))
        run.step()
    assert run.finished.index("large") == 1


def test_layers_run_while_waiting_do_not_block_the_head() -> None:
    """Later requests hold pages that the head needs: they pass it, and their end makes room."""
    run = Simulation(scheduler(pages=10, step_tokens_max=16))
    early = make("early", prompt=30, output=8)
    late = [make(f"late-{index}", prompt=8, output=8, arrived_at=1 + index) for index in range(2)]
    for index, seq in enumerate(late):
        run.subject.add(seq)
        run.run_layer(index)
    assert all(seq.pages for seq in late)
    run.subject.add(early)
    while run.subject.waiting or run.subject.running:
        assert run.steps < 100
        run.step()
    assert run.finished[-1] == "early"


def test_room_is_kept_for_whoever_came_before() -> None:
    subject = scheduler(pages=10)
    subject.add(make("early", prompt=36, output=4))
    late = make("late", prompt=8, output=8, arrived_at=1)
    subject.add(late)
    assert not subject.has_room(late)
    assert subject.has_room(subject.waiting[0])


def test_decodes_come_before_prompts() -> None:
    subject = scheduler(pages=30, step_tokens_max=5)
    run = Simulation(subject)
    subject.add(make("decoding", prompt=3, output=9))
    run.step()
    subject.add(make("prompt", prompt=20, output=2, arrived_at=1))
    subject.add(make("next", prompt=20, output=2, arrived_at=2))
    works = [(work.seq.request_id, work.start, work.count) for work in subject.plan()]
    assert works == [("decoding", 3, 1), ("prompt", 0, 4)]


def test_only_the_head_is_missing() -> None:
    """All layers done: one token's worth of work, whatever the prompt's length."""
    subject = scheduler(pages=30, step_tokens_max=2)
    seq = make("r", prompt=20, output=2)
    subject.add(seq)
    subject.reserve(seq)
    seq.hidden, seq.layers_done = "hidden states", LAYERS  # type: ignore[assignment]
    (work,) = subject.plan()
    assert (work.start, work.count, work.first_layer, work.completes_prefix) == (19, 1, LAYERS, True)


def test_refusals() -> None:
    subject = scheduler(pages=8, waiting_max=2)
    with pytest.raises(RequestTooLongError, match="40 tokens"):
        subject.add(make("a", prompt=40, output=1))
    with pytest.raises(RequestTooLongError, match="9 KV pages; there are 8"):
        subject.add(make("b", prompt=30, output=5))
    with pytest.raises(RequestTooLongError, match="earlier attempts"):
        subject.add(make("c", prompt=30, output=20, replayed=11))
    with pytest.raises(RequestError, match="empty"):
        subject.add(make("d", prompt=0, output=5))
    with pytest.raises(RequestError, match="max_tokens"):
        subject.add(make("e", prompt=1, output=0))
    subject.add(make("f", prompt=1, output=1))
    with pytest.raises(RequestError, match="already"):
        subject.add(make("f", prompt=1, output=1))
    subject.add(make("g", prompt=1, output=1))
    with pytest.raises(NoCapacityError):
        subject.add(make("h", prompt=1, output=1))
    with pytest.raises(ValueError, match="at least 1"):
        scheduler(batch_size_max=0)


@given(
    st.lists(st.one_of(st.integers(1, 9), st.just(None)), max_size=40),
    st.integers(1, 20),
    st.randoms(use_true_random=False),
)
def test_pages(wanted: list[int | None], total: int, random: Any) -> None:
    allocator = PageAllocator(total)
    held: list[list[int]] = []
    for count in wanted:
        if count is None:
            if held:
                allocator.free(held.pop(random.randrange(len(held))))
        elif count > allocator.free_pages:
            with pytest.raises(NoCapacityError):
                allocator.allocate(count)
        else:
            held.append(allocator.allocate(count))
            assert len(held[-1]) == count
        everything = [page for pages in held for page in pages]
        assert sorted(everything) == sorted(set(everything) & set(range(total)))
        assert allocator.used == len(everything)


def test_pages_come_in_one_run_where_there_is_one() -> None:
    allocator = PageAllocator(10)
    first, second = allocator.allocate(3), allocator.allocate(2)
    assert allocator.allocate(4) == [5, 6, 7, 8]
    allocator.free(first)
    assert allocator.allocate(2) == [0, 1]
    assert allocator.allocate(2) == [2, 9]
    with pytest.raises(ValueError, match="page 10 is not in use"):
        allocator.free([10])
    allocator.free(second)
    with pytest.raises(ValueError, match="page 4 is not in use"):
        allocator.free(second)
    assert allocator.allocate(1, after=2) == [3]


def test_shared_pages_are_free_when_their_last_holder_goes() -> None:
    allocator = PageAllocator(4)
    first = allocator.allocate(2)
    allocator.remember(first[0], b"a")
    allocator.remember(first[1], b"ab")
    found = allocator.find([b"a", b"ab", b"abc"])
    assert found == first
    allocator.hold(found)
    allocator.free(first)
    assert (allocator.used, allocator.cached) == (2, 2)
    allocator.free(found)
    assert (allocator.used, allocator.free_pages, allocator.unheld(found)) == (0, 4, 2)
    with pytest.raises(ValueError, match="is not in use"):
        allocator.free(found)


def test_the_cache_makes_room_for_the_least_recently_used_last_page() -> None:
    allocator = PageAllocator(4)
    old, new = allocator.allocate(2), allocator.allocate(2)
    for page, key in zip((*old, *new), (b"a", b"ab", b"x", b"xy"), strict=True):
        allocator.remember(page, key)
    allocator.free(old)
    allocator.free(new)
    assert allocator.allocate(1) == [old[1]]
    assert allocator.find([b"a", b"ab"]) == [old[0]]
    assert allocator.find([b"x", b"xy"]) == new


@pytest.mark.parametrize(("prefix_caching", "hit"), [(True, 4), (False, 0)])
def test_equal_beginnings_are_shared_unless_that_is_off(prefix_caching: bool, hit: int) -> None:
    subject = scheduler(prefix_caching=prefix_caching)
    run = Simulation(subject)
    for name in ("a", "b"):
        subject.add(make(name, prompt=7, output=1))
        while name not in run.finished:
            run.step()
    assert subject.counts.prefix_tokens_hit == hit
