"""The numbers that everything else needs to know of a model, read from its config before any memory is planned."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from layercast_agent.errors import CheckpointError, UnsupportedArchitectureError
from layercast_agent.families import family_of

ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn", "proportional"})
"""Rotary embeddings whose angles depend on the position only. The others (dynamic, longrope) depend on the longest
sequence of the batch, so a request's tokens would depend on its company."""

DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Names as safetensors and as torch write them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a model. `tied`: the head uses the embedding matrix, there is no `lm_head.weight`.

    `head_dim` is that of keys; values may be narrower (multi-head latent attention) and are padded in the cache.
    """

    layers: int
    hidden_size: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length_max: int
    dtype: torch.dtype
    tied: bool

    @property
    def kv_row_bytes(self) -> int:
        """K and V of one position in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


def shape_of(config: Mapping[str, Any], dtype: str) -> ModelShape:
    """Sizes of the model that a config.json describes. `dtype` as in DTYPES.

    Raises UnsupportedArchitectureError naming what is not supported, CheckpointError for a malformed config.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} cannot be served; {', '.join(DTYPES)} can")
    parsed = transformers_config(config)
    kv_heads, head_dim = _kv_size(parsed)
    return ModelShape(
        layers=parsed.num_hidden_layers,
        hidden_size=parsed.hidden_size,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=parsed.vocab_size,
        context_length_max=parsed.max_position_embeddings,
        dtype=DTYPES[dtype],
        tied=bool(parsed.tie_word_embeddings),
    )


def _kv_size(parsed: Any) -> tuple[int, int]:
    """Heads of the KV cache and the elements of each."""
    heads = int(parsed.num_attention_heads)
    if getattr(parsed, "kv_lora_rank", None):
        # Latent attention, cached after its expansion: every head has keys of its own.
        head_dim = int(parsed.qk_nope_head_dim) + int(parsed.qk_rope_head_dim)
        if int(parsed.v_head_dim) > head_dim:
            raise UnsupportedArchitectureError("values wider than keys are not supported", file="config.json")
        return heads, head_dim
    kv_heads = getattr(parsed, "num_key_value_heads", None) or heads
    return int(kv_heads), int(getattr(parsed, "head_dim", None) or parsed.hidden_size // heads)


def transformers_config(config: Mapping[str, Any]) -> Any:
    """The config as transformers reads it, defaults filled in. Raises as `shape_of`."""
    # Seconds to import; a worker pays for it while it warms up.
    from transformers import CONFIG_MAPPING

    family = family_of(config)
    try:
        parsed = CONFIG_MAPPING[family].from_dict(deepcopy(dict(config)))
    except Exception as error:
        # transformers raises whatever its validators raise; all of it means the same here.
        raise CheckpointError(f"not usable: {type(error).__name__}: {error}", file="config.json") from error
    rope = getattr(parsed, "rope_parameters", None)
    fixed = isinstance(rope, Mapping) and bool(rope.get("alpha"))  # HunYuan's "dynamic" depends on nothing
    for name in _rope_types(rope):
        if name not in ROPE_TYPES and not fixed:
            raise UnsupportedArchitectureError(
                f"rotary embeddings of type {name!r} are not supported", file="config.json"
            )
    return parsed


def _rope_types(parameters: Any) -> list[str]:
    """One name, or one for each kind of layer."""
    if not isinstance(parameters, Mapping):
        return []
    if "rope_type" in parameters:
        return [str(parameters["rope_type"])]
    return [name for nested in parameters.values() for name in _rope_types(nested)]
