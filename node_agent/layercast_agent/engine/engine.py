"""One model's engine: requests in, tokens out, one step or one layer at a time.

`step` is continuous batching: one token of every decoding request and chunks of prompts go through all layers
together. A request that arrives with layers done, by handoff or by `run_layer` here, joins the step's batch when it
reaches that layer. `run_layer` is the quantum of live scale-up: one layer of one waiting request (BlitzScale,
OSDI'25, section 5.2), possible as soon as that layer's parameters have landed.

Not thread-safe: one thread owns an engine.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from itertools import accumulate

import torch

from layercast_agent.device import from_host, to_host
from layercast_agent.engine.attention import BatchPlan, Span, to_device
from layercast_agent.engine.guidance import Guides, GuideState
from layercast_agent.engine.kv import KVCache
from layercast_agent.engine.model import LayeredModel
from layercast_agent.engine.moves import Moves
from layercast_agent.engine.sampler import Choice, Draw, sample
from layercast_agent.engine.scheduler import EngineLimits, Scheduler, Work
from layercast_agent.engine.sequence import FinishReason, SamplingParams, Sequence, TokenEvent, TokenLogprobs
from layercast_agent.engine.stages import Stages
from layercast_agent.errors import NoCapacityError, PeerError, RequestError

__all__ = [
    "Engine",
    "EngineLimits",
    "EngineLoad",
    "FinishReason",
    "SamplingParams",
    "Sequence",
    "TokenEvent",
    "TokenLogprobs",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """How busy an engine is. `prompt_tokens_waiting` counts the known tokens of all waiting requests.

    `kv_pages_cached` hold a prefix that a later request may share, used or not. The last three count since the start:
    tokens of admitted prefixes, those of them that were found in the cache, and requests that lost their pages.
    """

    requests_waiting: int
    requests_running: int
    prompt_tokens_waiting: int
    kv_pages_used: int
    kv_pages_total: int
    kv_pages_cached: int = 0
    prefix_tokens_asked: int = 0
    prefix_tokens_hit: int = 0
    preemptions: int = 0


class Engine:
    """Executes requests on one model and one KV cache, which it owns. `key` names the model."""

    def __init__(
        self,
        *,
        model: LayeredModel,
        kv: KVCache,
        limits: EngineLimits,
        key: str = "",
        guides: Guides | None = None,
    ) -> None:
        self.model = model
        self.limits = limits
        self._kv = kv
        self._guides = guides
        self.stages = Stages(model=model, kv=kv)
        self._layers = model.shape.layers
        self._scheduler = Scheduler(
            pages=kv.allocator, page_size=kv.page_size, layers=self._layers, limits=limits, key=key
        )
        self.moves = Moves(model=model, kv=kv, scheduler=self._scheduler, stages=self.stages, add=self.add)
        self._prefill_layer_tokens = 0

    # Requests in and out

    def check(self, seq: Sequence) -> None:
        """Raises RequestTooLongError or RequestError for what this engine could never serve."""
        self._scheduler.check(seq)
        highest = max(*seq.prompt, *seq.generated, 0)
        if highest >= self.model.shape.vocab_size:
            raise RequestError(f"token {highest} is outside the vocabulary of {self.model.shape.vocab_size}")
        sampling = seq.sampling
        if any(token_id >= self.model.shape.vocab_size for token_id, _ in sampling.logit_bias):
            raise RequestError(f"a bias is outside the vocabulary of {self.model.shape.vocab_size}")
        if sampling.guide is not None:
            if self._guides is None:
                raise RequestError("answers of this model cannot be guided")
            self._guides.check(sampling.guide)

    def add(self, seq: Sequence) -> None:
        """Queues a request. Raises as `check`, and NoCapacityError when the queue is full."""
        self.check(seq)
        self._scheduler.add(seq)

    def cancel(self, request_id: str) -> Sequence | None:
        """Removes a request and frees what it holds; it keeps its tokens. None when there is none of that id."""
        seq = self._scheduler.find(request_id)
        if seq is not None:
            self.release(seq)
        return seq

    def release(self, seq: Sequence) -> None:
        """Forgets a request, here or not, and everything that was executed for it; it keeps its tokens."""
        self._scheduler.remove(seq)

    # What is going on

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Requests that no step works on, by arrival. Layers may have been run, so they can be handed off."""
        return self._scheduler.waiting

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Requests that steps work on, by arrival."""
        return self._scheduler.running

    @property
    def prefilling(self) -> int:
        """Running requests whose prefix is not complete yet."""
        return sum(seq.prefilling for seq in self._scheduler.running)

    @property
    def prefill_tokens_done(self) -> int:
        """Prompt tokens computed since the start; a token through some of the layers counts in proportion."""
        return self._prefill_layer_tokens // self._layers

    def load(self) -> EngineLoad:
        """Numbers for status and scheduling across replicas."""
        waiting = self._scheduler.waiting
        counts = self._scheduler.counts
        return EngineLoad(
            requests_waiting=len(waiting),
            requests_running=len(self._scheduler.running),
            prompt_tokens_waiting=sum(seq.prefix_length for seq in waiting),
            kv_pages_used=self._kv.allocator.used,
            kv_pages_total=self._kv.allocator.total,
            kv_pages_cached=self._kv.allocator.cached,
            prefix_tokens_asked=counts.prefix_tokens_asked,
            prefix_tokens_hit=counts.prefix_tokens_hit,
            preemptions=counts.preemptions,
        )

    def has_room(self, seq: Sequence) -> bool:
        """Whether the pages of a waiting request are free, beside those of whoever came before it."""
        return self._scheduler.has_room(seq)

    # Execution

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """One step of continuous batching; the model must be complete. Returns the new tokens.

        A request that came with all its tokens, its last event lost on the way, gets its last token's event again.
        """
        events = [self._event(seq, None) for seq in self.waiting if self._finish(seq) is not None]
        for event in events:
            self.cancel(event.request_id)
        works = sorted(
            self._scheduler.plan(), key=lambda work: (work.first_layer, work.seq.hidden is not None)
        )
        if not works:
            return events
        hidden = self._run(works)
        complete = [work for work in works if work.completes_prefix]
        for work in works:
            self._count_prefill(work)
            self._scheduler.advance(work)
        for work in complete:
            self.moves.completed(work.seq)
        if complete:
            rows = self._last_rows(works)
            if len(rows) < len(hidden):
                hidden = hidden[to_device(torch.tensor(rows), self.model.device)]
            logits = self.model.logits(hidden)
            draws = [self._draw(work.seq) for work in complete]
            choices = sample(logits, draws)
            events += [self._accept(work.seq, choice) for work, choice in zip(complete, choices, strict=True)]
        return events

    @torch.inference_mode()
    def run_layer(self, *seqs: Sequence) -> None:
        """Runs exactly one more layer on all prefix tokens of waiting requests that are at the same layer.

        That layer must be attached. Embeds first when nothing was done yet. Reserves the requests' pages on first use:
        NoCapacityError when too few are free. ValueError when all layers are done, the requests are at different
        layers, or one does not wait here.
        """
        layer = seqs[0].layers_done
        for seq in seqs:
            if seq not in self.waiting or seq.layers_done != layer or layer >= self._layers:
                raise ValueError(f"request {seq.request_id} has no layer to run")
        spans = []
        for seq in seqs:
            self._scheduler.reserve(seq)
            self.embed(seq)
            spans.append(Span(start=0, count=seq.prefix_length, pages=seq.pages))
        hidden = torch.cat([seq.hidden for seq in seqs if seq.hidden is not None])
        hidden = self.model.run_layers(layer, layer + 1, hidden, BatchPlan.of(self._kv, spans))
        ends = accumulate(span.count for span in spans)
        for seq, span, end in zip(seqs, spans, ends, strict=True):
            seq.hidden = hidden[end - span.count : end]
            seq.layers_done = layer + 1
            self._prefill_layer_tokens += seq.prefix_length

    @torch.inference_mode()
    def embed(self, seq: Sequence) -> None:
        """Fills `seq.hidden` with the embeddings of its prefix, unless it has hidden states; needs no pages."""
        if seq.hidden is None:
            seq.hidden = self.model.embed(self._token_ids([seq.tokens(0, seq.prefix_length)]))

    # Pipelines of partial replicas

    @torch.inference_mode()
    def embedding(self, seq: Sequence, start: int) -> torch.Tensor:
        """Embeddings [count, hidden size] of the prefix from position `start` on."""
        return self.model.embed(self._token_ids([seq.tokens(start, seq.prefix_length)]))

    @torch.inference_mode()
    def choose(self, seq: Sequence, hidden: torch.Tensor) -> TokenEvent:
        """The next token of a request whose last position left all layers, here or elsewhere, as `hidden` [1, H]."""
        draw = Draw(sampling=seq.sampling, position=len(seq.generated))
        (choice,) = sample(self.model.logits(hidden), [draw])
        return self._accept(seq, choice)

    @torch.inference_mode()
    def adopt(self, seq: Sequence, state: torch.Tensor, positions: int) -> None:
        """Queues a request whose first `positions` are computed in all layers: a handoff with k = L.

        `state` is uint8 [n] on the host: K and V of each layer, [positions, kv heads, head dim]. Raises as `add`, and
        PeerError when the bytes are not of that request; NoCapacityError when too few pages are free. Then it is not
        queued.
        """
        shape = self.model.shape
        if (
            state.numel() != self._layers * positions * self._kv.row_bytes
            or positions != seq.prefix_length - 1
        ):
            raise PeerError(f"{state.numel()} bytes of KV do not fit request {seq.request_id}")
        self.add(seq)
        try:
            self._scheduler.reserve(seq)
        except NoCapacityError:
            self.release(seq)
            raise
        kv = state.view(shape.dtype).view(self._layers, 2, positions, shape.kv_heads, shape.head_dim)
        self._kv.import_rows(seq.pages, kv, first=0, start=0)
        seq.computed = positions

    # Handoffs

    def export_state(self, seq: Sequence) -> torch.Tensor:
        """The bytes of Handoff.state: uint8 [n], on the host, contiguous and nobody else's.

        Hidden states of the prefix after `layers_done` layers, then K and V of each layer below. ValueError for a
        request without hidden states or in the middle of a step's chunks.
        """
        hidden = seq.hidden
        if hidden is None or seq.computed > 0:
            raise ValueError(f"request {seq.request_id} is not at a layer boundary")
        parts = [hidden]
        if seq.layers_done > 0:
            parts.append(
                self._kv.export_rows(
                    seq.pages, first=0, last=seq.layers_done, start=0, stop=seq.prefix_length
                )
            )
        return to_host(parts)

    @torch.inference_mode()
    def import_state(self, seq: Sequence, layers_done: int, data: bytes | bytearray | memoryview) -> None:
        """Takes over what `export_state` of another engine returned, for a request that waits here.

        Reserves its pages when there is KV to store. PeerError when the bytes are not of that request and number of
        layers, NoCapacityError when too few pages are free; the request then waits with nothing done.
        """
        shape = self.model.shape
        length = seq.prefix_length
        hidden_bytes = length * shape.hidden_size * shape.dtype.itemsize
        expected = hidden_bytes + length * layers_done * self._kv.row_bytes
        if not 0 <= layers_done <= self._layers or len(data) != expected:
            raise PeerError(
                f"the state of request {seq.request_id} has {len(data)} bytes; {layers_done} of {self._layers} "
                f"layers of {length} tokens are {expected}"
            )
        if seq not in self.waiting or seq.hidden is not None:
            raise ValueError(f"request {seq.request_id} does not wait here for a state")
        state = from_host(data, self.model.device)
        if layers_done > 0:
            self._scheduler.reserve(seq)
            kv = state[hidden_bytes:].view(shape.dtype)
            rows = kv.view(layers_done, 2, length, shape.kv_heads, shape.head_dim)
            self._kv.import_rows(seq.pages, rows, first=0, start=0)
        seq.hidden = state[:hidden_bytes].view(shape.dtype).view(length, -1).clone()
        seq.layers_done = layers_done

    # Inside a step

    def _run(self, works: Ordered[Work]) -> torch.Tensor:
        """Runs the works, sorted by first layer, and returns the hidden states of all their tokens in that order."""
        joins = sorted({work.first_layer for work in works})
        batch: list[Work] = []
        parts: list[torch.Tensor] = []
        for first, last in zip(joins, [*joins[1:], self._layers], strict=True):
            joining = [work for work in works if work.first_layer == first]
            batch += joining
            parts += self._inputs(joining)
            hidden = torch.cat(parts) if len(parts) > 1 else parts[0]
            if first < last:
                plan = BatchPlan.of(self._kv, _spans(batch))
                for begin, end in self.moves.cuts(first, last, batch):
                    hidden = self.model.run_layers(begin, end, hidden, plan)
                    self.moves.ran(begin, end, batch)
            parts = [hidden]
        return parts[0]

    def _inputs(self, works: Ordered[Work]) -> list[torch.Tensor]:
        """Hidden states with which works enter their first layer; those without any come first and are embedded."""
        fresh = [work.seq.tokens(work.start, work.stop) for work in works if work.seq.hidden is None]
        given = [work.seq.hidden[work.start : work.stop] for work in works if work.seq.hidden is not None]
        return [self.model.embed(self._token_ids(fresh)), *given] if fresh else given

    def _token_ids(self, parts: Ordered[Ordered[int]]) -> torch.Tensor:
        tokens = [token for part in parts for token in part]
        return to_device(torch.tensor(tokens, dtype=torch.int64), self.model.device)

    def _last_rows(self, works: Ordered[Work]) -> list[int]:
        rows: list[int] = []
        row = 0
        for work in works:
            row += work.count
            if work.completes_prefix:
                rows.append(row - 1)
        return rows

    def _count_prefill(self, work: Work) -> None:
        if work.seq.prefilling:
            self._prefill_layer_tokens += work.count * (self._layers - work.first_layer)

    def _accept(self, seq: Sequence, choice: Choice) -> TokenEvent:
        seq.generated.append(choice.token_id)
        if seq.guide_state is not None:
            seq.guide_state.accept([choice.token_id])
        event = self._event(seq, choice)
        if event.finish is not None or event.error:
            self.release(seq)
        return event

    def _finish(self, seq: Sequence) -> FinishReason | None:
        reason = seq.finish(self.limits.context_length_max)
        guide = self._guide(seq) if reason is None else None
        return FinishReason.STOP if guide is not None and guide.finished else reason

    def _guide(self, seq: Sequence) -> GuideState | None:
        """Where a request stands in its grammar: worked out from its tokens when it is new here."""
        guide = seq.sampling.guide
        if guide is not None and self._guides is not None and seq.guide_state is None:
            seq.guide_state = self._guides.start(guide, seq.generated)
        return seq.guide_state

    def _draw(self, seq: Sequence) -> Draw:
        guide = self._guide(seq)
        return Draw(
            sampling=seq.sampling,
            position=len(seq.generated),
            prompt=seq.prompt,
            generated=seq.generated,
            allowed=None if guide is None else guide.allowed(),
        )

    def _event(self, seq: Sequence, choice: Choice | None) -> TokenEvent:
        return TokenEvent(
            request_id=seq.request_id,
            attempt=seq.attempt,
            gateway_id=seq.gateway_id,
            position=len(seq.generated) - 1,
            token_id=seq.generated[-1],
            logprobs=choice.logprobs if choice else None,
            finish=self._finish(seq),
            error=seq.guide_state.error if seq.guide_state is not None else "",
        )


def _spans(works: Ordered[Work]) -> list[Span]:
    return [Span(start=work.start, count=work.count, pages=work.seq.pages) for work in works]
