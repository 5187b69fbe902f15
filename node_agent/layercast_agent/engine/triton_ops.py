"""The small operations of a Llama-family layer, each as one pass over memory, in Triton.

A decode step reads every parameter once and does next to nothing with it, so what lies between the matrix products
must not cost: residual + norm is one kernel, rotary embedding + storing K and V is one, the gate of the MLP is one or
none. The products themselves are cuBLAS's for many rows; for few rows (`skinny`) a kernel that only streams the
matrix is nearer to the memory's speed.

Importing this needs Triton: ask `cuda.triton_missing` first. With TRITON_INTERPRET=1 everything runs on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SKINNY_ROWS_MAX = 64
"""Rows up to which streaming the matrix is the whole cost."""


@triton.jit
def _add_rms_norm(x, residual, weight, out, eps, size, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + row * size + at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        # Rounded to the parameters' type, as the unfused addition does.
        value = value + tl.load(residual + row * size + at, mask=inside, other=0.0)
        tl.store(residual + row * size + at, value, mask=inside)
    wide = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / size + eps)
    gain = tl.load(weight + at, mask=inside, other=0.0)
    tl.store(out + row * size + at, (wide * scale).to(value.dtype) * gain, mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of rows [T, H], contiguous."""
    out = torch.empty_like(x)
    size = x.shape[1]
    block = triton.next_power_of_2(size)
    _add_rms_norm[(x.shape[0],)](
        x, x, weight, out, eps, size, HAS_RESIDUAL=False, BLOCK=block, num_warps=_warps(block)
    )
    return out


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """residual += x, in place; returns the RMS norm of the sum. All [T, H], contiguous."""
    out = torch.empty_like(x)
    size = x.shape[1]
    block = triton.next_power_of_2(size)
    _add_rms_norm[(x.shape[0],)](
        x, residual, weight, out, eps, size, HAS_RESIDUAL=True, BLOCK=block, num_warps=_warps(block)
    )
    return out


def _warps(block: int) -> int:
    return min(16, max(1, block // 256))


@triton.jit
def _rope_store(
    qkv, q_norm, k_norm, cos, sin, positions, slots, keys, values, eps,
    row_stride, slot_stride, q_heads, kv_heads,
    HAS_NORM: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q_parts = tl.cdiv(q_heads, HEADS)
    kv_parts = tl.cdiv(kv_heads, HEADS)
    is_query = part < q_parts
    is_key = (part >= q_parts) & (part < q_parts + kv_parts)
    start = tl.where(is_query, part, tl.where(is_key, part - q_parts, part - q_parts - kv_parts)) * HEADS
    count = tl.where(is_query, q_heads, kv_heads)
    base = tl.where(is_query, 0, tl.where(is_key, q_heads, q_heads + kv_heads))
    head = start + tl.arange(0, HEADS)
    at = tl.arange(0, HALF)
    inside = (head < count)[:, None] & (at < HALF)[None, :]
    offset = (base + head)[:, None] * (2 * HALF) + at[None, :]
    low = tl.load(qkv + token * row_stride + offset, mask=inside, other=0.0)
    high = tl.load(qkv + token * row_stride + offset + HALF, mask=inside, other=0.0)
    if part < q_parts + kv_parts:
        if HAS_NORM:
            wide_low = low.to(tl.float32)
            wide_high = high.to(tl.float32)
            square = tl.sum(wide_low * wide_low, axis=1) + tl.sum(wide_high * wide_high, axis=1)
            scale = (1.0 / tl.sqrt(square / (2 * HALF) + eps))[:, None]
            gain = k_norm
            if is_query:
                gain = q_norm
            low = (wide_low * scale).to(low.dtype) * tl.load(gain + at)[None, :]
            high = (wide_high * scale).to(high.dtype) * tl.load(gain + at + HALF)[None, :]
        position = tl.load(positions + token).to(tl.int64)
        c = tl.load(cos + position * HALF + at)[None, :]
        s = tl.load(sin + position * HALF + at)[None, :]
        turned_low = low.to(tl.float32) * c - high.to(tl.float32) * s
        turned_high = high.to(tl.float32) * c + low.to(tl.float32) * s
        low = turned_low.to(low.dtype)
        high = turned_high.to(high.dtype)
    if is_query:
        tl.store(qkv + token * row_stride + offset, low, mask=inside)
        tl.store(qkv + token * row_stride + offset + HALF, high, mask=inside)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        # Rows that only fill a graph's batch have no slot.
        kept = inside & (slot >= 0)
        place = slot * slot_stride + head[:, None] * (2 * HALF) + at[None, :]
        cache = values
        if is_key:
            cache = keys
        tl.store(cache + place, low, mask=kept)
        tl.store(cache + place + HALF, high, mask=kept)


def rope_store(
    qkv: torch.Tensor,
    *,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    angles: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    q_heads: int,
    eps: float,
) -> None:
    """Per-head norms and rotary embedding on qkv [T, (Hq + 2 Hkv) x D]; stores K and V at their slots.

    Queries are turned in place. `angles` are cosines and sines, float32 [positions, D / 2]; `keys` and `values` are
    one layer of the cache, [slots, Hkv, D]; a slot below 0 stores nothing. `positions` and `slots` are [T], integers.
    """
    kv_heads, head_dim = keys.shape[1], keys.shape[2]
    heads = min(8, triton.next_power_of_2(kv_heads))
    grid = (qkv.shape[0], -(-q_heads // heads) + 2 * -(-kv_heads // heads))
    q_norm, k_norm = norms or (qkv, qkv)
    _rope_store[grid](
        qkv, q_norm, k_norm, *angles, positions, slots, keys, values, eps,
        qkv.stride(0), keys.stride(0), q_heads, kv_heads,
        HAS_NORM=norms is not None, HALF=head_dim // 2, HEADS=heads, num_warps=4,
    )  # fmt: skip


@triton.jit
def _silu_mul(gate_up, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_up + row * 2 * size + at, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * size + size + at, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    tl.store(out + row * size + at, (wide / (1.0 + tl.exp(-wide))).to(gate.dtype) * up, mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 I], gate before up, to silu(gate) * up [T, I]."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, size))
    block = min(2048, triton.next_power_of_2(size))
    _silu_mul[(rows, triton.cdiv(size, block))](gate_up, out, size, BLOCK=block, num_warps=4)
    return out


@triton.jit
def _stream_row(
    x, weight, out, columns, size, PAIRED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < columns
    k = tl.arange(0, BLOCK_K)
    rows = n.to(tl.int64)[:, None] * size + k[None, :]
    first = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    second = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(0, size, BLOCK_K):
        within = inside[:, None] & (start + k < size)[None, :]
        value = tl.load(x + start + k, mask=start + k < size, other=0.0).to(tl.float32)[None, :]
        first += tl.load(weight + rows + start, mask=within, other=0.0).to(tl.float32) * value
        if PAIRED:
            up = weight + columns.to(tl.int64) * size
            second += tl.load(up + rows + start, mask=within, other=0.0).to(tl.float32) * value
    result = tl.sum(first, axis=1)
    if PAIRED:
        gate = result.to(out.dtype.element_ty).to(tl.float32)
        up_sum = tl.sum(second, axis=1).to(out.dtype.element_ty)
        result = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty) * up_sum
    tl.store(out + n, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _stream_rows(
    x, weight, out, count, columns, size,
    PAIRED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    inside = n < columns
    rows = n.to(tl.int64)[:, None] * size + k[None, :]
    first = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    second = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start in range(0, size, BLOCK_K):
        within = inside[:, None] & (start + k < size)[None, :]
        value = tl.load(
            x + m[None, :] * size + (start + k)[:, None],
            mask=(m < count)[None, :] & (start + k < size)[:, None],
            other=0.0,
        )
        # The matrix is the left operand: its rows, not the few tokens, fill the tensor cores.
        first = tl.dot(
            tl.load(weight + rows + start, mask=within, other=0.0), value, first, input_precision="ieee"
        )
        if PAIRED:
            up = weight + columns.to(tl.int64) * size
            second = tl.dot(
                tl.load(up + rows + start, mask=within, other=0.0), value, second, input_precision="ieee"
            )
    result = first
    if PAIRED:
        gate = first.to(out.dtype.element_ty).to(tl.float32)
        up_sum = second.to(out.dtype.element_ty)
        result = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty) * up_sum
    place = m[None, :] * columns + n[:, None]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside[:, None] & (m < count)[None, :])


Tiles = tuple[int, int, int, int]
"""(rows of the matrix a program, its columns a turn, warps, pipeline stages)."""


def tiles_of(rows: int, columns: int, *, gated: bool) -> Tiles | None:
    """How `skinny` cuts a matrix of that many output columns; None where cuBLAS is faster, or the rows too many.

    Measured with the matrices of an 8 B model on an H200 (bench/gpu.sh products).
    """
    if rows == 1:
        return (2, 2048, 4, 1) if gated else (8, 1024, 4, 1)
    if rows <= SKINNY_ROWS_MAX and (gated or columns >= 32768):
        return (64, 128, 4, 4)
    return None


def skinny(x: torch.Tensor, weight: torch.Tensor, tiles: Tiles, *, gated: bool = False) -> torch.Tensor:
    """x [T, K] times weight [N, K] transposed, T at most SKINNY_ROWS_MAX, contiguous and of 16 bits: [T, N].

    `gated`: the weight is a gate above an up projection, the result silu(gate) * up, [T, N / 2].
    """
    rows, size = x.shape
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    out = x.new_empty((rows, columns))
    block_n, block_k, warps, stages = tiles
    grid = (triton.cdiv(columns, block_n),)
    if rows == 1:
        _stream_row[grid](
            x, weight, out, columns, size, PAIRED=gated, BLOCK_N=block_n, BLOCK_K=block_k,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    else:
        block_m = max(16, triton.next_power_of_2(rows))
        _stream_rows[grid](
            x, weight, out, rows, columns, size, PAIRED=gated, BLOCK_M=block_m, BLOCK_N=block_n,
            BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out
