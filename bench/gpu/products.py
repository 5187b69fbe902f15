"""Products of few rows with an 8 B model's matrices: cuBLAS beside our streaming kernel, in several tilings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench.gpu.part import Figures, Setting, main, seconds
from torch.nn import functional

MATRICES = {
    "qkv": (6144, 4096, False),
    "output": (4096, 4096, False),
    "gate_up": (28672, 4096, True),
    "down": (4096, 14336, False),
    "head": (128256, 4096, False),
}
ROW_TILES = (
    (1, 4096, 4, 1),
    (2, 2048, 4, 1),
    (4, 1024, 4, 1),
    (8, 1024, 4, 1),
    (8, 512, 4, 1),
    (16, 512, 8, 1),
)
ROWS_TILES = (
    (16, 256, 4, 4), (16, 512, 4, 3), (16, 256, 2, 5), (32, 128, 4, 5), (32, 256, 4, 3),
    (64, 128, 4, 4), (64, 64, 4, 6), (128, 64, 4, 5), (128, 128, 8, 4),
)  # fmt: skip
TURNS = 20


def measure(setting: Setting) -> Figures:
    """Share of the copy's bandwidth that each takes, in a graph over enough matrices to miss the cache."""
    if setting.device.type != "cuda":
        return {"products": "need a GPU"}
    from layercast_agent.engine import triton_ops

    ceiling = float(setting.known.get("copy_gb_per_s", 3000.0)) * 1e9
    for name, (rows, columns, gated) in MATRICES.items():
        nbytes = 2 * rows * columns
        copies = max(2, (200 << 20) // nbytes + 1)
        weights = [
            torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) / 64 for _ in range(copies)
        ]
        for count in (1, 32):
            x = torch.randn(count, columns, device="cuda", dtype=torch.bfloat16)
            plain = _plain(x, gated)
            line = [f"cublas {_share(plain, weights, ceiling):.2f}"]
            for tiles in ROW_TILES if count == 1 else ROWS_TILES:
                line.append(
                    _try(
                        partial(triton_ops.skinny, x, tiles=tiles, gated=gated),
                        tiles,
                        weights,
                        plain,
                        ceiling,
                    )
                )
            print(f"{name:8s} {count:3d} rows: " + "  ".join(line), flush=True)
    _attention(ceiling)
    return {"products": "see the log"}


def _attention(ceiling: float) -> None:
    """Decode attention of an 8 B model's layer: 32 query heads, 8 KV heads of 128, by tiles and splits."""
    from layercast_agent.engine.triton_attention import decode_attention

    for spans, length in ((1, 640), (32, 640), (32, 2048)):
        pages = -(-length // 16)
        table = torch.randperm(spans * pages, device="cuda", dtype=torch.int32).view(spans, pages)
        caches = [
            torch.randn(2, spans * pages * 16, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4)
        ]
        q = torch.randn(spans, 6144, device="cuda", dtype=torch.bfloat16)
        rows = torch.arange(spans, device="cuda", dtype=torch.int32)
        lengths = torch.full_like(rows, length)
        out = q.new_empty((spans, 4096))
        common = {"rows": rows, "lengths": lengths, "pages": table, "out": out, "page_size": 16, "scale": 0.1}
        line = []
        for tiles in (
            (64, 4, 3),
            (32, 4, 4),
            (64, 4, 4),
            (64, 8, 3),
            (128, 4, 2),
            (128, 8, 3),
            (32, 2, 4),
            (64, 2, 3),
        ):
            for splits in (8, 16, 32) if spans == 1 else (1, 2, 4, 8):
                run = partial(_attend, decode_attention, q, common | {"splits": splits, "tiles": tiles})
                line.append(f"{tiles}/{splits} {_share(run, caches, ceiling, spans * length * 4096):.2f}")
        print(f"attention of {spans} x {length}: " + "  ".join(line), flush=True)


def _attend(
    decode: Callable[..., None], q: torch.Tensor, options: dict[str, Any], cache: torch.Tensor
) -> None:
    decode(q, cache[0], cache[1], **options)


def _plain(x: torch.Tensor, gated: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(weight: torch.Tensor) -> torch.Tensor:
        product = functional.linear(x, weight)
        if not gated:
            return product
        gate, up = product.chunk(2, dim=1)
        return functional.silu(gate) * up

    return run


def _try(
    product: Callable[[torch.Tensor], torch.Tensor],
    tiles: tuple[int, ...],
    weights: list[torch.Tensor],
    plain: Callable[[torch.Tensor], torch.Tensor],
    ceiling: float,
) -> str:
    try:
        reference = plain(weights[0]).float()
        error = float((product(weights[0]).float() - reference).norm() / reference.norm())
        share = _share(product, weights, ceiling)
    except Exception as refused:
        return f"{tiles} {type(refused).__name__}"
    return f"{tiles} {share:.2f}" + ("" if error < 0.02 else f" WRONG {error:.1e}")


def _share(
    function: Callable[[torch.Tensor], object],
    weights: list[torch.Tensor],
    ceiling: float,
    nbytes: int | None = None,
) -> float:
    function(weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(TURNS):
            function(weights[turn % len(weights)])
    return (
        TURNS
        * (nbytes or weights[0].nbytes)
        / seconds(graph.replay, torch.device("cuda"), repeat=5, warm=1)
        / ceiling
    )


if __name__ == "__main__":
    main(measure)
