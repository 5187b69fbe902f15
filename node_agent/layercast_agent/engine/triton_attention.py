"""Attention over paged KV in Triton: one kernel for spans of one token, one for longer ones.

Both read keys and values in place, through each request's table of pages. A decode reads a long cache for one token,
so its positions are split over several programs and merged (flash-decoding: Dao et al., 2023), and the query heads that
share keys and values are the rows of one product. A prefill walks the keys below each tile of queries once, with the
running softmax of FlashAttention-2 (Dao, 2023, section 3.1).

Importing this needs Triton: ask `cuda.triton_missing` first. With TRITON_INTERPRET=1 everything runs on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SPLITS_MAX = 32
"""Parts that a decode's positions are cut into at most."""


def prefill_tile(dtype: torch.dtype) -> int:
    """Queries of one program of the prefill kernel; tables of tiles are made for it.

    In float32 there are no tensor cores to fill, and a large tile takes a minute to compile.
    """
    return 128 if dtype.itemsize == 2 else 32


@triton.jit
def _decode(
    q, keys, values, rows, lengths, pages, partial, weights, scale,
    q_stride, slot_stride, page_stride, splits,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    span = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + span)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(0, length - WINDOW)
    share = tl.cdiv(tl.cdiv(length - first, splits), BLOCK) * BLOCK
    start = first + split * share
    stop = tl.minimum(start + share, length)
    group = tl.arange(0, BLOCK_G)
    d = tl.arange(0, D)
    heads = kv_head * GROUP + group
    row = tl.load(rows + span).to(tl.int64)
    query = tl.load(
        q + row * q_stride + heads[:, None] * D + d[None, :], mask=(group < GROUP)[:, None], other=0.0
    )
    highest = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_G], dtype=tl.float32)
    summed = tl.zeros([BLOCK_G, D], dtype=tl.float32)
    for at in range(start, stop, BLOCK):
        position = at + tl.arange(0, BLOCK)
        seen = position < stop
        page = tl.load(pages + span * page_stride + position // PAGE, mask=seen, other=0).to(tl.int64)
        slot = (page * PAGE + position % PAGE) * slot_stride + kv_head * D
        key = tl.load(keys + slot[None, :] + d[:, None], mask=seen[None, :], other=0.0)
        score = tl.dot(query, key, input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, float("-inf"))
        # Never the maximum of nothing: a turn of the loop sees at least one position.
        higher = tl.maximum(highest, tl.max(score, axis=1))
        faded = tl.exp(highest - higher)
        weight = tl.exp(score - higher[:, None])
        value = tl.load(values + slot[:, None] + d[None, :], mask=seen[:, None], other=0.0)
        summed = tl.dot(weight.to(value.dtype), value, summed * faded[:, None], input_precision="ieee")
        total = total * faded + tl.sum(weight, axis=1)
        highest = higher
    part = (span * tl.num_programs(1) * GROUP + heads) * splits + split
    some = (group < GROUP) & (stop > start)
    total = tl.where(stop > start, total, 1.0)
    tl.store(partial + part[:, None] * D + d[None, :], summed / total[:, None], mask=some[:, None])
    # A part without positions weighs nothing: `highest` is still -inf.
    tl.store(weights + part, highest + tl.log(total), mask=group < GROUP)


@triton.jit
def _merge(partial, weights, rows, out, out_stride, splits, SPLITS: tl.constexpr, D: tl.constexpr):
    span = tl.program_id(0)
    head = tl.program_id(1)
    part = (span * tl.num_programs(1) + head) * splits + tl.arange(0, SPLITS)
    inside = tl.arange(0, SPLITS) < splits
    d = tl.arange(0, D)
    weight = tl.load(weights + part, mask=inside, other=float("-inf"))
    used = weight > float("-inf")
    highest = tl.max(tl.where(used, weight, -1e30), axis=0)
    share = tl.where(used, tl.exp(weight - highest), 0.0)
    value = tl.load(partial + part[:, None] * D + d[None, :], mask=used[:, None], other=0.0)
    # A row that only fills a graph's batch has no positions: zeros come out, and nobody reads them.
    result = tl.sum(value * share[:, None], axis=0) / tl.maximum(tl.sum(share, axis=0), 1e-30)
    row = tl.load(rows + span).to(tl.int64)
    tl.store(out + row * out_stride + head * D + d, result.to(out.dtype.element_ty))


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
    page_size: int,
    scale: float,
    window: int | None = None,
    splits: int | None = None,
    tiles: tuple[int, int, int] | None = None,
) -> None:
    """Attention of spans of one token.

    q [T, >= Hq x D] with heads side by side; span i is row `rows[i]`, sees `lengths[i]` positions (0: padding) through
    `pages[i]`; `keys` and `values` [slots, Hkv, D] are one layer of the cache. Writes out [T, Hq x D] at those rows.
    Tables are int32. `tiles`: positions a turn, warps, pipeline stages.
    """
    spans = rows.shape[0]
    kv_heads, head_dim = keys.shape[1], keys.shape[2]
    group = out.shape[1] // head_dim // kv_heads
    splits = splits or splits_of(spans, kv_heads, pages.shape[1] * page_size)
    block, warps, stages = tiles or ((64, 2, 3) if q.element_size() == 2 else (16, 4, 3))
    partial = q.new_empty((spans * kv_heads * group * splits, head_dim), dtype=torch.float32)
    weights = q.new_empty((spans * kv_heads * group * splits,), dtype=torch.float32)
    _decode[(spans, kv_heads, splits)](
        q, keys, values, rows, lengths, pages, partial, weights, scale,
        q.stride(0), keys.stride(0), pages.stride(0), splits,
        GROUP=group, BLOCK_G=max(16, triton.next_power_of_2(group)), D=head_dim, PAGE=page_size,
        BLOCK=block, WINDOW=window or 0, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _merge[(spans, kv_heads * group)](
        partial, weights, rows, out, out.stride(0), splits,
        SPLITS=triton.next_power_of_2(splits), D=head_dim, num_warps=4,
    )  # fmt: skip


def splits_of(spans: int, kv_heads: int, positions_max: int) -> int:
    """Parts of a decode's positions: enough programs for two a multiprocessor of a large GPU, none without work.

    Depends on nothing that changes from step to step, so that a captured graph may keep it.
    """
    wanted = -(-264 // (spans * kv_heads))
    useful = -(-positions_max // 64)
    return max(1, min(SPLITS_MAX, wanted, useful))


@triton.jit
def _prefill(
    q, keys, values, out, tile_spans, tile_starts, rows, starts, counts, pages, scale,
    q_stride, out_stride, slot_stride, page_stride, group,
    D: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    # The last tiles have the most keys below them: first come, first finished.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // group
    span = tl.load(tile_spans + tile)
    tile_start = tl.load(tile_starts + tile)
    start = tl.load(starts + span)
    count = tl.load(counts + span)
    row0 = tl.load(rows + span).to(tl.int64)
    t = tile_start + tl.arange(0, TILE)
    d = tl.arange(0, D)
    real = (t < count)[:, None]
    query = tl.load(q + (row0 + t)[:, None] * q_stride + head * D + d[None, :], mask=real, other=0.0)
    asked = start + t
    stop = start + tl.minimum(tile_start + TILE, count)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(0, start + tile_start + 1 - WINDOW) // BLOCK * BLOCK
    highest = tl.full([TILE], float("-inf"), dtype=tl.float32)
    total = tl.zeros([TILE], dtype=tl.float32)
    summed = tl.zeros([TILE, D], dtype=tl.float32)
    for at in range(first, stop, BLOCK):
        position = at + tl.arange(0, BLOCK)
        known = position < stop
        page = tl.load(pages + span * page_stride + position // PAGE, mask=known, other=0).to(tl.int64)
        slot = (page * PAGE + position % PAGE) * slot_stride + kv_head * D
        key = tl.load(keys + slot[None, :] + d[:, None], mask=known[None, :], other=0.0)
        score = tl.dot(query, key, input_precision="ieee") * scale
        seen = position[None, :] <= asked[:, None]
        if WINDOW > 0:
            seen = seen & (position[None, :] > asked[:, None] - WINDOW)
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, axis=1))
        # A query whose window starts later has seen nothing yet: -inf - -inf would be no number.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        faded = tl.exp(highest - base)
        weight = tl.exp(score - base[:, None])
        value = tl.load(values + slot[:, None] + d[None, :], mask=known[:, None], other=0.0)
        summed = tl.dot(weight.to(value.dtype), value, summed * faded[:, None], input_precision="ieee")
        total = total * faded + tl.sum(weight, axis=1)
        highest = higher
    result = summed / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(
        out + (row0 + t)[:, None] * out_stride + head * D + d[None, :],
        result.to(out.dtype.element_ty),
        mask=real,
    )


def prefill_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    tiles: tuple[torch.Tensor, torch.Tensor],
    rows: torch.Tensor,
    starts: torch.Tensor,
    counts: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
    page_size: int,
    scale: float,
    window: int | None = None,
) -> None:
    """Causal attention of spans of several tokens, whose own K and V are in their pages already.

    Span i is rows [rows[i], rows[i] + counts[i]) at positions from `starts[i]`; `tiles` are, for each tile of
    `prefill_tile` queries, its span and its first query there. The rest as `decode_attention`.
    """
    kv_heads, head_dim = keys.shape[1], keys.shape[2]
    heads = out.shape[1] // head_dim
    narrow = q.element_size() > 2 or head_dim > 128
    _prefill[(tiles[0].shape[0], heads)](
        q, keys, values, out, *tiles, rows, starts, counts, pages, scale,
        q.stride(0), out.stride(0), keys.stride(0), pages.stride(0), heads // kv_heads,
        D=head_dim, PAGE=page_size, TILE=prefill_tile(q.dtype), BLOCK=32 if narrow else 64, WINDOW=window or 0,
        num_warps=8 if q.element_size() == 2 else 4, num_stages=2 if narrow else 3,
    )  # fmt: skip
