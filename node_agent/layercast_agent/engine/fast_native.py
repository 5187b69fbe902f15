"""Layers of the fast block on a CPU, by the C++ of `layer.cpp`: two calls a layer, nothing else per layer in Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from layercast_agent.engine import native
from layercast_agent.engine.attention import BatchPlan
from layercast_agent.engine.llama import LlamaShape

if TYPE_CHECKING:
    from layercast_agent.engine.fast import LayerWeights, Projection

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """What all layers of a batch have in common. `cos`, `sin` [T, D / 2] float32: the tokens' rotary angles."""

    batch: BatchPlan
    cos: torch.Tensor
    sin: torch.Tensor


class NativeRunner:
    """Layers and the head over a loaded build."""

    def __init__(self, library: native.Library, sizes: LlamaShape, dtype: torch.dtype) -> None:
        self._library = library
        self._shape = native.Shape(
            hidden=sizes.hidden_size,
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            inner=sizes.inner,
            bfloat16=dtype is torch.bfloat16,
            eps=sizes.norm_eps,
            scale=sizes.scale,
        )
        self._windows = sizes.windows
        self._layers: dict[int, tuple[LayerWeights, native.Layer]] = {}
        self._work = torch.empty(0)
        self._batch: tuple[Step, native.Batch, tuple[torch.Tensor, ...]] | None = None

    @property
    def name(self) -> str:
        """For status."""
        return f"cpp-{self._library.name}"

    def layer(self, index: int, weights: LayerWeights, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        """Hidden states [T, hidden size] through one layer; stores the KV of the step's tokens."""
        layer, batch = self._described(index, weights), self._described_batch(step)
        kv = step.batch.kv
        hidden = hidden.contiguous()
        attended, result = torch.empty_like(hidden), torch.empty_like(hidden)
        self._library.attention(
            self._shape,
            layer,
            batch,
            hidden=hidden,
            result=attended,
            keys=kv.key(index),
            values=kv.value(index),
            work=self._work,
        )
        self._library.mlp(self._shape, layer, hidden=attended, result=result, work=self._work)
        return result

    def logits(self, hidden: torch.Tensor, norm: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Norm, then the product with the head's matrix [vocabulary, hidden size]: [N, vocabulary] float32."""
        return self._library.head(self._shape, hidden=hidden.contiguous(), norm=norm, matrix=matrix)

    def _described(self, index: int, weights: LayerWeights) -> native.Layer:
        known = self._layers.get(index)
        if known is not None and known[0] is weights:
            return known[1]
        layer = native.Layer(
            qkv=(native.Matrix * 3)(*_matrices(weights.qkv)),
            output=_matrices(weights.output)[0],
            gate_up=(native.Matrix * 2)(*_matrices(weights.gate_up)),
            down=_matrices(weights.down)[0],
            input_norm=native.pointer(weights.input_norm),
            post_norm=native.pointer(weights.post_norm),
            query_norm=None if weights.query_norm is None else native.pointer(weights.query_norm),
            key_norm=None if weights.key_norm is None else native.pointer(weights.key_norm),
            window=self._windows[index] or 0,
        )
        self._layers[index] = (weights, layer)
        return layer

    def _described_batch(self, step: Step) -> native.Batch:
        if self._batch is not None and self._batch[0] is step:
            return self._batch[1]
        tables, plan = step.batch.tables, step.batch
        tokens = len(plan.slots)
        held = (
            tables.pages,
            tables.stops,
            tables.offsets,
            plan.slots,
            step.cos.contiguous(),
            step.sin.contiguous(),
        )
        batch = native.Batch(
            tokens,
            len(tables.stops),
            tables.pages.shape[1],
            plan.kv.page_size,
            *(native.pointer(tensor) for tensor in held),
        )
        self._batch = (step, batch, held)
        self._work = self._library.work(self._shape, tokens)
        return batch


def _matrices(projection: Projection) -> list[native.Matrix]:
    """The parts of a projection; one part stands for all where they lie side by side."""
    biases = projection.biases or (None,) * len(projection.weights)
    return [
        native.Matrix(weight=w.data_ptr(), bias=None if b is None else b.data_ptr(), rows=len(w))
        for w, b in zip(projection.weights, biases, strict=True)
    ]
