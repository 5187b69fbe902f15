"""The fast block on a GPU: the same layer, made of Triton kernels and cuBLAS products.

A layer is nine launches, none of which waits for the host: norm, qkv, rotary + store, attention (two), output,
norm, gate and up, down; `silu` is inside the product for few rows. Decode steps through all layers are replayed as
CUDA graphs once `cuda_graphs` has captured them; a slice, and whatever was not captured, runs as it is written here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from layercast_agent.engine.architectures import ModelShape
from layercast_agent.engine.attention import BatchPlan
from layercast_agent.engine.fast import EMBED, LM_HEAD, NORM, FastModel, LayerWeights, Projection, Ties
from layercast_agent.engine.kv import KVCache
from layercast_agent.engine.llama import LlamaShape
from layercast_agent.engine.tables import Tables


def triton_missing(sizes: LlamaShape) -> str | None:
    """Why the Triton kernels cannot run a model of these sizes; None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if sizes.head_dim < 16 or sizes.head_dim & (sizes.head_dim - 1):
        return f"heads of {sizes.head_dim} are not a power of two of at least 16"
    return None


class CudaModel(FastModel):
    """A `LayeredModel` of the Llama family on a GPU. On a CPU it runs in Triton's interpreter, for tests."""

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        shape: ModelShape,
        device: torch.device,
        ranks: Ties | None = None,
    ) -> None:
        """As FastModel. Needs `triton_missing` to be None."""
        super().__init__(config=config, shape=shape, device=device, ranks=ranks)
        # Imported here: without Triton this module must still say why it cannot be used.
        from layercast_agent.engine import triton_attention, triton_ops
        from layercast_agent.engine.cuda_graphs import DecodeGraphs
        from layercast_agent.engine.cuda_prepare import Preparation

        self._ops = triton_ops
        self._attend = triton_attention
        self._tile = triton_attention.prefill_tile(shape.dtype)
        positions = torch.arange(shape.context_length_max, device=device, dtype=torch.float32)
        angles = positions[:, None] * self._frequencies
        self._cos, self._sin = angles.cos() * self._rotary_scale, angles.sin() * self._rotary_scale
        # Several ranks would have to capture together: their steps stay eager.
        self._graphs = DecodeGraphs(self) if device.type == "cuda" and ranks is None else None
        self._preparation = Preparation(self.sizes, shape.dtype, device) if device.type == "cuda" else None

    @property
    def block(self) -> str:
        """Which implementation runs and with what."""
        return "fast/triton" + (f", {self._graphs.state}" if self._graphs else "")

    def prepare(self) -> None:
        """Returns when every kernel is compiled; without it the first batches of each kind wait for theirs."""
        if self._preparation is not None:
            self._preparation.wait(few=True)

    @torch.inference_mode()
    def run_layers(self, first: int, last: int, hidden: torch.Tensor, batch: BatchPlan) -> torch.Tensor:
        """As LayeredModel."""
        if self._preparation is not None:
            self._preparation.wait(few=len(hidden) <= self._ops.SKINNY_ROWS_MAX)
        if self._graphs is not None and (first, last) == (0, self.shape.layers):
            replayed = self._graphs.run(hidden, batch)
            if replayed is not None:
                return replayed
        tables = batch.once("cuda", lambda: Tables.of(batch, self._tile))
        return self.execute(first, last, hidden, batch.kv, tables)

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
            delta = self._total(self._linear(attended, weights.output))
            normed = ops.add_rms_norm(delta, residual, weights.post_norm, eps)
            delta = self._total(self._linear(self._gated(normed, weights.gate_up), weights.down))
        return residual if delta is None else residual.add_(delta)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As LayeredModel."""
        self._require(self.shape.layers + 1)
        if self.sizes.tied:
            self._require(0)
        normed = self._ops.rms_norm(hidden.contiguous(), self._parameters[NORM], self.sizes.norm_eps)
        head = self._parameters[EMBED if self.sizes.tied else LM_HEAD]
        return self._gathered(self._linear(normed, Projection(weights=(head,), biases=()))).float()

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
        if (tiles := self._tiles(x, projection, gated=False)) is not None:
            return self._ops.skinny(x, weights[0], tiles)
        parts = [
            functional.linear(x, weight, bias)
            for weight, bias in zip(weights, biases or (None,) * len(weights), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _gated(self, x: torch.Tensor, projection: Projection) -> torch.Tensor:
        """silu(gate) * up of x."""
        if (tiles := self._tiles(x, projection, gated=True)) is not None:
            return self._ops.skinny(x, projection.weights[0], tiles, gated=True)
        return self._ops.silu_mul(self._linear(x, projection))

    def _tiles(
        self, x: torch.Tensor, projection: Projection, *, gated: bool
    ) -> tuple[int, int, int, int] | None:
        """How our own kernel does this product; None when cuBLAS does it."""
        if len(projection.weights) > 1 or projection.biases or x.dtype.itemsize > 2 or x.shape[1] % 8:
            return None
        columns = projection.weights[0].shape[0] // (2 if gated else 1)
        return self._ops.tiles_of(x.shape[0], columns, gated=gated)
