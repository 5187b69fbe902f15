"""Names and shapes of checkpoints in the wild become those of the model, or an error that names the tensor."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from layercast_agent.errors import CheckpointError
from layercast_agent.parameters import expected_shapes, select
from layercast_agent.safetensors_header import StoredTensor
from layercast_agent.source_checkpoint import SourceCheckpoint, open_source

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
Stored = dict[str, StoredTensor]


@pytest.fixture
def source(llama: Path) -> SourceCheckpoint:
    return open_source(llama)


def like(stored: Stored, name: str, **changes: Any) -> StoredTensor:
    model = next(iter(stored.values()))
    values: dict[str, Any] = {
        "file": model.file,
        "name": name,
        "dtype": "F32",
        "shape": (64,),
        "offset": 800,
        "nbytes": 256,
    }
    return StoredTensor(**(values | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shapes_of_each_family_are_known(tinymodels: ModuleType, tmp_path: Path, family: str) -> None:
    source = open_source(tinymodels.make(tmp_path / family, family, layers=3))
    selection = select(source.config, source.tensors)
    assert {name: tensor.shape for name, tensor in selection.tensors.items()} == expected_shapes(
        source.config
    )
    assert len(selection.tensors) == len(source.tensors)


def test_old_buffers_are_left_out(source: SourceCheckpoint) -> None:
    stored = dict(source.tensors)
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"):
        stored[name] = like(stored, name)
    assert set(select(source.config, stored).tensors) == set(source.tensors)


def test_names_without_the_model_prefix_get_it(source: SourceCheckpoint) -> None:
    stored = {name.removeprefix("model."): tensor for name, tensor in source.tensors.items()}
    assert set(select(source.config, stored).tensors) == set(source.tensors)


def test_a_tied_head_is_stored_once(source: SourceCheckpoint) -> None:
    config = {**source.config, "tie_word_embeddings": True}
    selection = select(config, source.tensors)
    assert "lm_head.weight" not in selection.tensors
    assert selection.equal is not None
    assert [t.name for t in selection.equal] == ["model.embed_tokens.weight", "lm_head.weight"]


def test_a_tied_matrix_under_its_other_name_is_found(source: SourceCheckpoint) -> None:
    config = {**source.config, "tie_word_embeddings": True}
    stored = dict(source.tensors)
    del stored["model.embed_tokens.weight"]
    selection = select(config, stored)
    assert selection.tensors["model.embed_tokens.weight"].name == "lm_head.weight"
    assert "lm_head.weight" not in selection.tensors and selection.equal is None


def test_a_tied_head_of_another_shape_is_refused(source: SourceCheckpoint) -> None:
    config = {**source.config, "tie_word_embeddings": True}
    stored = {**source.tensors, "lm_head.weight": like(dict(source.tensors), "lm_head.weight")}
    with pytest.raises(CheckpointError, match=r"ties it.*lm_head\.weight"):
        select(config, stored)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.down_proj.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_missing_tensor_is_named(source: SourceCheckpoint, name: str) -> None:
    stored = {key: tensor for key, tensor in source.tensors.items() if key != name}
    with pytest.raises(CheckpointError, match="missing") as caught:
        select(source.config, stored)
    assert caught.value.tensor == name


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.surprise.weight",
        "model.layers.2.input_layernorm.weight",  # the model has layers 0 and 1
        "model.layers.x.input_layernorm.weight",
        "visual.patch.weight",
        "model.norm.bias",
        "lm_head.bias",
    ],
)
def test_an_unknown_tensor_is_named_with_its_file(source: SourceCheckpoint, name: str) -> None:
    stored = {**source.tensors, name: like(dict(source.tensors), name)}
    with pytest.raises(CheckpointError) as caught:
        select(source.config, stored)
    assert caught.value.tensor == name
    assert caught.value.file == source.folder / "model.safetensors"


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", 128), ("vocab_size", 513), ("num_key_value_heads", 4), ("head_dim", 8)]
)
def test_a_config_of_another_model_is_found(source: SourceCheckpoint, key: str, value: int) -> None:
    with pytest.raises(CheckpointError, match=r"shape .* where config\.json asks for") as caught:
        select({**source.config, key: value}, source.tensors)
    assert caught.value.tensor is not None and caught.value.file is not None


@pytest.mark.parametrize("value", [None, 0, -1, "2", 2.0, True, 10**9])
def test_a_config_without_a_sane_layer_count_is_refused(source: SourceCheckpoint, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"num_hidden_layers.*config\.json"):
        select({**source.config, "num_hidden_layers": value}, source.tensors)


def test_an_unknown_family_is_taken_as_it_is(source: SourceCheckpoint) -> None:
    """Whether it can be run is the engine's question; its tensors still must have a place."""
    config = {**source.config, "model_type": "brand_new"}
    stored = {**source.tensors, "model.layers.1.extra": like(dict(source.tensors), "model.layers.1.extra")}
    assert "model.layers.1.extra" in select(config, stored).tensors
    with pytest.raises(CheckpointError, match="no such tensor"):
        select(config, {**stored, "vision.w": like(dict(source.tensors), "vision.w")})


def test_biases_follow_the_config(source: SourceCheckpoint) -> None:
    shapes = expected_shapes({**source.config, "attention_bias": True, "mlp_bias": True})
    assert shapes is not None
    assert shapes["model.layers.0.self_attn.o_proj.bias"] == (64,)
    assert shapes["model.layers.1.mlp.down_proj.bias"] == (64,)
