"""Shares of ranks: put together again they are the checkpoint, whatever the heads, ranks and sizes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from layercast_agent.checkpoint_files import verify
from layercast_agent.errors import CheckpointError
from layercast_agent.layout import Manifest, plan_segments
from layercast_agent.packing import segment_file
from layercast_agent.store import Progress, Store
from layercast_agent.tensor_parallel import DEGREES, Split, part_of, span_of

Array = npt.NDArray[np.int64]

relaxed = settings(deadline=None, max_examples=80)


@st.composite
def groups(draw: st.DrawFn) -> list[Split]:
    """All ranks of a replica whose heads can be shared out."""
    ranks = draw(st.sampled_from(DEGREES))
    kv_heads = draw(st.sampled_from([1, 2, 4, 8, 16]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 3, 4, 8]))
    assume(heads % ranks == 0)
    head_dim = draw(st.integers(1, 9))
    return [
        Split(rank=rank, ranks=ranks, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        for rank in range(ranks)
    ]


def numbered(shape: tuple[int, ...]) -> Array:
    """A tensor in which no two elements are equal."""
    return np.arange(np.prod(shape), dtype=np.int64).reshape(shape)


def held(name: str, whole: Array, split: Split) -> Array:
    part = part_of(name, whole.shape, split)
    if part is None:
        return whole
    pieces = [np.take(whole, range(first, last), axis=part.axis) for first, last in part.spans]
    share = np.concatenate(pieces, axis=part.axis)
    assert share.shape == part.shape(whole.shape)
    return share


def shares(name: str, whole: Array, group: list[Split]) -> list[Array]:
    return [held(name, whole, split) for split in group]


def once(group: list[Split]) -> list[int]:
    """One rank for each KV head or group of them: the others hold the same again."""
    step = max(1, len(group) // group[0].kv_heads)
    return list(range(0, len(group), step))


@relaxed
@given(groups(), st.integers(8, 40), st.integers(1, 5), st.sampled_from(["mlp.gate_proj", "mlp.up_proj"]))
def test_outputs_and_inputs_put_together_are_the_whole(
    group: list[Split], inner: int, hidden: int, module: str
) -> None:
    up, bias, down = numbered((inner, hidden)), numbered((inner,)), numbered((hidden, inner))
    layer = "model.layers.3."
    assert np.array_equal(np.concatenate(shares(f"{layer}{module}.weight", up, group)), up)
    assert np.array_equal(np.concatenate(shares(f"{layer}{module}.bias", bias, group)), bias)
    assert np.array_equal(np.concatenate(shares(f"{layer}mlp.down_proj.weight", down, group), axis=1), down)
    # A rank's neurons are the same ones on both sides, or the partial sums would mean nothing.
    for mine, back in zip(
        shares(f"{layer}{module}.weight", up, group),
        shares(f"{layer}mlp.down_proj.weight", down, group),
        strict=True,
    ):
        assert len(mine) == back.shape[1]
    whole = numbered((hidden,))
    for name in ("mlp.down_proj.bias", "self_attn.o_proj.bias", "input_layernorm.weight", "mlp.gate.weight"):
        assert all(np.array_equal(share, whole) for share in shares(layer + name, whole, group))


@relaxed
@given(groups(), st.integers(1, 5))
def test_heads_are_shared_and_kv_heads_repeated(group: list[Split], hidden: int) -> None:
    heads, kv_heads, width = group[0].heads, group[0].kv_heads, group[0].head_dim
    query, output = numbered((heads * width, hidden)), numbered((hidden, heads * width))
    key = numbered((kv_heads * width, hidden))
    attention = "model.layers.0.self_attn."
    assert np.array_equal(np.concatenate(shares(f"{attention}q_proj.weight", query, group)), query)
    assert np.array_equal(np.concatenate(shares(f"{attention}o_proj.weight", output, group), axis=1), output)
    for name in ("k_proj", "v_proj"):
        parts = shares(f"{attention}{name}.weight", key, group)
        assert np.array_equal(np.concatenate([parts[rank] for rank in once(group)]), key)
    for split in group:
        first, last = split.kv_heads_held
        mine = range(*span_of(heads, split.rank, split.ranks))
        # Each query head finds its KV head at home.
        assert {head * kv_heads // heads for head in mine} == set(range(first, last))


@relaxed
@given(groups(), st.integers(1, 4), st.integers(8, 20))
def test_fused_matrices_are_those_of_their_parts(group: list[Split], hidden: int, inner: int) -> None:
    width = group[0].head_dim
    query = numbered((group[0].heads * width, hidden))
    key = numbered((group[0].kv_heads * width, hidden)) + 10_000
    value = key + 10_000
    gate, up = numbered((inner, hidden)), numbered((inner, hidden)) + 10_000
    layer = "model.layers.0."
    for split in group:
        fused = held(f"{layer}self_attn.qkv_proj.weight", np.concatenate([query, key, value]), split)
        named = [
            (f"{layer}self_attn.{n}_proj.weight", w) for n, w in zip("qkv", (query, key, value), strict=True)
        ]
        assert np.array_equal(fused, np.concatenate([held(name, whole, split) for name, whole in named]))
        both = held(f"{layer}mlp.gate_up_proj.weight", np.concatenate([gate, up]), split)
        named = [(f"{layer}mlp.gate_proj.weight", gate), (f"{layer}mlp.up_proj.weight", up)]
        assert np.array_equal(both, np.concatenate([held(name, whole, split) for name, whole in named]))


@relaxed
@given(st.integers(8, 1000), st.sampled_from(DEGREES))
def test_spans_are_even_and_cover_everything(size: int, ranks: int) -> None:
    spans = [span_of(size, rank, ranks) for rank in range(ranks)]
    assert spans[0][0] == 0 and spans[-1][1] == size
    assert all(left[1] == right[0] for left, right in pairwise(spans))
    lengths = [last - first for first, last in spans]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rank", "ranks"),
    [(4, 2, 0, 3), (4, 2, 2, 2), (6, 2, 0, 4), (12, 3, 0, 2), (8, 3, 0, 8)],
)
def test_heads_that_cannot_be_shared_out_are_refused(
    heads: int, kv_heads: int, rank: int, ranks: int
) -> None:
    with pytest.raises(CheckpointError, match="ranks"):
        Split(rank=rank, ranks=ranks, heads=heads, kv_heads=kv_heads, head_dim=8)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.mixer.in_proj.weight", (8, 8)),  # unknown
        ("model.layers.0.mlp.experts.gate_up_proj", (2, 8, 8)),  # fused experts
        ("model.layers.0.self_attn.q_proj.weight", (9, 8)),  # no whole heads
        ("model.layers.0.self_attn.q_proj.weight_scale", (8, 8)),
        ("model.layers.0.self_attn.qkv_proj.weight", (9, 8)),
        ("model.layers.0.mlp.gate_up_proj.weight", (9, 8)),
        ("model.layers.0.mlp.up_proj.weight", (1, 8)),  # a rank without a neuron
        ("model.embed_tokens.weight", (4, 4, 4)),
    ],
)
def test_what_cannot_be_split_is_named(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError) as caught:
        part_of(name, shape, Split(rank=0, ranks=2, heads=4, kv_heads=2, head_dim=2))
    assert caught.value.tensor == name


def test_norms_over_one_head_are_whole_and_over_all_heads_split() -> None:
    split = Split(rank=1, ranks=2, heads=4, kv_heads=2, head_dim=8)
    assert part_of("model.layers.0.self_attn.q_norm.weight", (8,), split) is None
    over_all = part_of("model.layers.0.self_attn.q_norm.weight", (32,), split)
    assert over_all is not None and over_all.spans == ((16, 32),)
    over_keys = part_of("model.layers.0.self_attn.k_norm.weight", (16,), split)
    assert over_keys is not None and over_keys.spans == ((8, 16),)
    sinks = part_of("model.layers.0.self_attn.sinks", (4,), split)
    assert sinks is not None and sinks.spans == ((2, 4),)


def ignore(progress: Progress) -> None:
    """Nobody looks."""


def rank_manifest(store: Store, folder: Path, *, rank: int, ranks: int) -> Manifest:
    return store.prepare(
        key=f"{folder}@{rank}/{ranks}",
        source=f"file://{folder}",
        revision="",
        dtype="",
        progress=ignore,
        rank=rank,
        ranks=ranks,
    )


def tensors_of(folder: Path, manifest: Manifest) -> dict[str, npt.NDArray[np.float32]]:
    """As any other program reads them."""
    found: dict[str, npt.NDArray[np.float32]] = {}
    for segment in manifest.segments:
        found |= load_file(folder / segment_file(segment.index))
    return {name: tensor for name, tensor in found.items() if not name.startswith("layercast.gap.")}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
def test_packed_ranks_put_together_are_the_checkpoint(
    tinymodels: ModuleType, store: Store, tmp_path: Path, family: str, ranks: int
) -> None:
    """The model has 4 heads and 2 KV heads, so four ranks repeat them; 4096-byte chunks and 2 MiB rows both occur."""
    source = tinymodels.make(tmp_path / family, family, layers=2)
    manifests = [rank_manifest(store, source, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({manifest.digest for manifest in manifests}) == ranks
    parts = []
    for rank, manifest in enumerate(manifests):
        folder = store.folder(manifest.digest)
        verify(folder)
        assert Manifest.from_json(manifest.to_json()) == manifest
        assert (manifest.rank, manifest.ranks) == (rank, ranks)
        parts.append(tensors_of(folder, manifest))
    for name, whole in load_file(source / "model.safetensors").items():
        if name not in parts[0]:
            continue  # the tied head
        pieces = [part[name] for part in parts]
        if pieces[0].shape == whole.shape:
            assert all(np.array_equal(piece, whole) for piece in pieces)
            continue
        axis = next(
            a for a, (mine, all_) in enumerate(zip(pieces[0].shape, whole.shape, strict=True)) if mine < all_
        )
        if ".k_proj" in name or ".v_proj" in name:
            pieces = pieces[:: max(1, ranks // 2)]
        assert np.array_equal(np.concatenate(pieces, axis=axis), whole)


def test_one_rank_is_the_checkpoint_as_it_always_was(store: Store, llama: Path) -> None:
    plain = store.prepare(key="plain", source=f"file://{llama}", revision="", dtype="", progress=ignore)
    single = rank_manifest(store, llama, rank=0, ranks=1)
    assert single.to_json() == plain.to_json()
    assert b"tensor_parallel" not in plain.to_json()
    shapes = {t.name: (t.dtype, t.shape) for segment in plain.segments for t in segment.tensors}
    alone = Split(rank=0, ranks=1, heads=4, kv_heads=2, head_dim=16)
    assert plan_segments(shapes, plain.layers, alone) == plan_segments(shapes, plain.layers)


def test_a_key_stands_for_one_rank(store: Store, llama: Path) -> None:
    first = rank_manifest(store, llama, rank=1, ranks=2)
    assert rank_manifest(store, llama, rank=1, ranks=2) is first  # remembered
    assert rank_manifest(store, llama, rank=0, ranks=2).digest != first.digest


def test_a_manifest_of_no_rank_is_refused(store: Store, llama: Path) -> None:
    text = rank_manifest(store, llama, rank=1, ranks=2).to_json()
    with pytest.raises(CheckpointError, match="no rank 2 of 2"):
        Manifest.from_json(text.replace(b'"rank":1', b'"rank":2'))
    with pytest.raises(CheckpointError, match="digest"):
        Manifest.from_json(text.replace(b'"rank":1', b'"rank":0'))
