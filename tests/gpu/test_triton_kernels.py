"""Every Triton kernel equals the same computation written out in torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import silu

PAGE = 16


def _random(*size: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(*size, generator=generator).to(device, dtype)


def _close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[actual.dtype]
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < limit, f"relative error {error:.2e}"


# The interpreter has no arithmetic in bfloat16.
DTYPES = [torch.float32, torch.bfloat16 if torch.cuda.is_available() else torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 96, 576])
def test_rms_norm(device: torch.device, dtype: torch.dtype, size: int) -> None:
    from layercast_agent.engine import triton_ops

    x, delta = (_random(3, size, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    weight = _random(size, dtype=dtype, device=device, seed=2)
    total = x + delta
    wide = total.float()
    expected = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype) * weight
    residual = x.clone()
    _close(triton_ops.add_rms_norm(delta, residual, weight, 1e-6), expected)
    assert torch.equal(residual, total)
    _close(triton_ops.rms_norm(total, weight, 1e-6), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_mul(device: torch.device, dtype: torch.dtype) -> None:
    from layercast_agent.engine import triton_ops

    gate_up = _random(5, 2 * 352, dtype=dtype, device=device)
    gate, up = gate_up.chunk(2, dim=1)
    _close(triton_ops.silu_mul(gate_up), silu(gate) * up)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_skinny_product(device: torch.device, rows: int, gated: bool) -> None:
    """Sizes that no tile divides."""
    from layercast_agent.engine import triton_ops

    dtype = DTYPES[1]
    tiles = triton_ops.tiles_of(rows, 1 << 20, gated=gated)
    assert tiles is not None
    x = _random(rows, 328, dtype=dtype, device=device)
    weight = _random(2 * 104, 328, dtype=dtype, device=device, seed=1) / 18
    expected = (x.float() @ weight.float().T).to(dtype)
    if gated:
        gate, up = expected.chunk(2, dim=1)
        expected = silu(gate) * up
    _close(triton_ops.skinny(x, weight, tiles, gated=gated), expected)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("q_heads", "kv_heads", "dim"), [(4, 2, 16), (9, 3, 64), (2, 2, 32)])
def test_rope_and_store(device: torch.device, q_heads: int, kv_heads: int, dim: int, *, norm: bool) -> None:
    from layercast_agent.engine import triton_ops

    dtype, tokens = torch.float32, 4
    qkv = _random(tokens, (q_heads + 2 * kv_heads) * dim, dtype=dtype, device=device)
    gains = tuple(_random(dim, dtype=dtype, device=device, seed=s) for s in (1, 2)) if norm else None
    angle = torch.outer(torch.arange(40.0), 0.7 ** torch.arange(dim // 2)).to(device)
    positions = torch.tensor([3, 0, 39, 7], device=device)
    slots = torch.tensor([5, -1, 0, 63], device=device)
    keys, values = (torch.full((64, kv_heads, dim), 7.0, device=device) for _ in range(2))
    heads = qkv.clone().view(tokens, -1, dim)
    q, k, v = torch.split(heads, [q_heads, kv_heads, kv_heads], dim=1)
    if gains is not None:
        q, k = (
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * gain
            for x, gain in zip((q, k), gains, strict=True)
        )
    cos, sin = (f(angle[positions]).repeat(1, 2)[:, None] for f in (torch.cos, torch.sin))
    q, k = (x * cos + torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], dim=-1) * sin for x in (q, k))
    triton_ops.rope_store(
        qkv,
        norms=gains,  # type: ignore[arg-type]
        angles=(angle.cos(), angle.sin()),
        positions=positions,
        slots=slots,
        keys=keys,
        values=values,
        q_heads=q_heads,
        eps=1e-6,
    )
    _close(qkv.view(tokens, -1, dim)[:, :q_heads], q)
    stored = slots >= 0
    for cache, expected in ((keys, k), (values, v)):
        _close(cache[slots[stored]], expected[stored])
        untouched = torch.ones(64, dtype=torch.bool, device=device)
        untouched[slots[stored]] = False
        assert (cache[untouched] == 7.0).all(), "a token without a slot stores nothing"


def _cache(
    pages: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    slots = pages * PAGE
    return (
        _random(slots, kv_heads, dim, dtype=dtype, device=device, seed=5),
        _random(slots, kv_heads, dim, dtype=dtype, device=device, seed=6),
    )


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, window: int | None
) -> torch.Tensor:
    """q [T, Hq, D] at positions from `start`, keys and values [S, Hkv, D], in double precision."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("thd,shd->hts", q.double(), keys) / math.sqrt(q.shape[-1])
    asked = torch.arange(start, start + q.shape[0], device=q.device)[:, None]
    known = torch.arange(keys.shape[0], device=q.device)[None]
    hidden = known > asked
    if window is not None:
        hidden |= known <= asked - window
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -math.inf).softmax(-1), values)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("q_heads", "kv_heads", "dim"), [(4, 2, 16), (9, 3, 64)])
def test_decode_attention(
    device: torch.device, q_heads: int, kv_heads: int, dim: int, *, dtype: torch.dtype, window: int | None
) -> None:
    from layercast_agent.engine.triton_attention import decode_attention

    lengths = [1, 0, 130, 64]
    keys, values = _cache(40, kv_heads, dim, dtype, device)
    table = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:36].view(4, 9).to(device)
    q = _random(6, (q_heads + 2) * dim, dtype=dtype, device=device)
    out = torch.full((6, q_heads * dim), math.nan, dtype=dtype, device=device)
    rows = [4, 0, 2, 5]
    for splits in (1, 3):
        decode_attention(
            q,
            keys,
            values,
            rows=torch.tensor(rows, dtype=torch.int32, device=device),
            lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
            pages=table.to(torch.int32),
            out=out,
            page_size=PAGE,
            scale=dim**-0.5,
            window=window,
            splits=splits,
        )
        for span, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            slots = (table[span][:, None] * PAGE + torch.arange(PAGE, device=device)).flatten()[:length]
            query = q[row, : q_heads * dim].view(1, q_heads, dim)
            if length == 0:
                assert (out[row] == 0).all()
                continue
            expected = _attend(query, keys[slots], values[slots], length - 1, window)
            _close(out[row].view(1, q_heads, dim), expected)
        assert out[1].isnan().all(), "rows of nobody are not written"


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_attention(device: torch.device, dtype: torch.dtype, window: int | None) -> None:
    """A whole prompt, a chunk behind a prefix, and a chunk of one token less than a tile."""
    from layercast_agent.engine.triton_attention import prefill_attention, prefill_tile

    q_heads, kv_heads, dim = 4, 2, 16
    tile = prefill_tile(dtype)
    spans = [(0, 40), (37, tile + 5), (3, tile - 1)]
    keys, values = _cache(40, kv_heads, dim, dtype, device)
    table = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:33].view(3, 11).to(device)
    total = sum(count for _, count in spans)
    q = _random(total, (q_heads + 4) * dim, dtype=dtype, device=device)
    out = torch.full((total, q_heads * dim), math.nan, dtype=dtype, device=device)
    rows = [0, 40, 40 + tile + 5]
    tiles = [(i, at) for i, (_, count) in enumerate(spans) for at in range(0, count, tile)]

    def table32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    prefill_attention(
        q,
        keys,
        values,
        tiles=(table32([i for i, _ in tiles]), table32([at for _, at in tiles])),
        rows=table32(rows),
        starts=table32([start for start, _ in spans]),
        counts=table32([count for _, count in spans]),
        pages=table.to(torch.int32),
        out=out,
        page_size=PAGE,
        scale=dim**-0.5,
        window=window,
    )
    for span, ((start, count), row) in enumerate(zip(spans, rows, strict=True)):
        slots = (table[span][:, None] * PAGE + torch.arange(PAGE, device=device)).flatten()[: start + count]
        query = q[row : row + count, : q_heads * dim].view(count, q_heads, dim)
        expected = _attend(query, keys[slots], values[slots], start, window)
        _close(out[row : row + count].view(count, q_heads, dim), expected)
