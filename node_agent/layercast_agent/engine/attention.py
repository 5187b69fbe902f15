"""Attention over paged KV for a batch of several requests laid end to end.

transformers' decoder layers call one registered function with the queries, keys and values of all tokens of a step,
[1, heads, T, head dim]. Which tokens belong to whom comes by a context variable, because not every family passes
keyword arguments on to it. The function stores the new keys and values in their pages, then attends request by
request over what its pages hold. Query heads that share keys and values (grouped-query attention) become more rows
of one query, so shared keys and values are never repeated.

Everything that is equal for all layers is computed once a step, in `BatchPlan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from layercast_agent.engine.kv import KVCache

ATTENTION = "layercast_paged"
"""Name under which the function is registered with transformers."""


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


@dataclass(slots=True, kw_only=True)
class _Reading:
    """What one span's queries see under one window: slots of keys, and the mask where plain causality will not do.

    `mask` [query rows of one head, keys] is boolean, true where attention is allowed; None when all is, or when
    `causal` says it.
    """

    slots: slice | torch.Tensor
    mask: torch.Tensor | None
    causal: bool


@dataclass(slots=True, kw_only=True)
class BatchPlan:
    """Where the T tokens of a batch belong: made by `of`, valid for one step.

    `positions` [T] and `slots` [T] are int64 on the device.
    """

    kv: KVCache
    spans: Sequence[Span]
    positions: torch.Tensor
    slots: torch.Tensor
    _readings: dict[int | None, list[_Reading]] = field(default_factory=dict)

    @classmethod
    def of(cls, kv: KVCache, spans: Sequence[Span]) -> BatchPlan:
        """The plan of a batch whose tokens are those of the spans, in order."""
        positions = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        slots = torch.cat([kv.slots(span.pages, span.start, span.stop) for span in spans])
        return cls(kv=kv, spans=spans, positions=positions.to(kv.device), slots=slots.to(kv.device))

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


current_batch: ContextVar[BatchPlan] = ContextVar("current_batch")
"""The batch whose layers are being called on this thread."""


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: q [1, H, T, D], k and v [1, Hkv, T, D] to ([1, T, H, D], None).

    Only the `sliding_window` argument counts, not the module's attribute, which some families set on layers that
    see everything. `s_aux` are the attention sinks. `attention_mask` is not used: the plan knows better.
    """
    plan = current_batch.get()
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    width = value.shape[-1]
    if width < key.shape[-1]:  # latent attention: the cache is as wide as the keys
        value = pad(value, (0, key.shape[-1] - width))
    plan.kv.write(layer, plan.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    scoring = _Scoring(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        sinks=kwargs.get("s_aux"),
    )
    attend = _fused if scoring.plain else _explicit
    keys, values = plan.kv.by_head(layer)
    grouped = query[0].view(key.shape[1], -1, *query.shape[2:])
    output = query.new_empty((query.shape[2], *grouped.shape[:2], value.shape[-1]))
    row = 0
    for span, reading in zip(plan.spans, plan.readings(sliding_window), strict=True):
        rows = slice(row, row + span.count)
        attended = attend(
            grouped[:, :, rows], keys[:, reading.slots], values[:, reading.slots], reading, scoring
        )
        output[rows] = attended.permute(2, 0, 1, 3)
        row += span.count
    return output[..., :width].flatten(1, 2)[None], None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scoring:
    """How a layer turns products into weights. `sinks` [H]: a logit for attending to nothing."""

    scale: float
    softcap: float | None
    sinks: torch.Tensor | None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks is None


def _fused(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, reading: _Reading, scoring: _Scoring
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
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, reading: _Reading, scoring: _Scoring
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
