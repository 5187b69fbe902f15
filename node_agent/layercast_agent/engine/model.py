"""The seam between the engine and the implementations of a model: layers that run in slices.

Two implementations read one packed segment: `generic` runs transformers' own decoder layers and knows every supported
architecture; `fast` is a fused block written for the Llama family. Which one serves a model is decided here, once, and
said in the replica's status.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch

from layercast_agent.engine import cuda, llama
from layercast_agent.engine.architectures import ModelShape, shape_of, transformers_config
from layercast_agent.engine.attention import BatchPlan
from layercast_agent.engine.fast import FastModel
from layercast_agent.engine.generic import GenericModel
from layercast_agent.errors import UnsupportedArchitectureError

__all__ = ["BlockChoice", "LayeredModel", "ModelShape", "Wanted", "build_model", "choose_block", "shape_of"]


class LayeredModel(Protocol):
    """One model whose layers run in slices. Not thread-safe: the thread that owns the engine owns it.

    Parameters are attached segment by segment and are read where they lie; nothing is copied, so the same bytes go
    on to peers. A segment that is not attached must not be executed: AgentError.
    """

    shape: ModelShape
    device: torch.device

    @property
    def block(self) -> str:
        """Which implementation runs and with what, for status: "generic/sdpa", "fast/torch+sdpa", ..."""

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, as a checkpoint stores them: tied ones once. Parameters are meta tensors until attached."""

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compares a checkpoint's tensors with the model's before anything is loaded.

        Raises CheckpointError naming the first that is missing, unknown or of another shape.
        """

    def attach(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Points parameters, named as in the checkpoint, at these tensors. Any subset, any order.

        Raises CheckpointError naming the tensor that the model does not have or has in another shape or dtype.
        """

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [T] to hidden states [T, hidden size]."""

    def run_layers(self, first: int, last: int, hidden: torch.Tensor, batch: BatchPlan) -> torch.Tensor:
        """The primitive: runs layers [first, last) on hidden states [T, hidden size], returns [T, hidden size].

        Stores the KV of the batch's tokens in those layers, and expects that of all tokens before them. `hidden` is
        left as it was.
        """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after the last layer [N, hidden size] to logits [N, vocabulary], float32."""


class Wanted(Enum):
    """What a user asks for in `spec.serving.engine`."""

    AUTO = "auto"
    GENERIC = "generic"
    FAST = "fast"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockChoice:
    """Which implementation serves a model, and why."""

    fast: bool
    reason: str


def choose_block(config: Mapping[str, Any], wanted: Wanted = Wanted.AUTO) -> BlockChoice:
    """Fast where it can be, unless somebody wants the other.

    Raises as `shape_of`, and UnsupportedArchitectureError when the fast block is wanted and cannot run the model.
    """
    if wanted is Wanted.GENERIC:
        return BlockChoice(fast=False, reason="the generic block is asked for")
    found = llama.read(transformers_config(config))
    if isinstance(found, llama.LlamaShape):
        return BlockChoice(fast=True, reason="the fast block runs this model")
    if wanted is Wanted.FAST:
        raise UnsupportedArchitectureError(f"the fast block cannot run it: {found}", file="config.json")
    return BlockChoice(fast=False, reason=f"the fast block cannot run it: {found}")


def build_model(
    *, config: Mapping[str, Any], shape: ModelShape, device: torch.device, wanted: Wanted = Wanted.AUTO
) -> LayeredModel:
    """A model without parameters, as `choose_block` says. Raises as that does. `shape` comes from `shape_of`."""
    if choose_block(config, wanted).fast:
        sizes = llama.read(transformers_config(config))
        if (
            device.type == "cuda"
            and isinstance(sizes, llama.LlamaShape)
            and cuda.triton_missing(sizes) is None
        ):
            return cuda.CudaModel(config=config, shape=shape, device=device)
        return FastModel(config=config, shape=shape, device=device)
    return GenericModel(config=config, shape=shape, device=device)
