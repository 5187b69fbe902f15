"""Tiny random Hugging Face folders, made by code: what the fast tests serve instead of a real model.

`make` writes config.json, safetensors, a real byte-level BPE tokenizer with a ChatML template, and a generation
config, for one of `FAMILIES`. Equal arguments give equal bytes. Needs neither torch nor transformers, which take
seconds to import; tests/store/test_tinymodels.py checks that transformers agrees with every name and shape.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
VOCAB = 512
ENDOFTEXT, IM_START, IM_END = 0, 1, 2

HEADS, KV_HEADS = 4, 2

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_TEXT = """
The quick brown fox jumps over the lazy dog while the other animals are watching the whole thing from the hill.
What is the capital of France? The capital of France is Paris, and the capital of Italy is Rome, as everyone knows.
Write a short story about a small ship that sails through the night and finds an island full of friendly birds.
You are a helpful assistant. Answer the question of the user with one sentence, then explain your reasoning.
Layers arrive one after another; each of them is executed as soon as it is there, and nobody waits for the rest.
Scaling a service means that more replicas share the same queue; when demand falls, some of them are drained.
Numbers such as one, two, three, four and five count the requests, the tokens, the pages and the segments.
In the beginning there was a single machine, and it was slow; then there were many machines, and they were slow too.
She sells sea shells on the sea shore, and the shells that she sells are sea shells for sure, said the sailor.
Please translate the following paragraph into plain language, keeping every fact and every name as it was written.
"""


def make(
    folder: Path,
    family: str,
    *,
    layers: int = 4,
    hidden: int = 64,
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 1,
) -> Path:
    """Writes a random model of `family` into `folder` (created) and returns the folder.

    `dtype` is "float32", "bfloat16" or "float16"; `shards` > 1 writes an index and that many files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(family, layers=layers, hidden=hidden, dtype=dtype)
    _write_json(folder / "config.json", config)
    generation = {"bos_token_id": IM_START, "eos_token_id": IM_END, "pad_token_id": ENDOFTEXT}
    _write_json(folder / "generation_config.json", generation)
    make_tokenizer(folder)
    rng = np.random.default_rng([seed, FAMILIES.index(family)])
    tensors = {name: _random(rng, name, shape, family) for name, shape in parameters(config).items()}
    _write_weights(folder, {name: _encode(value, dtype) for name, value in tensors.items()}, shards)
    return folder


def make_tokenizer(folder: Path) -> Path:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja: 512 tokens, every byte is one."""
    folder.mkdir(parents=True, exist_ok=True)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.strip().splitlines(), trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def parameters(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every stored parameter of a config made here, in the order of the model."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim", hidden // HEADS)
    heads, kv = HEADS * head_dim, KV_HEADS * head_dim
    family = config["model_type"]
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (heads, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, heads),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if family == "qwen2":
        layer |= {f"self_attn.{p}_proj.bias": (n,) for p, n in (("q", heads), ("k", kv), ("v", kv))}
    if family == "qwen3":
        layer |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    if family == "gemma2":
        layer |= {
            "pre_feedforward_layernorm.weight": (hidden,),
            "post_feedforward_layernorm.weight": (hidden,),
        }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    found["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, hidden)
    return found


def _config(family: str, *, layers: int, hidden: int, dtype: str) -> dict[str, Any]:
    architecture = {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "gemma2": "Gemma2ForCausalLM",
    }[family]
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": family,
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": hidden // HEADS,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": family in ("qwen2", "qwen3", "gemma2"),
        "bos_token_id": IM_START,
        "eos_token_id": IM_END,
        "pad_token_id": ENDOFTEXT,
        "dtype": dtype,
    }
    if family == "mistral":
        config |= {"sliding_window": None}
    if family == "qwen2":
        del config["head_dim"]  # published Qwen 2 configs have none
        config |= {"use_sliding_window": False}
    if family == "qwen3":
        config["head_dim"] = 2 * hidden // HEADS  # published Qwen 3 models: heads together wider than hidden
    if family == "gemma2":
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": hidden // HEADS,
            "sliding_window": 32,  # short, so that tests cross it
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        }
        del config["hidden_act"]
    return config


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...], family: str) -> np.ndarray:
    """Values large enough that greedy decoding does not repeat one token for ever."""
    values = rng.standard_normal(shape, dtype=np.float32)
    if "norm" in name:
        # Gemma's norm multiplies by 1 + weight.
        return 0.1 * values + (0.0 if family == "gemma2" else 1.0)
    if name.endswith(".bias"):
        return 0.1 * values
    if "embed" in name:
        # Large ones would drown the layers, above all where the same matrix makes the logits.
        return values * np.float32({"gemma2": 0.05, "qwen2": 0.2, "qwen3": 0.2}.get(family, 1.0))
    if "lm_head" in name:
        return values
    return values * np.float32(1.5 / np.sqrt(shape[-1]))


def _encode(values: np.ndarray, dtype: str) -> dict[str, Any]:
    values = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "float16":
        data = values.astype(np.float16).tobytes()
    elif dtype == "bfloat16":
        data = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # cut off: still valid bf16 numbers
    else:
        data = values.tobytes()
    return {"dtype": dtype, "shape": list(values.shape), "data": data}


def _write_weights(folder: Path, tensors: dict[str, dict[str, Any]], shards: int) -> None:
    if shards == 1:
        _write_safetensors(folder / "model.safetensors", tensors)
        return
    names = list(tensors)
    where: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        where |= dict.fromkeys(part, file)
        _write_safetensors(folder / file, part)
    total = sum(len(tensor["data"]) for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_safetensors(path: Path, tensors: dict[str, dict[str, Any]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + len(tensor["data"])
        header[name] = {
            "dtype": {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[tensor["dtype"]],
            "shape": tensor["shape"],
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(tensor["data"] for tensor in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
