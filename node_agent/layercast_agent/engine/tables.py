"""What Triton's kernels know of a batch: small int32 tables, made on the host and sent in one copy.

A step's tables are the same for all layers. They are sent from pinned memory, because a copy from ordinary memory waits
for the device, and a step must not wait before its last line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from layercast_agent.engine.attention import BatchPlan, Span, to_device
from layercast_agent.engine.kv import KVCache

Pages = npt.NDArray[np.int32]
"""A row of page numbers for each span."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decodes:
    """Spans of one token: their rows in the batch, positions seen, pages. int32 [n], [n], [n, widest]."""

    rows: torch.Tensor
    lengths: torch.Tensor
    pages: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefills:
    """Longer spans: first rows, first positions, counts, pages; and the tiles of queries that cover them. int32."""

    rows: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    pages: torch.Tensor
    tiles: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """What the kernels know of a batch of T tokens; made once a step. `positions` and `slots` are integers [T]."""

    positions: torch.Tensor
    slots: torch.Tensor
    decodes: Decodes | None
    prefills: Prefills | None

    @classmethod
    def of(cls, batch: BatchPlan, tile: int) -> Tables:
        """The tables of a batch, through one copy to the device for each kind of span."""
        rows = np.cumsum([0, *(span.count for span in batch.spans)])[:-1].tolist()
        spans = list(zip(rows, batch.spans, strict=True))
        singles = [(row, span) for row, span in spans if span.count == 1]
        longer = [(row, span) for row, span in spans if span.count > 1]
        return cls(
            positions=batch.positions,
            slots=batch.slots,
            decodes=_decodes(singles, batch.kv) if singles else None,
            prefills=_prefills(longer, batch.kv, tile) if longer else None,
        )


def _decodes(spans: Sequence[tuple[int, Span]], kv: KVCache) -> Decodes:
    pages = page_table([span for _, span in spans], kv.page_size)
    columns = [[row for row, _ in spans], [span.stop for _, span in spans]]
    rows, lengths, pages_on = _upload(kv.device, *columns, pages)
    return Decodes(rows=rows, lengths=lengths, pages=pages_on.view(pages.shape))


def _prefills(spans: Sequence[tuple[int, Span]], kv: KVCache, tile: int) -> Prefills:
    pages = page_table([span for _, span in spans], kv.page_size)
    tiles = [(index, at) for index, (_, span) in enumerate(spans) for at in range(0, span.count, tile)]
    rows, starts, counts, tile_spans, tile_starts, pages_on = _upload(
        kv.device,
        [row for row, _ in spans],
        [span.start for _, span in spans],
        [span.count for _, span in spans],
        [index for index, _ in tiles],
        [at for _, at in tiles],
        pages,
    )
    return Prefills(
        rows=rows,
        starts=starts,
        counts=counts,
        pages=pages_on.view(pages.shape),
        tiles=(tile_spans, tile_starts),
    )


def page_table(spans: Sequence[Span], page_size: int) -> Pages:
    """The pages that each span sees, filled up with 0 to the widest, to a multiple of 16 that kernels load well."""
    used = [-(-span.stop // page_size) for span in spans]
    table = np.zeros((len(spans), -(-max(used) // 16) * 16), dtype=np.int32)
    for row, (span, count) in enumerate(zip(spans, used, strict=True)):
        table[row, :count] = span.pages[:count]
    return table


def _upload(device: torch.device, *columns: Any) -> tuple[torch.Tensor, ...]:
    """Numbers as int32 on the device, in one copy; each column starts where a kernel may load 16 bytes."""
    flat = [np.asarray(column, dtype=np.int32).ravel() for column in columns]
    starts = np.cumsum([0, *(-(-len(column) // 4) * 4 for column in flat)]).tolist()
    whole = np.zeros(starts[-1], dtype=np.int32)
    for start, column in zip(starts, flat, strict=False):
        whole[start : start + len(column)] = column
    there = to_device(torch.from_numpy(whole), device)
    return tuple(there[start : start + len(column)] for start, column in zip(starts, flat, strict=False))
