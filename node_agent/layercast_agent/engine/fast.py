"""The fast block: a decoder layer of the Llama family, written out, over the packed segment where it lies.

The layout puts q, k and v, and gate and up, side by side, so each group is one matrix without a copy. What a layer is
made of comes from a `LayerKernels`: plain torch here, and better ones where a device has them. On a CPU a whole layer
is one piece of C++ where it can be built (`fast_native`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional

from layercast_agent.engine import fast_native, llama, native
from layercast_agent.engine.architectures import ModelShape, transformers_config
from layercast_agent.engine.attention import AttentionKernel, BatchPlan, Scoring, attention_for
from layercast_agent.errors import AgentError, CheckpointError, UnsupportedArchitectureError
from layercast_agent.layout import segment_index
from layercast_agent.tensor_parallel import Split, part_of, span_of

EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """y = x W' + b, with W and b in one or more parts by rows: one where they lie side by side in memory.

    `weights[i]` [rows, inputs]; `biases[i]` [rows], or none at all.
    """

    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, parameters: Mapping[str, torch.Tensor], names: Sequence[str]) -> Projection:
        """The matrices of these names, one below the other."""
        weights = tuple(parameters[f"{name}.weight"] for name in names)
        biases = tuple(parameters[f"{name}.bias"] for name in names if f"{name}.bias" in parameters)
        weight, bias = _stacked(weights), _stacked(biases)
        if weight is None or (biases and bias is None):
            return cls(weights=weights, biases=biases)
        return cls(weights=(weight,), biases=() if bias is None else (bias,))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """The parameters of one layer, as views."""

    qkv: Projection
    output: Projection
    gate_up: Projection
    down: Projection
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None


class LayerKernels(Protocol):
    """What a layer is made of. T tokens; results are new tensors unless said otherwise."""

    @property
    def name(self) -> str:
        """For status."""

    def linear(self, x: torch.Tensor, projection: Projection) -> torch.Tensor:
        """[T, inputs] to [T, rows of all parts]."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root-mean-square norm over the last dimension, of x of any strides."""

    def add_norm(
        self, delta: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(residual + delta, its norm)."""

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of x [T, heads, D] (any strides; may be overwritten) by angles [T, D / 2], float32."""

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[T, 2 N] to [T, N]: silu of the first half, times the second."""


class TorchKernels:
    """Plain torch, on any device."""

    name = "torch"

    def linear(self, x: torch.Tensor, projection: Projection) -> torch.Tensor:
        """As LayerKernels."""
        biases = projection.biases or (None,) * len(projection.weights)
        parts = [functional.linear(x, w, b) for w, b in zip(projection.weights, biases, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """As LayerKernels."""
        return functional.rms_norm(x, weight.shape, weight, eps)

    def add_norm(
        self, delta: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As LayerKernels."""
        total = residual + delta
        return total, self.norm(total, weight, eps)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """As LayerKernels."""
        cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """As LayerKernels."""
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up


def kernels_for(device: torch.device) -> LayerKernels:
    """The best implementation for a device."""
    return TorchKernels()


class Ties(Protocol):
    """What one rank of several does together with the others, all of them in the same order."""

    @property
    def split(self) -> Split:
        """Which share this rank has."""

    def total(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, in place."""

    def side_by_side(self, part: torch.Tensor, size: int) -> torch.Tensor:
        """All ranks' columns [N, share of size] as [N, size]."""


class FastModel:
    """A `LayeredModel` of the Llama family."""

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        shape: ModelShape,
        device: torch.device,
        kernels: LayerKernels | None = None,
        attention: AttentionKernel | None = None,
        ranks: Ties | None = None,
    ) -> None:
        """Raises as `shape_of`, and UnsupportedArchitectureError. `shape` comes from there.

        With `ranks` it is one rank's share of the model: its parameters are the parts that `tensor_parallel` deals.
        """
        parsed = transformers_config(config)
        sizes = llama.read(parsed)
        if isinstance(sizes, str):
            raise UnsupportedArchitectureError(f"the fast block cannot run it: {sizes}", file="config.json")
        self.shape = shape
        self.device = device
        self.sizes = sizes if ranks is None else sizes.share(ranks.split)
        self._ranks = ranks
        self._native: fast_native.NativeRunner | None = None
        if device.type == "cpu" and ranks is None and kernels is None and attention is None:
            self._native = _native_runner(sizes, shape.dtype)
        self._step: fast_native.Step | None = None
        self._kernels = kernels or kernels_for(device)
        self._attention = attention or attention_for(device)
        self._frequencies, self._rotary_scale = _rotary(parsed, device)
        self._scorings = [Scoring(scale=sizes.scale, window=window) for window in sizes.windows]
        self._parameters: dict[str, torch.Tensor] = {}
        self._missing: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shape.layers + 2)]
        for name, whole in sizes.shapes().items():
            part = None if ranks is None else part_of(name, whole, ranks.split)
            size = whole if part is None else part.shape(whole)
            self._missing[segment_index(name, shape.layers)][name] = size
        self._expected = [dict(missing) for missing in self._missing]
        self._layers: list[LayerWeights | None] = [None] * shape.layers

    @property
    def block(self) -> str:
        """Which implementation runs and with what."""
        if self._native is not None:
            return f"fast/{self._native.name}"
        return f"fast/{self._kernels.name}+{self._attention.name}"

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As LayeredModel."""
        for expected in self._expected:
            for name, size in expected.items():
                found = self._parameters.get(name)
                yield (
                    name,
                    torch.empty(size, dtype=self.shape.dtype, device="meta") if found is None else found,
                )

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """As LayeredModel."""
        for expected in self._expected:
            for name, size in expected.items():
                if name not in shapes:
                    raise CheckpointError("missing: the model needs it", tensor=name)
                if tuple(shapes[name]) != size:
                    raise CheckpointError(
                        f"shape {list(shapes[name])} where the model has {list(size)}", tensor=name
                    )
        for name in shapes:
            self._segment(name)

    def attach(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """As LayeredModel."""
        for name, tensor in tensors.items():
            segment = self._segment(name)
            expected = self._expected[segment][name]
            if tensor.shape != expected or tensor.dtype != self.shape.dtype:
                raise CheckpointError(
                    f"{tensor.dtype} {list(tensor.shape)} where the model has {self.shape.dtype} "
                    f"{list(expected)}",
                    tensor=name,
                )
            self._parameters[name] = tensor.contiguous()
            self._missing[segment].pop(name, None)
            if 0 < segment <= self.shape.layers:
                self._layers[segment - 1] = None

    @torch.inference_mode()
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """As LayeredModel."""
        self._require(0)
        table = self._parameters[EMBED]
        if self._ranks is None:
            return functional.embedding(token_ids, table)
        first, last = span_of(self.shape.vocab_size, self._ranks.split.rank, self._ranks.split.ranks)
        mine = (token_ids >= first) & (token_ids < last)
        rows = functional.embedding((token_ids - first).clamp(0, last - first - 1), table)
        return self._ranks.total(rows.masked_fill_(~mine[:, None], 0))

    @torch.inference_mode()
    def run_layers(self, first: int, last: int, hidden: torch.Tensor, batch: BatchPlan) -> torch.Tensor:
        """As LayeredModel."""
        step = self._step_of(batch)
        for layer in range(first, last):
            if self._native is not None:
                hidden = self._native.layer(layer, self._weights(layer), hidden, step)
            else:
                hidden = self._run_layer(layer, hidden, step.cos, step.sin, batch)
        return hidden

    def _step_of(self, batch: BatchPlan) -> fast_native.Step:
        """Made once a batch, so that calling layers one by one costs nothing."""
        if self._step is None or self._step.batch is not batch:
            angles = batch.positions[:, None].float() * self._frequencies
            cos, sin = angles.cos() * self._rotary_scale, angles.sin() * self._rotary_scale
            self._step = fast_native.Step(batch=batch, cos=cos, sin=sin)
        return self._step

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As LayeredModel."""
        self._require(self.shape.layers + 1)
        if self.sizes.tied:
            self._require(0)
        if self._native is not None:
            matrix = self._parameters[EMBED if self.sizes.tied else LM_HEAD]
            return self._native.logits(hidden, self._parameters[NORM], matrix)
        head = Projection(weights=(self._parameters[EMBED if self.sizes.tied else LM_HEAD],), biases=())
        normed = self._kernels.norm(hidden, self._parameters[NORM], self.sizes.norm_eps)
        return self._gathered(self._kernels.linear(normed, head)).float()

    def _total(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a product whose inputs are shared among them."""
        return partial if self._ranks is None else self._ranks.total(partial)

    def _gathered(self, logits: torch.Tensor) -> torch.Tensor:
        """The whole vocabulary's logits from this rank's."""
        return logits if self._ranks is None else self._ranks.side_by_side(logits, self.shape.vocab_size)

    def _run_layer(
        self, layer: int, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: BatchPlan
    ) -> torch.Tensor:
        kernels, sizes, weights = self._kernels, self.sizes, self._weights(layer)
        normed = kernels.norm(hidden, weights.input_norm, sizes.norm_eps)
        heads = kernels.linear(normed, weights.qkv).view(len(hidden), -1, sizes.head_dim)
        query, key, value = torch.split(heads, [sizes.heads, sizes.kv_heads, sizes.kv_heads], dim=1)
        if weights.query_norm is not None and weights.key_norm is not None:
            query = kernels.norm(query, weights.query_norm, sizes.norm_eps)
            key = kernels.norm(key, weights.key_norm, sizes.norm_eps)
        query, key = kernels.rotate(query, cos, sin), kernels.rotate(key, cos, sin)
        attended = self._attention(query, key, value, batch=batch, layer=layer, scoring=self._scorings[layer])
        delta = self._total(kernels.linear(attended.flatten(1), weights.output))
        hidden, normed = kernels.add_norm(delta, hidden, weights.post_norm, sizes.norm_eps)
        inner = kernels.silu_mul(kernels.linear(normed, weights.gate_up))
        return hidden + self._total(kernels.linear(inner, weights.down))

    def _weights(self, layer: int) -> LayerWeights:
        found = self._layers[layer]
        if found is not None:
            return found
        self._require(layer + 1)
        prefix = f"model.layers.{layer}."
        mine = {name.removeprefix(prefix): self._parameters[name] for name in self._expected[layer + 1]}
        # The biases of what is summed over ranks are whole on each of them and count once.
        once = mine if self._ranks is None or self._ranks.split.rank == 0 else _without_biases(mine)
        weights = LayerWeights(
            qkv=Projection.of(mine, QKV),
            output=Projection.of(once, ("self_attn.o_proj",)),
            gate_up=Projection.of(mine, GATE_UP),
            down=Projection.of(once, ("mlp.down_proj",)),
            input_norm=mine["input_layernorm.weight"],
            post_norm=mine["post_attention_layernorm.weight"],
            query_norm=mine.get("self_attn.q_norm.weight"),
            key_norm=mine.get("self_attn.k_norm.weight"),
        )
        self._layers[layer] = weights
        return weights

    def _require(self, segment: int) -> None:
        """A segment that is not attached must not be executed; whoever schedules knows what is resident."""
        if self._missing[segment]:
            raise AgentError(
                f"segment {segment} is executed, but {min(self._missing[segment])} is not attached"
            )

    def _segment(self, name: str) -> int:
        try:
            segment = segment_index(name, self.shape.layers)
        except CheckpointError:
            segment = -1
        if segment < 0 or name not in self._expected[segment]:
            raise CheckpointError("the model has no such parameter", tensor=name)
        return segment


def _native_runner(sizes: llama.LlamaShape, dtype: torch.dtype) -> fast_native.NativeRunner | None:
    """Layers in C++, where there is a build and it knows the model's numbers."""
    if dtype not in fast_native.DTYPES or sizes.head_dim % 2:
        return None
    library = native.library()
    return fast_native.NativeRunner(library, sizes, dtype) if isinstance(library, native.Library) else None


def _without_biases(parameters: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    return {name: tensor for name, tensor in parameters.items() if not name.endswith(".bias")}


def _stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The parts as one view where they lie behind each other in one memory; None otherwise, and for no parts."""
    if len(parts) < 2:
        return parts[0] if parts else None
    end = parts[0].data_ptr()
    memory = parts[0].untyped_storage().data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.untyped_storage().data_ptr() != memory or not part.is_contiguous():
            return None
        end += part.numel() * part.element_size()
    rows = sum(len(part) for part in parts)
    return parts[0].as_strided((rows, *parts[0].shape[1:]), parts[0].stride())


def _rotary(config: Any, device: torch.device) -> tuple[torch.Tensor, float]:
    """Frequencies [D / 2] and the factor of cosine and sine, as the model's own module computes them."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    with torch.inference_mode(mode=False):
        module = LlamaRotaryEmbedding(config)
    return module.inv_freq.to(device), float(module.attention_scaling)
