"""The fast block on a GPU: the same layer, made of Triton kernels and cuBLAS products.

A layer is nine launches, none of which waits for the host: norm, qkv, rotary + store, attention (two), output,
norm, gate and up, down; `silu` is inside the product for few rows. Decode steps through all layers are replayed as
CUDA graphs once `cuda_graphs` has captured them; a slice, and whatever was not captured, runs as it is written here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from layercast_agent.engine.architectures import ModelShape
from layercast_agent.engine.attention import BatchPlan, Span
from layercast_agent.engine.fast import EMBED, LM_HEAD, NORM, FastModel, LayerWeights, Projection
from layercast_agent.engine.kv import KVCache
from layercast_agent.engine.llama import LlamaShape


def triton_missing(sizes: LlamaShape) -> str | None:
    """Why the Triton kernels cannot run a model of these sizes; None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if sizes.head_dim < 16 or sizes.head_dim & (sizes.head_dim - 1):
        return f"heads of {sizes.head_dim} are not a power of two of at least 16"
    return None


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
    """What the kernels know of a batch of T tokens; made once a step. `positions` and `slots` are int64 [T]."""

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


def page_table(spans: Sequence[Span], page_size: int) -> np.ndarray[Any, np.dtype[np.int32]]:
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
    there = torch.from_numpy(whole).to(device)
    return tuple(there[start : start + len(column)] for start, column in zip(starts, flat, strict=False))


class CudaModel(FastModel):
    """A `LayeredModel` of the Llama family on a GPU. On a CPU it runs in Triton's interpreter, for tests."""

    def __init__(self, *, config: Mapping[str, Any], shape: ModelShape, device: torch.device) -> None:
        """Raises as FastModel. Needs `triton_missing` to be None."""
        super().__init__(config=config, shape=shape, device=device)
        # Imported here: without Triton this module must still say why it cannot be used.
        from layercast_agent.engine import triton_attention, triton_ops
        from layercast_agent.engine.cuda_graphs import DecodeGraphs

        self._ops = triton_ops
        self._attend = triton_attention
        self._tile = triton_attention.prefill_tile(shape.dtype)
        self._stream_rows_max = triton_ops.SKINNY_ROWS_MAX if shape.dtype.itemsize == 2 else 0
        positions = torch.arange(shape.context_length_max, device=device, dtype=torch.float32)
        angles = positions[:, None] * self._frequencies
        self._cos, self._sin = angles.cos() * self._rotary_scale, angles.sin() * self._rotary_scale
        self._graphs = DecodeGraphs(self) if device.type == "cuda" else None

    @property
    def block(self) -> str:
        """Which implementation runs and with what."""
        return "fast/triton" + (f", {self._graphs.state}" if self._graphs else "")

    @torch.inference_mode()
    def run_layers(self, first: int, last: int, hidden: torch.Tensor, batch: BatchPlan) -> torch.Tensor:
        """As LayeredModel."""
        if self._graphs is not None and (first, last) == (0, self.shape.layers):
            replayed = self._graphs.run(hidden, batch)
            if replayed is not None:
                return replayed
        return self.execute(first, last, hidden, batch.kv, Tables.of(batch, self._tile))

    def execute(
        self, first: int, last: int, hidden: torch.Tensor, kv: KVCache, tables: Tables
    ) -> torch.Tensor:
        """`run_layers` without a look at the host: every number that changes from step to step is in `tables`."""
        ops, eps = self._ops, self.sizes.norm_eps
        # Added to in place.
        residual = hidden.clone()
        delta: torch.Tensor | None = None
        for layer in range(first, last):
            weights = self._weights(layer)
            if delta is None:
                normed = ops.rms_norm(residual, weights.input_norm, eps)
            else:
                normed = ops.add_rms_norm(delta, residual, weights.input_norm, eps)
            attended = self._attention_of(layer, normed, weights, kv, tables)
            delta = self._linear(attended, weights.output)
            normed = ops.add_rms_norm(delta, residual, weights.post_norm, eps)
            delta = self._linear(self._gated(normed, weights.gate_up), weights.down)
        return residual if delta is None else residual.add_(delta)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As LayeredModel."""
        self._require(self.shape.layers + 1)
        if self.sizes.tied:
            self._require(0)
        normed = self._ops.rms_norm(hidden.contiguous(), self._parameters[NORM], self.sizes.norm_eps)
        head = self._parameters[EMBED if self.sizes.tied else LM_HEAD]
        return self._linear(normed, Projection(weights=(head,), biases=())).float()

    def _attention_of(
        self, layer: int, normed: torch.Tensor, weights: LayerWeights, kv: KVCache, tables: Tables
    ) -> torch.Tensor:
        sizes = self.sizes
        qkv = self._linear(normed, weights.qkv)
        keys, values = kv.key(layer).flatten(0, 1), kv.value(layer).flatten(0, 1)
        norms = None
        if weights.query_norm is not None and weights.key_norm is not None:
            norms = (weights.query_norm, weights.key_norm)
        self._ops.rope_store(
            qkv,
            norms=norms,
            angles=(self._cos, self._sin),
            positions=tables.positions,
            slots=tables.slots,
            keys=keys,
            values=values,
            q_heads=sizes.heads,
            eps=sizes.norm_eps,
        )
        out = qkv.new_empty((qkv.shape[0], sizes.heads * sizes.head_dim))
        common: dict[str, Any] = {
            "out": out,
            "page_size": kv.page_size,
            "scale": sizes.scale,
            "window": sizes.windows[layer],
        }
        if (decodes := tables.decodes) is not None:
            self._attend.decode_attention(
                qkv, keys, values, rows=decodes.rows, lengths=decodes.lengths, pages=decodes.pages, **common
            )
        if (prefills := tables.prefills) is not None:
            self._attend.prefill_attention(
                qkv,
                keys,
                values,
                tiles=prefills.tiles,
                rows=prefills.rows,
                starts=prefills.starts,
                counts=prefills.counts,
                pages=prefills.pages,
                **common,
            )
        return out

    def _linear(self, x: torch.Tensor, projection: Projection) -> torch.Tensor:
        weights, biases = projection.weights, projection.biases
        if len(weights) == 1 and x.shape[0] <= self._stream_rows_max and x.shape[1] % 8 == 0:
            product = self._ops.skinny(x, weights[0])
            return product.add_(biases[0] if len(biases) == 1 else torch.cat(biases)) if biases else product
        parts = [
            functional.linear(x, weight, bias)
            for weight, bias in zip(weights, biases or (None,) * len(weights), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _gated(self, x: torch.Tensor, projection: Projection) -> torch.Tensor:
        """silu(gate) * up of x."""
        few = x.shape[0] <= self._stream_rows_max and x.shape[1] % 8 == 0
        if few and len(projection.weights) == 1 and not projection.biases:
            return self._ops.skinny(x, projection.weights[0], gated=True)
        return self._ops.silu_mul(self._linear(x, projection))
