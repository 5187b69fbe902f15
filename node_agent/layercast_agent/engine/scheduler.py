"""Which tokens of which requests the next step computes: decisions over plain values, no torch.

The rules, all of them:
* service is in order of arrival at the gateway;
* running requests that decode get their token first, then prompts get what is left of the step's token budget, in
  chunks, earliest first (chunked prefill: Sarathi-Serve, OSDI'24, section 4);
* a request is admitted with the pages of all its known tokens, and only where every running one can still take a page
  more; pages that hold the same tokens from the start are shared, not computed again (vLLM, SOSP'23, section 4.4);
* a request that needs a page when none is free takes it from whoever arrived last: that one forgets its KV, keeps its
  tokens and computes them again when there is room. The earliest request is never the last, so it always proceeds;
* a request without pages that does not fit blocks those behind it that have none either, so a large request is not
  overtaken for ever. Those that hold theirs already (layers were run while they waited, or a handoff brought them)
  pass: they need nothing more to begin, and their end is what frees room.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from layercast_agent.engine.pages import PageAllocator
from layercast_agent.engine.prefix import PrefixKeys
from layercast_agent.engine.sequence import Sequence
from layercast_agent.errors import NoCapacityError, RequestError, RequestTooLongError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What bounds an engine.

    `batch_size_max`: requests that run at once. `step_tokens_max`: tokens that one step computes, over all
    requests. `waiting_max`: requests that wait. `context_length_max`: tokens of a prompt and its output.
    `prefix_caching`: whether requests share pages of equal beginnings.
    """

    batch_size_max: int
    step_tokens_max: int
    waiting_max: int
    context_length_max: int
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        if min(self.batch_size_max, self.step_tokens_max, self.waiting_max, self.context_length_max) < 1:
            raise ValueError(f"every limit is at least 1: {self}")

    @property
    def running_max(self) -> int:
        """Every running request gets a token in every step, so there are no more than a step has tokens."""
        return min(self.batch_size_max, self.step_tokens_max)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Part of one step: prefix positions [start, start + count) of a request through layers [first_layer, L).

    `first_layer` is L when only the head is missing; `count` is 1 then and `start` the last position.
    """

    seq: Sequence
    start: int
    count: int
    first_layer: int

    @property
    def stop(self) -> int:
        """First position after the chunk."""
        return self.start + self.count

    @property
    def completes_prefix(self) -> bool:
        """The chunk ends with the last known token, so the next token can be chosen."""
        return self.stop == self.seq.prefix_length


@dataclass(slots=True, kw_only=True)
class Counts:
    """Since the start: tokens of admitted prefixes, those found in the cache, and requests that lost their pages."""

    prefix_tokens_asked: int = 0
    prefix_tokens_hit: int = 0
    preemptions: int = 0


class Scheduler:
    """The queue, the batch and the pages of one engine. `key` names the model whose KV the pages hold."""

    def __init__(
        self, *, pages: PageAllocator, page_size: int, layers: int, limits: EngineLimits, key: str = ""
    ) -> None:
        self.pages = pages
        self.limits = limits
        self.counts = Counts()
        self._page_size = page_size
        self._layers = layers
        self._keys = PrefixKeys(page_size=page_size, model=key)
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Requests that no step works on, by arrival; some may have gathered layers, some lost their pages."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Requests that steps work on, by arrival."""
        return tuple(self._running)

    def pages_wanted(self, seq: Sequence) -> int:
        """Pages that hold all known tokens of a request."""
        return -(-seq.prefix_length // self._page_size)

    def check(self, seq: Sequence) -> None:
        """Raises RequestTooLongError for a request that could not be served even alone, RequestError for nonsense."""
        if not seq.prompt:
            raise RequestError("the prompt is empty")
        if seq.sampling.max_tokens < 1:
            raise RequestError("max_tokens is 0")
        if len(seq.prompt) >= self.limits.context_length_max:
            raise RequestTooLongError(
                f"the prompt has {len(seq.prompt)} tokens; prompt and output together have at most "
                f"{self.limits.context_length_max}"
            )
        if seq.prefix_length > self.limits.context_length_max:
            raise RequestTooLongError(
                f"the prompt and the tokens of earlier attempts are {seq.prefix_length} tokens; at most "
                f"{self.limits.context_length_max} fit"
            )
        output = max(seq.sampling.max_tokens, len(seq.generated))
        longest = min(len(seq.prompt) + output, self.limits.context_length_max)
        if (wanted := -(-longest // self._page_size)) > self.pages.total:
            raise RequestTooLongError(
                f"the prompt of {len(seq.prompt)} tokens with up to {seq.sampling.max_tokens} new ones needs "
                f"{wanted} KV pages; there are {self.pages.total}"
            )

    def add(self, seq: Sequence) -> None:
        """Queues a request. RequestError as in `check`, NoCapacityError when the queue is full."""
        self.check(seq)
        if self.find(seq.request_id) is not None:
            raise RequestError(f"request {seq.request_id} is here already")
        if len(self._waiting) >= self.limits.waiting_max:
            raise NoCapacityError(f"{len(self._waiting)} requests wait already")
        insort(self._waiting, seq, key=lambda waiting: waiting.order)

    def find(self, request_id: str) -> Sequence | None:
        """The request of that id, waiting or running."""
        everyone = (*self._waiting, *self._running)
        return next((seq for seq in everyone if seq.request_id == request_id), None)

    def remove(self, seq: Sequence) -> None:
        """Forgets a request and frees its pages; its tokens stay. One that is not here is only reset."""
        for queue in (self._waiting, self._running):
            if seq in queue:
                queue.remove(seq)
        self._strip(seq)

    def has_room(self, seq: Sequence) -> bool:
        """Whether `reserve` may be called now: its pages are free, beside those of whoever is before it."""
        before = (other for other in self._waiting if other.order < seq.order and not other.pages)
        wanted = self.pages_wanted(seq) + sum(self.pages_wanted(other) for other in before)
        return wanted <= self.pages.free_pages

    def reserve(self, seq: Sequence) -> None:
        """Gives a waiting request pages of its own for all its tokens; nothing when it has them.

        For layers that run one by one: they write every position, so nothing is shared. NoCapacityError when too
        few pages are free.
        """
        if not seq.pages:
            seq.pages = self.pages.allocate(self.pages_wanted(seq))

    def plan(self) -> list[Work]:
        """Makes room, admits what fits and returns the next step's work; whoever computed it calls `advance` for each.

        At most `step_tokens_max` tokens and one chunk a request. Empty when nothing can be done.
        """
        for seq in self.running:
            if seq in self._running and not seq.prefilling:
                self._make_room(seq)
        budget = self.limits.step_tokens_max
        works = [self._work(seq, budget) for seq in self._running if not seq.prefilling]
        budget -= len(works)
        for seq in [seq for seq in self._running if seq.prefilling]:
            if budget > 0:
                works.append(self._work(seq, budget))
                budget -= works[-1].count
        return works + self._admit(budget)

    def advance(self, work: Work) -> None:
        """Records that a work is computed: its KV is complete in all layers, so others may share its full pages."""
        seq = work.seq
        seq.computed = work.stop
        if work.completes_prefix:
            seq.hidden = None
            seq.layers_done = 0
        full = seq.computed // self._page_size if self.limits.prefix_caching else 0
        for index in range(seq.pages_shareable, full):
            self.pages.remember(seq.pages[index], self._keys.of(seq, full)[index])
        seq.pages_shareable = full

    def _make_room(self, seq: Sequence) -> None:
        """A page for the position that the request computes next, from whoever arrived last when none is free."""
        while self.pages_wanted(seq) > len(seq.pages):
            if self.pages.free_pages:
                seq.pages += self.pages.allocate(1, after=seq.pages[-1])
                continue
            holders = (other for other in (*self._running, *self._waiting) if other.pages)
            victim = max(holders, key=lambda other: other.order)
            self._preempt(victim)
            if victim is seq:
                return

    def _preempt(self, seq: Sequence) -> None:
        self.counts.preemptions += 1
        self._strip(seq)
        if seq in self._running:
            self._running.remove(seq)
            insort(self._waiting, seq, key=lambda waiting: waiting.order)

    def _strip(self, seq: Sequence) -> None:
        self.pages.free(seq.pages)
        seq.reset()

    def _admit(self, budget: int) -> list[Work]:
        """Moves waiting requests into the batch, each with its first chunk."""
        works: list[Work] = []
        blocked = False
        for seq in self.waiting:
            if budget == 0 or len(self._running) >= self.limits.running_max:
                break
            if not seq.pages and (blocked or not self._allot(seq)):
                blocked = True
                continue
            self._waiting.remove(seq)
            insort(self._running, seq, key=lambda running: running.order)
            works.append(self._work(seq, budget))
            budget -= works[-1].count
        return works

    def _allot(self, seq: Sequence) -> bool:
        """Gives a request its pages, those of a known prefix first; False when there is no room.

        The last token is always computed, because its logits are wanted.
        """
        keys = self._keys.of(seq, (seq.prefix_length - 1) // self._page_size)
        shared = self.pages.find(keys)
        own = self.pages_wanted(seq) - len(shared)
        if own + self.pages.unheld(shared) + len(self._running) > self.pages.free_pages:
            return False
        self.pages.hold(shared)
        seq.pages = shared + self.pages.allocate(own, after=shared[-1] if shared else None)
        seq.computed = len(shared) * self._page_size
        seq.pages_shareable = len(shared)
        self.counts.prefix_tokens_asked += seq.prefix_length
        self.counts.prefix_tokens_hit += seq.computed
        return True

    def _work(self, seq: Sequence, budget: int) -> Work:
        if seq.layers_done == self._layers:
            return Work(seq=seq, start=seq.prefix_length - 1, count=1, first_layer=self._layers)
        count = min(seq.remaining, budget)
        return Work(seq=seq, start=seq.computed, count=count, first_layer=seq.layers_done)
