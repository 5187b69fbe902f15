"""The layout is pure: these properties hold for any checkpoint, so random ones are tried."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercast_agent.errors import CheckpointError
from layercast_agent.layout import (
    ITEM_BYTES,
    TENSOR_ALIGNMENT,
    Manifest,
    SegmentSpec,
    chunk_count,
    digest_of,
    plan_segments,
    seal,
)

# Machines are shared: how long one example takes says nothing.
relaxed = settings(deadline=None, max_examples=60)

Tensors = dict[str, tuple[str, tuple[int, ...]]]

_SHAPES = st.lists(st.integers(1, 40), min_size=0, max_size=3).map(tuple)
_ENTRIES = st.tuples(st.sampled_from(sorted(ITEM_BYTES)), _SHAPES)
_SUFFIXES = (
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "mlp.up_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.experts.gate_up_proj",
)


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[Tensors, int]:
    """Names, dtypes and shapes of a model of one to twelve layers."""
    layers = draw(st.integers(1, 12))
    tensors: Tensors = {"model.embed_tokens.weight": draw(_ENTRIES), "model.norm.weight": draw(_ENTRIES)}
    if draw(st.booleans()):
        tensors["lm_head.weight"] = draw(_ENTRIES)
    for layer in range(layers):
        for suffix in draw(st.sets(st.sampled_from(_SUFFIXES), min_size=1)):
            tensors[f"model.layers.{layer}.{suffix}"] = draw(_ENTRIES)
    return tensors, layers


def sealed(tensors: Tensors, layers: int, chunk_bytes: int) -> Manifest:
    segments = [
        SegmentSpec(
            index=plan.index,
            name=plan.name,
            nbytes=plan.nbytes,
            tensors=plan.tensors,
            chunk_crc32=tuple(range(chunk_count(plan.nbytes, chunk_bytes))),
            checksum=plan.index,
        )
        for plan in plan_segments(tensors, layers)
    ]
    files = {"config.json": "ab" * 32, "tokenizer.json": "cd" * 32}
    return seal(segments=segments, dtype="float32", config={"a": [1.5]}, files=files, chunk_bytes=chunk_bytes)


def small() -> Manifest:
    entry = ("F32", (3, 5))
    tensors: Tensors = dict.fromkeys(
        ("model.embed_tokens.weight", "model.layers.0.w", "model.norm.weight"), entry
    )
    return sealed(tensors, 1, 32)


@relaxed
@given(checkpoints())
def test_every_tensor_has_its_place_and_no_two_share_a_byte(checkpoint: tuple[Tensors, int]) -> None:
    tensors, layers = checkpoint
    segments = plan_segments(tensors, layers)
    assert [s.name for s in segments] == ["embed", *(f"layer.{i}" for i in range(layers)), "head"]
    assert [s.index for s in segments] == list(range(layers + 2))
    placed = [tensor for segment in segments for tensor in segment.tensors]
    assert sorted(t.name for t in placed) == sorted(tensors)
    for segment in segments:
        end = 0
        for tensor in segment.tensors:
            assert tensor.offset % TENSOR_ALIGNMENT == 0
            assert end <= tensor.offset < end + TENSOR_ALIGNMENT
            dtype, shape = tensors[tensor.name]
            assert (tensor.dtype, tensor.shape) == (dtype, shape)
            assert tensor.nbytes == math.prod(shape) * ITEM_BYTES[dtype]
            end = tensor.offset + tensor.nbytes
        assert segment.nbytes == end


@relaxed
@given(checkpoints(), st.randoms(use_true_random=False))
def test_the_order_of_the_index_does_not_matter(checkpoint: tuple[Tensors, int], random: Any) -> None:
    tensors, layers = checkpoint
    names = list(tensors)
    random.shuffle(names)
    assert plan_segments({name: tensors[name] for name in names}, layers) == plan_segments(tensors, layers)


@relaxed
@given(checkpoints(), st.integers(64, 100_000))
def test_chunks_cover_each_byte_exactly_once(checkpoint: tuple[Tensors, int], chunk_bytes: int) -> None:
    manifest = sealed(*checkpoint, chunk_bytes)
    for index, segment in enumerate(manifest.segments):
        position = 0
        for chunk in range(manifest.chunk_count(index)):
            offset, nbytes = manifest.chunk_range(index, chunk)
            assert offset == position and 0 < nbytes <= chunk_bytes
            position += nbytes
        assert position == segment.nbytes
        for outside in (-1, manifest.chunk_count(index)):
            with pytest.raises(IndexError):
                manifest.chunk_range(index, outside)
    assert manifest.layers == checkpoint[1]
    assert manifest.nbytes == sum(segment.nbytes for segment in manifest.segments)


@relaxed
@given(checkpoints(), st.integers(64, 100_000))
def test_a_manifest_survives_its_file(checkpoint: tuple[Tensors, int], chunk_bytes: int) -> None:
    manifest = sealed(*checkpoint, chunk_bytes)
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.to_json() == manifest.to_json()


def test_fused_neighbours_lie_side_by_side() -> None:
    weights = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{p}_proj" for p in "koqv"))
    tensors: Tensors = {f"model.layers.0.{name}.weight": ("BF16", (64, 64)) for name in weights}
    tensors |= {"model.embed_tokens.weight": ("BF16", (4, 64)), "model.norm.weight": ("BF16", (64,))}
    order = [t.name.split(".")[-2] for t in plan_segments(tensors, 1)[1].tensors]
    assert order[:5] == ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"model.layers.1.w": ("F32", (1,))}, "model.layers.1.w"),
        ({"model.layers.00.w": ("F32", (1,))}, "model.layers.00.w"),
        ({"vision.w": ("F32", (1,))}, "vision.w"),
        ({"model.norm.bias": ("F32", (0,))}, "no elements"),
        ({"model.norm.bias": ("F8_E4M3", (1,))}, "F8_E4M3"),
    ],
)
def test_what_has_no_place_is_named(tensors: Tensors, says: str) -> None:
    entry = ("F32", (1,))
    model = {"model.embed_tokens.weight": entry, "model.layers.0.w": entry, "model.norm.weight": entry}
    with pytest.raises(CheckpointError, match=says):
        plan_segments(model | tensors, 1)


def test_a_missing_layer_is_named() -> None:
    entry = ("F32", (1,))
    model = {"model.embed_tokens.weight": entry, "model.layers.1.w": entry, "model.norm.weight": entry}
    with pytest.raises(CheckpointError, match=r"layer\.0"):
        plan_segments(model, 2)


def test_a_manifest_that_was_touched_is_refused() -> None:
    """Every leaf of the JSON is changed, one at a time: no claim goes unchecked."""
    content = json.loads(small().to_json())
    changed = 0
    for holder, key in leaves(content):
        original = holder[key]
        for other in replacements(original):
            holder[key] = other
            with pytest.raises(CheckpointError):
                Manifest.from_json(json.dumps(content).encode())
            changed += 1
        holder[key] = original
    assert changed > 50
    assert Manifest.from_json(json.dumps(content).encode()) == small()


def leaves(node: Any) -> list[tuple[Any, Any]]:
    keys = node.keys() if isinstance(node, dict) else range(len(node))
    found: list[tuple[Any, Any]] = []
    for key in keys:
        found += leaves(node[key]) if isinstance(node[key], dict | list) else [(node, key)]
    return found


def replacements(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [value + "x", "", None, 7]
    numbers = [value + 1, -1, float(value), str(value), None, 2**80]
    return [number for number in numbers if repr(number) != repr(value)]


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"format": "other/9"}', b"[" * 100_000, b'{"a": 1' + b"1" * 5000],
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="manifest"):
        Manifest.from_json(data)


@pytest.mark.parametrize("segments", [[], [{"tensors": []}], "abc"])
def test_a_manifest_without_layers_is_refused(segments: Any) -> None:
    content = json.loads(small().to_json()) | {"segments": segments}
    with pytest.raises(CheckpointError, match="manifest"):
        Manifest.from_json(json.dumps(content).encode())


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", ".", "", "a/b"])
def test_a_manifest_names_no_files_elsewhere(name: str) -> None:
    manifest = small()
    files = {name: "ab" * 32}
    hostile = seal(
        segments=manifest.segments,
        dtype=manifest.dtype,
        config={},
        files=files,
        chunk_bytes=manifest.chunk_bytes,
    )
    assert digest_of(hostile) == hostile.digest
    with pytest.raises(CheckpointError, match="not the name of a small file"):
        Manifest.from_json(hostile.to_json())
