"""Which part of each tensor one rank of a tensor-parallel replica holds: one pure table of names.

A rank's share of a checkpoint is packed, named by its own digest and transferred like any other checkpoint, from rank
r of one replica to rank r of the next; nothing below the engine knows that it is a share. `layout.plan_segments` takes
a `Split` and places the parts instead of the whole tensors.

How an engine of `ranks` processes uses the parts (Megatron-LM, arXiv 1909.08053, section 3):

* q, k, v, gate and up are split by output (rows of the stored matrix), so each rank runs whole heads and whole
  neurons. With fewer KV heads than ranks, `ranks / kv_heads` neighbours hold the same KV head; `Split.kv_heads_held`
  says which, and each rank has its own KV cache of them.
* o_proj and down_proj are split by input (columns): each rank has a partial sum, and an all-reduce follows each of
  them. Their biases are whole on every rank and must be added once, after the all-reduce.
* Embedding and lm_head (one matrix when tied) are split by vocabulary: `span_of(vocab_size, ...)` are a rank's token
  ids. Ids outside it embed to zero and an all-reduce follows; logits are gathered, and where vocab_size is no
  multiple of the ranks the first ranks have one row more.
* Norms, routers and their biases are whole on every rank. q_norm and k_norm over one head are whole; over all heads
  (OLMo 2) they are split by head, and the mean square needs an all-reduce.

A name that is not in the table is refused rather than guessed at, so a wrong split cannot be served.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from layercast_agent.errors import CheckpointError

DEGREES = (1, 2, 4, 8)
"""Ranks that a replica may have."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One rank of `ranks` of a model with these heads. CheckpointError when the heads cannot be shared out."""

    rank: int
    ranks: int
    heads: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.ranks not in DEGREES or not 0 <= self.rank < self.ranks:
            known = ", ".join(map(str, DEGREES))
            raise CheckpointError(f"rank {self.rank} of {self.ranks} ranks: a replica has {known} ranks")
        if self.heads % self.ranks:
            raise CheckpointError(f"{self.heads} attention heads cannot be shared by {self.ranks} ranks")
        if self.kv_heads % self.ranks and self.ranks % self.kv_heads:
            raise CheckpointError(f"{self.kv_heads} KV heads cannot be shared by {self.ranks} ranks")

    @property
    def kv_heads_held(self) -> tuple[int, int]:
        """The KV heads [first, last) of this rank; several ranks hold the same one when there are fewer than ranks."""
        if self.kv_heads < self.ranks:
            first = self.rank * self.kv_heads // self.ranks
            return first, first + 1
        return span_of(self.kv_heads, self.rank, self.ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """`spans` of indices [first, last) along `axis` of the whole tensor, one after another."""

    axis: int
    spans: tuple[tuple[int, int], ...]

    def shape(self, whole: Shape) -> Shape:
        """Shape of the part of a tensor of shape `whole`."""
        length = sum(last - first for first, last in self.spans)
        return *whole[: self.axis], length, *whole[self.axis + 1 :]


class _Rule(Enum):
    """How a module's tensors are split; biases follow their outputs."""

    WHOLE = auto()
    HEADS = auto()  # outputs, by attention head
    KV_HEADS = auto()  # outputs, by KV head
    QKV = auto()  # outputs: q, k and v one below the other
    OUTPUTS = auto()  # outputs, evenly
    OUTPUT_PAIRS = auto()  # outputs: two matrices one below the other, each evenly
    HEAD_INPUTS = auto()  # inputs, by attention head; the bias is whole
    INPUTS = auto()  # inputs, evenly; the bias is whole
    HEADS_NORM = auto()  # one head: whole; all heads: by head
    KV_HEADS_NORM = auto()


# By the module's name, the last but one part of the parameter's.
_RULES: Mapping[str, _Rule] = {
    "embed_tokens": _Rule.OUTPUTS,
    "lm_head": _Rule.OUTPUTS,
    "q_proj": _Rule.HEADS,
    "k_proj": _Rule.KV_HEADS,
    "v_proj": _Rule.KV_HEADS,
    "qkv_proj": _Rule.QKV,
    "o_proj": _Rule.HEAD_INPUTS,
    "gate_proj": _Rule.OUTPUTS,
    "up_proj": _Rule.OUTPUTS,
    "gate_up_proj": _Rule.OUTPUT_PAIRS,
    "down_proj": _Rule.INPUTS,
    "w1": _Rule.OUTPUTS,  # Mixtral's experts: gate, down, up
    "w2": _Rule.INPUTS,
    "w3": _Rule.OUTPUTS,
    "q_norm": _Rule.HEADS_NORM,
    "k_norm": _Rule.KV_HEADS_NORM,
    "gate": _Rule.WHOLE,  # a router
    "router": _Rule.WHOLE,
    "shared_expert_gate": _Rule.WHOLE,
}


def span_of(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """[first, last) of `size` indices: as even as possible, the first ranks have one more."""
    share, more = divmod(size, ranks)
    first = rank * share + min(rank, more)
    return first, first + share + (rank < more)


def part_of(name: str, shape: Shape, split: Split) -> Part | None:
    """What the rank holds of a tensor: None for all of it.

    CheckpointError when the table does not know the name, or the shape does not fit the heads.
    """
    if split.ranks == 1:
        return None
    rule = _rule(name)
    if rule is None:
        raise CheckpointError(f"how to share it among {split.ranks} ranks is not known", tensor=name)
    axis = 1 if rule in (_Rule.INPUTS, _Rule.HEAD_INPUTS) else 0
    if rule is _Rule.WHOLE or (axis == 1 and len(shape) == 1):
        return None
    if len(shape) not in (1, 2):
        raise CheckpointError(f"shape {list(shape)} cannot be shared among ranks", tensor=name)
    spans = _spans(rule, shape[axis], split)
    if spans == ():
        raise CheckpointError(
            f"shape {list(shape)} cannot be shared among {split.ranks} ranks of {split.heads} heads and "
            f"{split.kv_heads} KV heads of {split.head_dim}",
            tensor=name,
        )
    return None if spans is None else Part(axis=axis, spans=spans)


def _rule(name: str) -> _Rule | None:
    module, _, last = name.rpartition(".")
    module = module.rpartition(".")[2]
    if last == "sinks":  # one number a head, without a module of its own
        return _Rule.HEADS
    if last not in ("weight", "bias"):
        return None
    known = _RULES.get(module)
    return _Rule.WHOLE if known is None and module.endswith("norm") else known


def _spans(rule: _Rule, size: int, split: Split) -> tuple[tuple[int, int], ...] | None:
    """Spans of `size` indices; None: all of them; (): they cannot be shared out."""
    heads = span_of(split.heads, split.rank, split.ranks)
    match rule:
        case _Rule.OUTPUTS | _Rule.INPUTS:
            return (span_of(size, split.rank, split.ranks),) if size >= split.ranks else ()
        case _Rule.OUTPUT_PAIRS:
            first, last = span_of(size // 2, split.rank, split.ranks)
            even = size % 2 == 0 and size // 2 >= split.ranks
            return ((first, last), (size // 2 + first, size // 2 + last)) if even else ()
        case _Rule.HEADS | _Rule.HEAD_INPUTS:
            return _by_head(size, heads, split.heads)
        case _Rule.KV_HEADS:
            return _by_head(size, split.kv_heads_held, split.kv_heads)
        case _Rule.QKV:
            return _fused(size, heads, split)
        case _Rule.HEADS_NORM:
            return None if size == split.head_dim else _by_head(size, heads, split.heads)
        case _Rule.KV_HEADS_NORM:
            return None if size == split.head_dim else _by_head(size, split.kv_heads_held, split.kv_heads)
        case _:
            return None


def _by_head(size: int, held: tuple[int, int], heads: int) -> tuple[tuple[int, int], ...]:
    width = size // heads
    return ((held[0] * width, held[1] * width),) if size % heads == 0 else ()


def _fused(size: int, heads: tuple[int, int], split: Split) -> tuple[tuple[int, int], ...]:
    width = size // (split.heads + 2 * split.kv_heads)
    if size != width * (split.heads + 2 * split.kv_heads):
        return ()
    keys, values = split.heads, split.heads + split.kv_heads
    starts = ((0, heads), (keys, split.kv_heads_held), (values, split.kv_heads_held))
    return tuple(((start + a) * width, (start + b) * width) for start, (a, b) in starts)


def byte_spans(part: Part, shape: Shape, item_bytes: int) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """The part as bytes of the row-major whole: (rows, bytes a row, spans of bytes in each row)."""
    rows = math.prod(shape[: part.axis])
    inner = math.prod(shape[part.axis + 1 :]) * item_bytes
    return rows, shape[part.axis] * inner, tuple((a * inner, b * inner) for a, b in part.spans)
