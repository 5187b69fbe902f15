"""Which models the engine runs, and the numbers that everything else needs to know of one.

transformers has some hundred decoder families whose layers can be called one by one; those in the table are the ones
whose tokens a test compares with `generate`, at every split. Everything else is refused by its name, before any
memory is planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from layercast_agent.errors import CheckpointError, UnsupportedArchitectureError

SUPPORTED: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "GptOssForCausalLM": "gpt_oss",
    "GraniteForCausalLM": "granite",
    "Olmo2ForCausalLM": "olmo2",
    "Phi3ForCausalLM": "phi3",
}
"""config.json's `architectures[0]` to its `model_type`."""

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
    """Sizes of a model. `tied`: the head uses the embedding matrix, there is no `lm_head.weight`."""

    layers: int
    hidden_size: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length_max: int
    dtype: torch.dtype
    tied: bool


def shape_of(config: Mapping[str, Any], dtype: str) -> ModelShape:
    """Sizes of the model that a config.json describes. `dtype` as in DTYPES.

    Raises UnsupportedArchitectureError naming what is not supported, CheckpointError for a malformed config.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} cannot be served; {', '.join(DTYPES)} can")
    parsed = transformers_config(config)
    heads = parsed.num_attention_heads
    return ModelShape(
        layers=parsed.num_hidden_layers,
        hidden_size=parsed.hidden_size,
        kv_heads=getattr(parsed, "num_key_value_heads", None) or heads,
        head_dim=getattr(parsed, "head_dim", None) or parsed.hidden_size // heads,
        vocab_size=parsed.vocab_size,
        context_length_max=parsed.max_position_embeddings,
        dtype=DTYPES[dtype],
        tied=bool(parsed.tie_word_embeddings),
    )


def transformers_config(config: Mapping[str, Any]) -> Any:
    """The config as transformers reads it, defaults filled in. Raises as `shape_of`."""
    # Seconds to import; a worker pays for it while it warms up.
    from transformers import CONFIG_MAPPING

    family = _family(config)
    try:
        parsed = CONFIG_MAPPING[family].from_dict(deepcopy(dict(config)))
    except Exception as error:
        # transformers raises whatever its validators raise; all of it means the same here.
        raise CheckpointError(f"not usable: {type(error).__name__}: {error}", file="config.json") from error
    for name in _rope_types(getattr(parsed, "rope_parameters", None)):
        if name not in ROPE_TYPES:
            raise UnsupportedArchitectureError(
                f"rotary embeddings of type {name!r} are not supported", file="config.json"
            )
    return parsed


def _family(config: Mapping[str, Any]) -> str:
    named = config.get("architectures") or [None]
    architecture = named[0] if isinstance(named, list | tuple) else named
    family = config.get("model_type")
    if architecture is None and family in SUPPORTED.values():
        architecture = next(name for name, known in SUPPORTED.items() if known == family)
    if SUPPORTED.get(str(architecture)) != family or family is None:
        raise UnsupportedArchitectureError(
            f"architecture {architecture or 'unnamed'} (model_type {family}) is not supported; "
            f"{', '.join(SUPPORTED)} are",
            file="config.json",
        )
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise UnsupportedArchitectureError(
            f"{architecture} quantized by {method or 'an unnamed method'} is not supported; "
            "float32, bfloat16 and float16 weights are",
            file="config.json",
        )
    return str(family)


def _rope_types(parameters: Any) -> list[str]:
    """One name, or one for each kind of layer."""
    if not isinstance(parameters, Mapping):
        return []
    if "rope_type" in parameters:
        return [str(parameters["rope_type"])]
    return [name for nested in parameters.values() for name in _rope_types(nested)]
