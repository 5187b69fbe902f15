"""Attention over paged KV for a batch of several requests laid end to end, and the seam for its implementations.

An `AttentionKernel` gets the queries, keys and values of all tokens of a step, stores the new keys and values in
their pages, then attends request by request over what its pages hold. Which tokens belong to whom is in the
`BatchPlan`; everything in it that is equal for all layers is computed once a step.

`TorchAttention` needs nothing but torch and does everything that any supported family asks for; it is the reference
that the others are tested against. Query heads that share keys and values (grouped-query attention) become more rows
of one query, so shared keys and values are never repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from layercast_agent.engine.kv import KVCache

T = TypeVar("T")


def to_device(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the host on the device. Through pinned memory: else the host would wait for the device."""
    if device.type == "cuda":
        return numbers.pin_memory().to(device, non_blocking=True)
    return numbers.to(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One request's part of a batch: prefix positions [start, start + count) at pages `pages`."""

    start: int
    count: int
    pages: Sequence[int]

    @property
    def stop(self) -> int:
        """First position after the span, and so the number of positions that its last token sees."""
        return self.start + self.count

    def slots(self, page_size: int) -> list[int]:
        """Where the KV of each position of the span is stored."""
        pages = self.pages
        return [
            pages[position // page_size] * page_size + position % page_size
            for position in range(self.start, self.stop)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTables:
    """The batch as kernels that read pages in place want it; all int32, on the device. n requests.

    `pages` [n, widest]: rows are filled up with 0. `stops` [n]: positions that each request's last token sees.
    `offsets` [n + 1]: request r has the tokens [offsets[r], offsets[r + 1]) of the batch, its last ones.
    """

    pages: torch.Tensor
    stops: torch.Tensor
    offsets: torch.Tensor


@dataclass(slots=True, kw_only=True)
class _Reading:
    """What one span's queries see under one window: slots of keys, and the mask where plain causality will not do.

    `mask` [query rows of one head, keys] is boolean, true where attention is allowed; None when all is, or when
    `causal` says it.
    """

    slots: slice | torch.Tensor
    mask: torch.Tensor | None
    causal: bool


@dataclass(kw_only=True)
class BatchPlan:
    """Where the T tokens of a batch belong: made by `of`, valid for one step.

    Its tensors are made when they are first asked for, once: a captured graph needs none of them.
    """

    kv: KVCache
    spans: Sequence[Span]
    _readings: dict[int | None, list[_Reading]] = field(default_factory=dict)
    _made: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, kv: KVCache, spans: Sequence[Span]) -> BatchPlan:
        """The plan of a batch whose tokens are those of the spans, in order."""
        return cls(kv=kv, spans=spans)

    @property
    def positions(self) -> torch.Tensor:
        """Position of each token in its request, int64 [T] on the device."""
        return self._places[0]

    @property
    def slots(self) -> torch.Tensor:
        """Where each token's KV is stored, int64 [T] on the device."""
        return self._places[1]

    @cached_property
    def _places(self) -> torch.Tensor:
        # Plain lists: a tensor operation a request would cost a decoding batch more than a layer does.
        positions = [position for span in self.spans for position in range(span.start, span.stop)]
        slots = [slot for span in self.spans for slot in span.slots(self.kv.page_size)]
        return to_device(torch.tensor([positions, slots], dtype=torch.int64), self.kv.device)

    @cached_property
    def tables(self) -> PageTables:
        """The same for kernels that walk pages themselves."""
        widest = max(len(span.pages) for span in self.spans)
        offsets = [0]
        for span in self.spans:
            offsets.append(offsets[-1] + span.count)
        device = self.kv.device
        pages = [[*span.pages, *(0,) * (widest - len(span.pages))] for span in self.spans]
        return PageTables(
            pages=torch.tensor(pages, dtype=torch.int32).to(device),
            stops=torch.tensor([span.stop for span in self.spans], dtype=torch.int32).to(device),
            offsets=torch.tensor(offsets, dtype=torch.int32).to(device),
        )

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What a block makes of the plan, made at its first layer and kept for the others."""
        if name not in self._made:
            self._made[name] = make()
        found: T = self._made[name]
        return found

    def readings(self, window: int | None) -> list[_Reading]:
        """For each span what it reads in a layer with that sliding window (None: everything before)."""
        if window not in self._readings:
            self._readings[window] = [self._reading(span, window) for span in self.spans]
        return self._readings[window]

    def _reading(self, span: Span, window: int | None) -> _Reading:
        # A token sees itself and the window - 1 tokens before it: keys before the first token's window are not read.
        first = 0 if window is None else max(0, span.start + 1 - window)
        slots: slice | torch.Tensor | None = _in_one_run(span, self.kv.page_size, first)
        if slots is None:
            slots = self.kv.slots(span.pages, first, span.stop).to(self.kv.device)
        windowed = window is not None and span.count > 1 and span.stop - first > window
        if span.count == 1 or (span.start == 0 and not windowed):
            return _Reading(slots=slots, mask=None, causal=span.count > 1)
        queries = torch.arange(span.start, span.stop, device=self.kv.device)[:, None]
        keys = torch.arange(first, span.stop, device=self.kv.device)[None, :]
        mask = keys <= queries
        if window is not None:
            mask &= keys > queries - window
        return _Reading(slots=slots, mask=mask, causal=False)


def _in_one_run(span: Span, page_size: int, first: int) -> slice | None:
    """The slots of positions [first, stop) as a slice, when the pages lie behind each other."""
    pages = span.pages
    if list(pages) != list(range(pages[0], pages[0] + len(pages))):
        return None
    return slice(pages[0] * page_size + first, pages[0] * page_size + span.stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How a layer turns products into weights.

    `window`: a token sees itself and the window - 1 tokens before it; None sees all. `softcap`: scores are squeezed
    into (-softcap, softcap). `sinks` [H]: a logit a head for attending to nothing.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Nothing but products, a scale and a mask."""
        return self.softcap is None and self.sinks is None


class AttentionKernel(Protocol):
    """Stores the keys and values of a step's tokens in one layer's pages and attends."""

    @property
    def name(self) -> str:
        """For status: "sdpa", "triton", ..."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        batch: BatchPlan,
        layer: int,
        scoring: Scoring,
    ) -> torch.Tensor:
        """query [T, H, D], key and value [T, Hkv, D], rotated and of any strides, to [T, H, D] contiguous.

        Values may be narrower than keys, and so is the result then.
        """


def attention_for(device: torch.device) -> AttentionKernel:
    """The best implementation for a device."""
    return TorchAttention()


class TorchAttention:
    """torch's scaled_dot_product_attention, request by request."""

    name = "sdpa"

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        batch: BatchPlan,
        layer: int,
        scoring: Scoring,
    ) -> torch.Tensor:
        """As AttentionKernel."""
        width = value.shape[-1]
        if width < key.shape[-1]:  # latent attention: the cache is as wide as the keys
            value = pad(value, (0, key.shape[-1] - width))
        batch.kv.write(layer, batch.slots, key, value)
        attend = _fused if scoring.plain else _explicit
        keys, values = batch.kv.by_head(layer)
        # [T, H, D] to [Hkv, G, T, D]
        grouped = query.reshape(len(query), key.shape[1], -1, query.shape[2]).permute(1, 2, 0, 3)
        output = query.new_empty((query.shape[0], *grouped.shape[:2], value.shape[-1]))
        row = 0
        for span, reading in zip(batch.spans, batch.readings(scoring.window), strict=True):
            rows = slice(row, row + span.count)
            attended = attend(
                grouped[:, :, rows], keys[:, reading.slots], values[:, reading.slots], reading, scoring
            )
            output[rows] = attended.permute(2, 0, 1, 3)
            row += span.count
        return output[..., :width].flatten(1, 2)


def _fused(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, reading: _Reading, scoring: Scoring
) -> torch.Tensor:
    """Attention of one span by torch's kernels: query [Hkv, G, T, D], keys and values [Hkv, S, D] to [Hkv, G, T, D].

    G query heads share keys and values.
    """
    kv_heads, group, count, _ = query.shape
    if reading.causal:
        attended = scaled_dot_product_attention(
            query.flatten(0, 1)[None],
            keys[None],
            values[None],
            is_causal=True,
            scale=scoring.scale,
            enable_gqa=group > 1,
        )
    else:
        mask = None if reading.mask is None else reading.mask.repeat(group, 1)
        attended = scaled_dot_product_attention(
            query.flatten(1, 2)[None], keys[None], values[None], attn_mask=mask, scale=scoring.scale
        )
    return attended.view(kv_heads, group, count, -1)


def _explicit(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, reading: _Reading, scoring: Scoring
) -> torch.Tensor:
    """The same, written out, for what the kernels cannot do: logit soft-capping and attention sinks."""
    kv_heads, group, count, _ = query.shape
    scores = torch.matmul(query.flatten(1, 2), keys.transpose(1, 2)) * scoring.scale
    scores = scores.view(kv_heads, group, count, -1)
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    mask = reading.mask
    if reading.causal:
        mask = torch.ones((count, count), dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if scoring.sinks is not None:
        # One more key, which every token sees and whose value is nothing.
        sinks = scoring.sinks.to(scores.dtype).view(kv_heads, group, 1, 1).expand(-1, -1, count, -1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)[..., : keys.shape[1]]
    return torch.matmul(weights.flatten(1, 2), values).view(kv_heads, group, count, -1)
