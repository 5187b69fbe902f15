"""Checkpoints as the hub has them, written by transformers, become the tensors of its models, experts merged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from layercast_agent.checkpoint_names import merge_experts, parameter_name
from layercast_agent.errors import CheckpointError, UnsupportedArchitectureError
from layercast_agent.families import SUPPORTED
from layercast_agent.packing import pack, segment_file
from layercast_agent.parameters import TIED_BY_DEFAULT
from layercast_agent.safetensors_header import StoredTensor
from layercast_agent.source_checkpoint import open_source

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "deepseek_v3"]


def hub_folder(folder: Path, family: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """A random model saved in the hub's names, and its tensors by the model's names."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family].from_dict(SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder, save_original_format=True)
    return folder, model.state_dict()


def packed(folder: Path, target: Path, dtype: str = "") -> dict[str, torch.Tensor]:
    target.mkdir()
    manifest = pack(
        open_source(folder), target, dtype=dtype, chunk_bytes=4096, report=lambda done, total: None
    )
    tensors: dict[str, torch.Tensor] = {}
    for segment in manifest.segments:
        with safe_open(target / segment_file(segment.index), "pt") as file:
            names = [name for name in file.keys() if not name.startswith("layercast.gap.")]  # noqa: SIM118 (no mapping)
            tensors |= {name: file.get_tensor(name) for name in names}
    return tensors


@pytest.mark.parametrize("family", [*EXPERTS, "gpt_oss", "gpt_neox", "phi", "apertus"])
def test_hub_names_become_the_models(tmp_path: Path, family: str) -> None:
    folder, wanted = hub_folder(tmp_path / "hub", family)
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    if family in EXPERTS or family == "gpt_neox":
        assert stored != set(wanted), "transformers writes the hub's names"
    found = packed(folder, tmp_path / "packed")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_corrections_of_a_router_keep_their_precision(tmp_path: Path) -> None:
    folder, _ = hub_folder(tmp_path / "hub", "deepseek_v3")
    found = packed(folder, tmp_path / "packed", "bfloat16")
    kept = {name for name, tensor in found.items() if tensor.dtype == torch.float32}
    assert kept == {"model.layers.1.mlp.gate.e_score_correction_bias"}


def test_draft_layers_are_left_out(tmp_path: Path) -> None:
    folder, wanted = hub_folder(tmp_path / "hub", "deepseek_v3")
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    tensors["model.layers.2.eh_proj.weight"] = torch.zeros(4, 4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert packed(folder, tmp_path / "packed").keys() == wanted.keys()


def expert(number: int, matrix: str, shape: tuple[int, ...] = (2, 3)) -> tuple[str, StoredTensor]:
    name = f"model.layers.0.mlp.experts.{number}.{matrix}.weight"
    tensor = StoredTensor(file=Path("f"), name=name, dtype="F32", shape=shape, offset=0, nbytes=24)
    return name, tensor


def test_experts_must_be_complete_and_alike() -> None:
    whole = dict(expert(n, m) for n in range(3) for m in ("gate_proj", "up_proj", "down_proj"))
    merged = merge_experts({"num_experts": 3}, whole)
    assert {name: tensor.shape for name, tensor in merged.items()} == {
        "model.layers.0.mlp.experts.gate_up_proj": (3, 4, 3),
        "model.layers.0.mlp.experts.down_proj": (3, 2, 3),
    }
    assert merge_experts({}, whole) == merged
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    with pytest.raises(CheckpointError, match=r"missing.*experts\.1\.up_proj"):
        merge_experts({}, {key: tensor for key, tensor in whole.items() if key != name})
    with pytest.raises(CheckpointError, match=r"missing.*experts\.3\.gate_proj"):
        merge_experts({"num_experts": 4}, whole)
    with pytest.raises(CheckpointError, match=r"no such expert.*experts\.2"):
        merge_experts({"num_experts": 2}, whole)
    with pytest.raises(CheckpointError, match=r"\[9, 3\] where the first expert"):
        merge_experts({}, whole | {name: replace(whole[name], shape=(9, 3))})


def test_names() -> None:
    assert parameter_name("llama", "layers.0.mlp.up_proj.weight", 2) == "model.layers.0.mlp.up_proj.weight"
    assert parameter_name("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", 2) is None
    assert parameter_name("gpt_neox", "embed_out.weight", 2) == "lm_head.weight"
    assert parameter_name("gpt_neox", "gpt_neox.layers.0.attention.masked_bias", 2) is None
    assert parameter_name("llama", "model.layers.5.input_layernorm.weight", 2) is not None


def test_which_families_tie_their_embeddings() -> None:
    tied = {family for family in SUPPORTED.values() if CONFIG_MAPPING[family]().tie_word_embeddings}
    assert tied == TIED_BY_DEFAULT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantized by awq"),
        ({"compression_config": {"format": "int"}}, "quantized by an unnamed method"),
        ({"architectures": ["FalconForCausalLM"], "model_type": "falcon"}, "FalconForCausalLM"),
    ],
)
def test_what_is_not_served_is_refused_before_packing(
    llama: Path, changes: dict[str, Any], message: str
) -> None:
    config = json.loads((llama / "config.json").read_text()) | changes
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedArchitectureError, match=message):
        open_source(llama)
