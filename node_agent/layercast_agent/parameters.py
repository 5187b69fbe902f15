"""Which parameters of a checkpoint a model takes, under which names and in which shapes.

Files in the wild carry buffers that nobody reads, leave out the `model.` prefix, or store a tied matrix twice or
under its other name. This file turns such names into those of the model as transformers builds it. For the
families that are checked in the tests it also knows every name and shape, so a missing tensor or a config that
does not fit is found before anything is packed. Pure: names and shapes in, names out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layercast_agent.checkpoint_names import embedding_name, merge_experts, parameter_name
from layercast_agent.errors import CheckpointError
from layercast_agent.families import SUPPORTED
from layercast_agent.layout import segment_index
from layercast_agent.safetensors_header import StoredTensor
from layercast_agent.tensor_parallel import Split

LM_HEAD = "lm_head.weight"
LAYERS_MAX = 10_000

TIED_BY_DEFAULT = frozenset(
    ("cohere", "cohere2", "ernie4_5", "gemma", "gemma2", "gemma3_text", "smollm3", "starcoder2")
)
"""Families that tie input and output embeddings when their config does not say."""

_SHAPES_KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
_HEAD_DIM_BY_DEFAULT = {"qwen3": 128, "gemma2": 256, "gemma3_text": 256, "gpt_oss": 64}

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What to pack: `tensors` by the model's parameter name.

    `equal` is a pair that config.json claims to be one matrix; the claim must be checked against the bytes.
    """

    tensors: Mapping[str, StoredTensor]
    equal: tuple[StoredTensor, StoredTensor] | None


def layer_count(config: Mapping[str, Any]) -> int:
    """Transformer layers that the config asks for."""
    return _size(config, "num_hidden_layers", most=LAYERS_MAX)


def tensor_split(config: Mapping[str, Any], *, rank: int, ranks: int) -> Split:
    """One rank of a tensor-parallel replica of this model. CheckpointError when its heads cannot be shared out."""
    heads = _size(config, "num_attention_heads")
    by_default = _HEAD_DIM_BY_DEFAULT.get(str(config.get("model_type")))
    return Split(
        rank=rank,
        ranks=ranks,
        heads=heads,
        kv_heads=_size(config, "num_key_value_heads", default=heads),
        head_dim=_size(config, "head_dim", default=by_default or _size(config, "hidden_size") // heads),
    )


def select(config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> Selection:
    """Chooses and names the tensors to pack. CheckpointError for anything unknown, missing or misshapen."""
    layers = layer_count(config)
    family = str(config.get("model_type"))
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        parameter = parameter_name(family, name, layers)
        if parameter is None:
            continue
        try:
            segment_index(parameter, layers)
        except CheckpointError as error:
            problem = f"a model of {layers} layers has no such tensor"
            raise CheckpointError(problem, file=tensor.file, tensor=name) from error
        found[parameter] = tensor
    found = merge_experts(config, found)
    equal = _tie(found, embedding_name(family)) if _is_tied(config, found) else None
    shapes = expected_shapes(config)
    if shapes is not None:
        _check(shapes, found)
    return Selection(tensors=found, equal=equal)


def expected_shapes(config: Mapping[str, Any]) -> Shapes | None:
    """Every stored parameter of a model of this config, tied ones once; None for a family not known here.

    Families: llama, mistral, qwen2, qwen3, gemma2.
    """
    family = config.get("model_type")
    if family not in _SHAPES_KNOWN:
        return None
    hidden = _size(config, "hidden_size")
    vocab = _size(config, "vocab_size")
    layer = {**_attention_shapes(config, str(family), hidden), **_mlp_shapes(config, str(family), hidden)}
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family == "gemma2":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    layer |= {f"{norm}.weight": (hidden,) for norm in norms}
    shapes: Shapes = {embedding_name(str(family)): (vocab, hidden), "model.norm.weight": (hidden,)}
    for index in range(layer_count(config)):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    if not config.get("tie_word_embeddings", family in TIED_BY_DEFAULT):
        shapes[LM_HEAD] = (vocab, hidden)
    return shapes


def _attention_shapes(config: Mapping[str, Any], family: str, hidden: int) -> Shapes:
    heads = _size(config, "num_attention_heads")
    kv_heads = _size(config, "num_key_value_heads", default=heads)
    head_dim = _size(config, "head_dim", default=_HEAD_DIM_BY_DEFAULT.get(family, hidden // heads))
    queries, keys = heads * head_dim, kv_heads * head_dim
    biased = family != "mistral" and bool(config.get("attention_bias", False))
    shapes: Shapes = {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
    }
    if biased or family == "qwen2":
        shapes["self_attn.q_proj.bias"] = (queries,)
        shapes["self_attn.k_proj.bias"] = (keys,)
        shapes["self_attn.v_proj.bias"] = (keys,)
    if biased and family != "qwen2":
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if family == "qwen3":
        shapes["self_attn.q_norm.weight"] = (head_dim,)
        shapes["self_attn.k_norm.weight"] = (head_dim,)
    return shapes


def _mlp_shapes(config: Mapping[str, Any], family: str, hidden: int) -> Shapes:
    inner = _size(config, "intermediate_size")
    shapes: Shapes = {
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if family == "llama" and config.get("mlp_bias", False):
        shapes |= {"mlp.gate_proj.bias": (inner,), "mlp.up_proj.bias": (inner,)}
        shapes["mlp.down_proj.bias"] = (hidden,)
    return shapes


def _size(config: Mapping[str, Any], key: str, *, default: int | None = None, most: int = 1 << 40) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 1 <= value <= most:
        raise CheckpointError(f"{key} is {value!r}, not a size", file="config.json")
    return value


def _is_tied(config: Mapping[str, Any], found: Mapping[str, StoredTensor]) -> bool:
    family = config.get("model_type")
    if "tie_word_embeddings" in config:
        return bool(config["tie_word_embeddings"])
    if family in SUPPORTED.values():
        return family in TIED_BY_DEFAULT
    # An unknown family whose config is silent: the files show what its authors meant.
    return LM_HEAD not in found


def _tie(found: dict[str, StoredTensor], embedding: str) -> tuple[StoredTensor, StoredTensor] | None:
    """Leaves one matrix, under the embedding's name."""
    head = found.pop(LM_HEAD, None)
    if head is None:
        return None
    embed = found.setdefault(embedding, head)
    if embed is head:
        return None
    if (embed.dtype, embed.shape) != (head.dtype, head.shape):
        raise CheckpointError(
            f"config.json ties it to {embedding}, but shape or dtype differ", file=head.file, tensor=LM_HEAD
        )
    return embed, head


def _check(shapes: Shapes, found: Mapping[str, StoredTensor]) -> None:
    for name, shape in shapes.items():
        tensor = found.get(name)
        if tensor is None:
            raise CheckpointError("missing: config.json asks for it and no file has it", tensor=name)
        if tensor.shape != shape:
            raise CheckpointError(
                f"shape {list(tensor.shape)} where config.json asks for {list(shape)}",
                file=tensor.file,
                tensor=name,
                offset_bytes=tensor.offset,
            )
    for name, tensor in found.items():
        if name not in shapes:
            raise CheckpointError("config.json describes no such tensor", file=tensor.file, tensor=name)
