"""From the names in files on the hub to those of the model as transformers builds it, experts merged. Pure.

Hub checkpoints of mixtures of experts store each expert by itself; transformers 5 computes them all with one matrix
[experts, rows, columns]. The merge happens once, while packing: the merged tensor is the experts' bytes laid end to
end, so it is described here by its parts and nothing is computed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from layercast_agent.errors import CheckpointError
from layercast_agent.safetensors_header import StoredTensor

_EXPERT = re.compile(r"(?P<experts>.+\.mlp\.experts)\.(?P<number>\d+)\.(?P<matrix>\w+)\.weight")
_MERGED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""A merged tensor, and what lies in it of each expert."""

_MIXTRAL_MATRICES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What configs call the number of experts."""

_PREDICTS_FURTHER = frozenset({"deepseek_v3", "glm4_moe"})
"""Families whose files have layers behind the last one, for drafts of later tokens; nobody runs them."""

_UNREAD_SUFFIXES = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
"""Buffers of old files, which every model computes by itself."""


def embedding_name(family: str) -> str:
    """The parameter that holds the token embeddings."""
    return "gpt_neox.embed_in.weight" if family == "gpt_neox" else "model.embed_tokens.weight"


def parameter_name(family: str, stored: str, layers: int) -> str | None:
    """The model's name of a stored tensor; None for one that nobody reads."""
    if stored.endswith(_UNREAD_SUFFIXES):
        return None
    trunk = "gpt_neox." if family == "gpt_neox" else "model."
    name = re.sub(r"^embed_out\.", "lm_head.", stored) if family == "gpt_neox" else stored
    if not name.startswith((trunk, "lm_head.")):
        name = trunk + name
    if family == "mixtral":
        name = name.replace(".block_sparse_moe.", ".mlp.")
        name = re.sub(r"(?<=\.)w[123](?=\.weight$)", lambda found: _MIXTRAL_MATRICES[found[0]], name)
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if family in _PREDICTS_FURTHER and layer and int(layer[1]) >= layers:
        return None
    return name


def merge_experts(config: Mapping[str, Any], found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`found` with each layer's experts as one tensor. CheckpointError for one that is missing or misshapen."""
    merged: dict[str, StoredTensor] = {}
    groups: dict[str, dict[tuple[int, str], StoredTensor]] = {}
    for name, tensor in found.items():
        expert = _EXPERT.fullmatch(name)
        if expert is None:
            merged[name] = tensor
        else:
            group = groups.setdefault(expert["experts"], {})
            group[int(expert["number"]), expert["matrix"]] = tensor
    for experts, group in groups.items():
        count = next((config[key] for key in _EXPERT_COUNTS if isinstance(config.get(key), int)), None)
        count = max(number for number, _ in group) + 1 if count is None else count
        for target, matrices in _MERGED.items():
            wanted = [(number, matrix) for number in range(count) for matrix in matrices]
            parts = [_part(group, experts, *key) for key in wanted]
            merged[f"{experts}.{target}"] = _laid_out(f"{experts}.{target}", parts, count)
        if group:
            (number, matrix), stray = next(iter(group.items()))
            name = f"{experts}.{number}.{matrix}.weight"
            raise CheckpointError("the model has no such expert", file=stray.file, tensor=name)
    return merged


def _part(group: dict[tuple[int, str], StoredTensor], experts: str, number: int, matrix: str) -> StoredTensor:
    part = group.pop((number, matrix), None)
    if part is None:
        raise CheckpointError("missing: no file has it", tensor=f"{experts}.{number}.{matrix}.weight")
    return part


def _laid_out(name: str, parts: Iterable[StoredTensor], count: int) -> StoredTensor:
    first, *rest = parts = tuple(parts)
    for part in rest:
        if (part.dtype, part.shape) != (first.dtype, first.shape):
            raise CheckpointError(
                f"{part.dtype} {list(part.shape)} where the first expert has {first.dtype} {list(first.shape)}",
                file=part.file,
                tensor=part.name,
            )
    rows = first.shape[0] * len(parts) // count
    nbytes = sum(part.nbytes for part in parts)
    return replace(first, name=name, shape=(count, rows, *first.shape[1:]), nbytes=nbytes, parts=parts)
