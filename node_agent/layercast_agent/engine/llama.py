"""What the fast block knows of the Llama family: sizes, names of parameters, and which models it can run.

Llama 2 and 3, SmolLM, Mistral, Qwen 2, 2.5 and 3 are one layer with switches: biases, norms of queries and keys,
sliding windows. Whatever has a switch that is not here is left to the generic block, by a sentence that says why.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from layercast_agent.tensor_parallel import Split, span_of

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""`model_type`s that are tested against transformers, token by token."""

ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """The switches of one model. `windows[layer]`: tokens that the layer's attention sees; None sees all."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab_size: int
    norm_eps: float
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    tied: bool

    @property
    def scale(self) -> float:
        """Factor of the products of queries and keys."""
        return float(self.head_dim**-0.5)

    def layer_shapes(self) -> Shapes:
        """The parameters of one layer, by their name inside it."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        matrices = {
            "self_attn.q_proj": (queries, self.hidden_size),
            "self_attn.k_proj": (keys, self.hidden_size),
            "self_attn.v_proj": (keys, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, queries),
            "mlp.gate_proj": (self.inner, self.hidden_size),
            "mlp.up_proj": (self.inner, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.inner),
        }
        shapes: Shapes = {f"{name}.weight": size for name, size in matrices.items()}
        shapes |= {f"{name}.bias": size[:1] for name, size in matrices.items() if self._biased(name)}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{norm}.weight"] = (self.hidden_size,)
        if self.qk_norm:
            shapes |= {f"self_attn.{norm}.weight": (self.head_dim,) for norm in ("q_norm", "k_norm")}
        return shapes

    def shapes(self) -> Shapes:
        """Every stored parameter of the model, tied ones once, by its name in a checkpoint."""
        shapes: Shapes = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            "model.norm.weight": (self.hidden_size,),
        }
        for layer in range(len(self.windows)):
            shapes |= {f"model.layers.{layer}.{name}": size for name, size in self.layer_shapes().items()}
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def share(self, split: Split) -> LlamaShape:
        """The sizes of one rank's share; hidden and vocabulary stay the model's."""
        heads, kv_heads = span_of(self.heads, split.rank, split.ranks), split.kv_heads_held
        inner = span_of(self.inner, split.rank, split.ranks)
        return replace(
            self, heads=heads[1] - heads[0], kv_heads=kv_heads[1] - kv_heads[0], inner=inner[1] - inner[0]
        )

    def _biased(self, matrix: str) -> bool:
        if matrix.startswith("mlp."):
            return self.mlp_bias
        return self.output_bias if matrix.endswith("o_proj") else self.qkv_bias


def read(config: Any) -> LlamaShape | str:
    """The shape of a model from its config as transformers reads it, or why the fast block cannot run it."""
    family = str(config.model_type)
    if family not in FAMILIES:
        return f"it has no {family} layer"
    if config.hidden_act != "silu":
        return f"its activation is silu, not {config.hidden_act}"
    rope = config.rope_parameters
    if rope.get("rope_type") not in ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"it does not know rotary embeddings {dict(rope)}"
    heads = config.num_attention_heads
    biased = family != "mistral" and bool(getattr(config, "attention_bias", False))
    return LlamaShape(
        hidden_size=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        inner=config.intermediate_size,
        vocab_size=config.vocab_size,
        norm_eps=config.rms_norm_eps,
        qkv_bias=biased or family == "qwen2",
        output_bias=biased and family != "qwen2",
        mlp_bias=family == "llama" and bool(config.mlp_bias),
        qk_norm=family == "qwen3",
        windows=_windows(config, family),
        tied=bool(config.tie_word_embeddings),
    )


def _windows(config: Any, family: str) -> tuple[int | None, ...]:
    layers: int = config.num_hidden_layers
    if family == "mistral":
        return (config.sliding_window,) * layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in kinds)
