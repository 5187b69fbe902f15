"""Tiny random models of every supported family, with transformers' own `generate` as the judge of their tokens."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from layercast_agent.engine import llama
from layercast_agent.engine.architectures import transformers_config
from layercast_agent.engine.attention import TorchAttention
from layercast_agent.engine.engine import Engine, EngineLimits
from layercast_agent.engine.fast import FastModel, TorchKernels
from layercast_agent.engine.kv import KVCache
from layercast_agent.engine.model import LayeredModel, Wanted, build_model, shape_of
from layercast_agent.engine.sequence import SamplingParams, Sequence, TokenEvent
from layercast_agent.layout import plan_segments

CPU = torch.device("cpu")
VOCABULARY = 199
WINDOW = 6  # shorter than most prompts of the tests
STEPS_MAX = 400
WORDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": WINDOW}

_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "norm_topk_prob": True}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "rope_theta": 500.0},
    "llama-tied-biased": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": 1,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": WINDOW, "head_dim": 12},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen2-windowed": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        **_GEMMA,
        "num_hidden_layers": 4,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {"architectures": ["Gemma3ForCausalLM"], **_GEMMA, "sliding_window_pattern": 2},
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "head_dim": 16,
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "granite": {
        "architectures": ["GraniteForCausalLM"],
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
    },
    "olmo2": {"architectures": ["Olmo2ForCausalLM"]},
    "phi3": {"architectures": ["Phi3ForCausalLM"], "sliding_window": WINDOW, "partial_rotary_factor": 0.5},
    "ministral": {
        "architectures": ["MinistralForCausalLM"],
        "head_dim": 12,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma": {"architectures": ["GemmaForCausalLM"], "head_dim": 16},
    "phi": {"architectures": ["PhiForCausalLM"], "partial_rotary_factor": 0.5, "qk_layernorm": True},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        **_EXPERTS,
        "num_experts": 4,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], **_EXPERTS, "num_experts": 4, "head_dim": 16},
    "olmo": {"architectures": ["OlmoForCausalLM"], "clip_qkv": 2.0},
    "olmo3": {
        "architectures": ["Olmo3ForCausalLM"],
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "glm": {"architectures": ["GlmForCausalLM"], "head_dim": 8, "partial_rotary_factor": 0.5},
    "glm4": {"architectures": ["Glm4ForCausalLM"], "head_dim": 8, "partial_rotary_factor": 0.5},
    "glm4_moe": {
        "architectures": ["Glm4MoeForCausalLM"],
        **_EXPERTS,
        "head_dim": 8,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "routed_scaling_factor": 1.5,
    },
    "cohere": {"architectures": ["CohereForCausalLM"], "logit_scale": 0.5, "use_qk_norm": True},
    "cohere2": {
        "architectures": ["Cohere2ForCausalLM"],
        "logit_scale": 0.5,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "starcoder2": {"architectures": ["Starcoder2ForCausalLM"], "sliding_window": WINDOW},
    "stablelm": {
        "architectures": ["StableLmForCausalLM"],
        "use_qkv_bias": True,
        "qk_layernorm": True,
        "partial_rotary_factor": 0.5,
    },
    "smollm3": {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0, 1]},
    "exaone4": {
        "architectures": ["Exaone4ForCausalLM"],
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "seed_oss": {"architectures": ["SeedOssForCausalLM"], "head_dim": 8, "attention_bias": True},
    "ernie4_5": {"architectures": ["Ernie4_5ForCausalLM"], "head_dim": 8},
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        **_EXPERTS,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 10,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "gpt_neox": {"architectures": ["GPTNeoXForCausalLM"], "num_key_value_heads": 4, "rotary_pct": 0.5},
    "hunyuan_v1_dense": {
        "architectures": ["HunYuanDenseV1ForCausalLM"],
        "head_dim": 8,
        "rope_scaling": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    },
    "arcee": {"architectures": ["ArceeForCausalLM"]},
    "apertus": {"architectures": ["ApertusForCausalLM"]},
    "nemotron": {"architectures": ["NemotronForCausalLM"], "partial_rotary_factor": 0.5},
    "helium": {"architectures": ["HeliumForCausalLM"], "head_dim": 8},
}


def config_of(family: str) -> dict[str, Any]:
    """config.json of a tiny model."""
    return {"model_type": family, **_SIZES, **CONFIGS[family]}


@dataclass(slots=True)
class Tiny:
    """One tiny model, as transformers runs it and as we do; both read the same parameters."""

    config: dict[str, Any]
    judge: Any
    model: LayeredModel
    block: str = "auto"
    _answers: dict[tuple[tuple[int, ...], int], list[int]] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        return self.model.shape.layers

    def expected(self, prompt: Ordered[int], count: int) -> list[int]:
        """The greedy continuation, by transformers."""
        key = (tuple(prompt), count)
        if key not in self._answers:
            tokens = torch.tensor([prompt])
            # Without a mask generate would take token 0 for padding.
            answer = self.judge.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=count,
                eos_token_id=None,
                pad_token_id=0,
            )
            self._answers[key] = answer[0, len(prompt) :].tolist()
        return self._answers[key]

    @property
    def wanted(self) -> Wanted:
        """What a user would ask for to get its block."""
        return Wanted("fast" if self.block == "torch" else self.block)

    def engine(self, *, pages: int = 64, page_size: int = 4, **limits: int) -> Engine:
        """A fresh engine over this model."""
        values = {
            "batch_size_max": 8,
            "step_tokens_max": 64,
            "waiting_max": 32,
            "context_length_max": 128,
        }
        return Engine(
            model=self.model,
            kv=KVCache(self.model.shape, pages, page_size=page_size, device=CPU),
            limits=EngineLimits(**values | limits, prefix_caching=True),
        )


def blocks(family: str) -> list[str]:
    """The block implementations that run a family: "fast" is the best there is here, "torch" is fast in plain torch."""
    fast = isinstance(llama.read(transformers_config(config_of(family))), llama.LlamaShape)
    return ["generic", "fast", "torch"] if fast else ["generic"]


SEEDS = {"gpt_neox": 4}
"""Where the first seed makes a model that soon repeats itself, and equal tokens would prove little."""


def build(family: str, block: str = "auto", *, seed: int | None = None) -> Tiny:
    """A model with random parameters, strong enough that tokens depend on everything before them."""
    config = config_of(family)
    values = {key: value for key, value in config.items() if key != "architectures"}
    judge = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[config["model_type"]].from_dict(values),
        dtype=torch.float32,
        attn_implementation="eager",
    ).eval()
    generator = torch.Generator().manual_seed(SEEDS.get(family, 0) if seed is None else seed)
    for name, parameter in judge.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data += 0.1 * noise
        elif "embed" in name:
            parameter.data = noise * _embedding_scale(config)
        elif parameter.dim() == 1 or "bias" in name or "sinks" in name:
            parameter.data = 0.3 * noise
        else:
            parameter.data = noise * 1.5 / parameter.shape[-1] ** 0.5
    for name, buffer in judge.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.add_(torch.randn(buffer.shape, generator=generator), alpha=0.3)
    return Tiny(config=config, judge=judge, model=attached(config, judge, "float32", block), block=block)


def bare(config: dict[str, Any], dtype: str, block: str = "auto", device: torch.device = CPU) -> LayeredModel:
    """A model without parameters; `block` as `blocks` names them."""
    shape = shape_of(config, dtype)
    if block == "torch":
        return FastModel(
            config=config, shape=shape, device=device, kernels=TorchKernels(), attention=TorchAttention()
        )
    return build_model(config=config, shape=shape, device=device, wanted=Wanted(block))


def attached(config: dict[str, Any], judge: Any, dtype: str, block: str = "auto") -> LayeredModel:
    """Our model with the judge's parameters, in that precision."""
    model = bare(config, dtype, block)
    tensors = dict(model.named_tensors())
    found = {name: value.to(tensors[name].dtype) for name, value in parameters(judge, model).items()}
    model.attach(packed(found) if model.block.startswith("fast") else found)
    return model


def _embedding_scale(config: dict[str, Any]) -> float:
    """Large embeddings would drown the layers where the same matrix makes the logits."""
    if config["model_type"].startswith("gemma"):
        return 0.02  # multiplied by the root of the hidden size
    return 0.1 if config.get("tie_word_embeddings") else 0.5


def parameters(judge: Any, model: LayeredModel) -> dict[str, torch.Tensor]:
    """The judge's parameters under the names of a checkpoint."""
    stored = judge.state_dict()
    return {name: stored[name].detach() for name, _ in model.named_tensors()}


def packed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors as views of one memory a segment, where a packed checkpoint has them."""
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name)
    shapes = {name: (WORDS[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    found: dict[str, torch.Tensor] = {}
    for segment in plan_segments(shapes, layers):
        memory = torch.zeros(segment.nbytes, dtype=torch.uint8)
        for spec in segment.tensors:
            view = (
                memory[spec.offset : spec.offset + spec.nbytes]
                .view(tensors[spec.name].dtype)
                .view(spec.shape)
            )
            found[spec.name] = view.copy_(tensors[spec.name])
    return found


def prompts(lengths: Ordered[int], *, seed: int = 1) -> list[tuple[int, ...]]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths]


def sequence(
    prompt: Ordered[int],
    count: int,
    *,
    name: str = "r",
    arrived_at: float = 0.0,
    generated: Ordered[int] = (),
    **sampling: Any,
) -> Sequence:
    """A request for `count` tokens."""
    return Sequence(
        request_id=name,
        attempt=1,
        gateway_id="g",
        prompt=tuple(prompt),
        generated=list(generated),
        sampling=SamplingParams(max_tokens=count, **sampling),
        arrived_at=arrived_at,
    )


def run(engine: Engine) -> list[TokenEvent]:
    """Steps until nothing is left; all events."""
    events: list[TokenEvent] = []
    for _ in range(STEPS_MAX):
        if not engine.waiting and not engine.running:
            return events
        events += engine.step()
    raise AssertionError(f"not done after {STEPS_MAX} steps")


def tokens(events: Ordered[TokenEvent], name: str = "r") -> list[int]:
    """The tokens of one request, whose positions must be consecutive."""
    mine = [event for event in events if event.request_id == name]
    assert [event.position for event in mine] == list(range(mine[0].position, mine[0].position + len(mine)))
    return [event.token_id for event in mine]


def answer(engine: Engine, seq: Sequence) -> list[int]:
    """Adds one request, runs everything, returns its new tokens."""
    engine.add(seq)
    return tokens(run(engine), seq.request_id)
