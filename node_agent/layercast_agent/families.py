"""Which model families are served: the table, and the refusal by name of everything else. No torch here.

transformers has some hundred decoder families whose layers can be called one by one; those in the table are the ones
whose tokens a test compares with `generate`, at every split. An agent refuses the rest before it packs a byte, and a
worker before it plans any memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layercast_agent.errors import UnsupportedArchitectureError

SUPPORTED: Mapping[str, str] = {
    "ApertusForCausalLM": "apertus",
    "ArceeForCausalLM": "arcee",
    "Cohere2ForCausalLM": "cohere2",
    "CohereForCausalLM": "cohere",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Ernie4_5ForCausalLM": "ernie4_5",
    "Exaone4ForCausalLM": "exaone4",
    "GPTNeoXForCausalLM": "gpt_neox",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "GemmaForCausalLM": "gemma",
    "Glm4ForCausalLM": "glm4",
    "Glm4MoeForCausalLM": "glm4_moe",
    "GlmForCausalLM": "glm",
    "GptOssForCausalLM": "gpt_oss",
    "GraniteForCausalLM": "granite",
    "HeliumForCausalLM": "helium",
    "HunYuanDenseV1ForCausalLM": "hunyuan_v1_dense",
    "LlamaForCausalLM": "llama",
    "MinistralForCausalLM": "ministral",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "NemotronForCausalLM": "nemotron",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "OlmoForCausalLM": "olmo",
    "Phi3ForCausalLM": "phi3",
    "PhiForCausalLM": "phi",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "SeedOssForCausalLM": "seed_oss",
    "SmolLM3ForCausalLM": "smollm3",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
}
"""config.json's `architectures[0]` to its `model_type`."""


def family_of(config: Mapping[str, Any], *, file: Path | str = "config.json") -> str:
    """The `model_type` of a config.json that can be served; UnsupportedArchitectureError says what cannot, where."""
    named = config.get("architectures") or [None]
    architecture = named[0] if isinstance(named, list | tuple) else named
    family = config.get("model_type")
    if architecture is None and family in SUPPORTED.values():
        architecture = next(name for name, known in SUPPORTED.items() if known == family)
    if SUPPORTED.get(str(architecture)) != family or family is None:
        raise UnsupportedArchitectureError(
            f"architecture {architecture or 'unnamed'} (model_type {family}) is not supported; "
            f"{', '.join(SUPPORTED)} are",
            file=file,
        )
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise UnsupportedArchitectureError(
            f"{architecture} quantized by {method or 'an unnamed method'} is not supported; "
            "float32, bfloat16 and float16 weights are",
            file=file,
        )
    return str(family)
