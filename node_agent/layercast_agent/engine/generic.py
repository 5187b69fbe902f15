"""The generic block: transformers' own decoder layers, called one by one.

The modules are built on the meta device, so building costs no parameter memory; `attach` then points their
parameters at memory that somebody else owns and a transfer fills. Buffers (rotary frequencies, Gemma's embedding
scale) are in no checkpoint and are real from the start.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from layercast_agent.engine.architectures import ModelShape, transformers_config
from layercast_agent.engine.attention import AttentionKernel, BatchPlan, Scoring, attention_for
from layercast_agent.errors import AgentError, CheckpointError
from layercast_agent.layout import segment_index

LM_HEAD = "lm_head.weight"

ATTENTION = "layercast_paged"
"""Name under which our attention is registered with transformers."""

_building = threading.Lock()
"""init_empty_weights replaces a method of torch for the whole process while a model is built."""


class GenericModel:
    """A `LayeredModel` of any supported architecture."""

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        shape: ModelShape,
        device: torch.device,
        attention: AttentionKernel | None = None,
    ) -> None:
        """Raises as `shape_of`. `shape` comes from there; parameters are expected in its dtype, on `device`."""
        self.shape = shape
        self.device = device
        self._attention = attention or attention_for(device)
        self.config = transformers_config(config)
        self._causal_lm = _build(self.config, shape.dtype, device)
        decoder = self._causal_lm.get_decoder()
        self._embed: nn.Module = decoder.get_input_embeddings()
        self._layers: list[nn.Module] = list(decoder.layers)
        self._norm: nn.Module = getattr(decoder, _last_part(self.config))
        self._rotary: nn.Module = decoder.rotary_emb
        self._head: nn.Module = self._causal_lm.get_output_embeddings()
        self._rotary_kinds = _rotary_kinds(self._rotary, self.config)
        self._missing: list[set[str]] = [set() for _ in range(shape.layers + 2)]
        for name, tensor in self.named_tensors():
            if isinstance(tensor, nn.Parameter):
                self._missing[segment_index(name, shape.layers)].add(name)

    @property
    def block(self) -> str:
        """Which implementation runs, and with which attention."""
        return f"generic/{self._attention.name}"

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, as a checkpoint stores them: tied ones once.

        Parameters are on the meta device until attached. Buffers that a checkpoint may carry have their value of a
        fresh model until then.
        """
        for name, tensor in self._causal_lm.state_dict(keep_vars=True).items():
            if not (self.shape.tied and name == LM_HEAD):
                yield name, tensor

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compares a checkpoint's tensors with the model's before anything is loaded.

        Raises CheckpointError naming the first that is missing, unknown or of another shape.
        """
        wanted = dict(self.named_tensors())
        for name, tensor in wanted.items():
            if isinstance(tensor, nn.Parameter) and name not in shapes:
                raise CheckpointError("missing: the model needs it", tensor=name)
        for name, shape in shapes.items():
            if name not in wanted:
                raise CheckpointError("the model has no such parameter", tensor=name)
            if tuple(wanted[name].shape) != tuple(shape):
                raise CheckpointError(
                    f"shape {list(shape)} where the model has {list(wanted[name].shape)}", tensor=name
                )

    def attach(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Points parameters, named as in the checkpoint, at these tensors; no copy. Any subset, any order.

        Raises CheckpointError naming the tensor that the model does not have or has in another shape or dtype.
        """
        for name, tensor in tensors.items():
            owner, attribute = self._owner(name)
            expected: torch.Tensor = getattr(owner, attribute)
            if attribute in owner._buffers:
                _attach_buffer(owner, attribute, tensor, name=name)
                continue
            if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
                raise CheckpointError(
                    f"{tensor.dtype} {list(tensor.shape)} where the model has {expected.dtype} "
                    f"{list(expected.shape)}",
                    tensor=name,
                )
            # Not by setattr: while a model is being built elsewhere, that would move the parameter to the meta device.
            owner._parameters[attribute] = parameter = nn.Parameter(tensor, requires_grad=False)
            if self.shape.tied and owner is self._embed:
                self._head._parameters["weight"] = parameter
            self._missing[segment_index(name, self.shape.layers)].discard(name)

    @torch.inference_mode()
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [T] to hidden states [T, hidden size]."""
        self._require(0)
        hidden: torch.Tensor = self._embed(token_ids)
        multiplier = getattr(self.config, "embedding_multiplier", None)  # Granite
        return hidden if multiplier is None else hidden * multiplier

    @torch.inference_mode()
    def run_layers(self, first: int, last: int, hidden: torch.Tensor, batch: BatchPlan) -> torch.Tensor:
        """The primitive: runs layers [first, last) on hidden states [T, hidden size], returns [T, hidden size].

        Stores the KV of the batch's tokens in those layers, and expects that of all tokens before them.
        """
        positions = batch.positions[None]
        states = hidden[None]
        rotary = {
            kind: self._rotary(states, positions, **({"layer_type": kind} if kind else {}))
            for kind in set(self._rotary_kinds[first:last])
        }
        token = _running.set((batch, self._attention))
        try:
            for layer in range(first, last):
                self._require(layer + 1)
                states = self._layers[layer](
                    states,
                    attention_mask=None,
                    position_ids=positions,
                    past_key_values=None,
                    position_embeddings=rotary[self._rotary_kinds[layer]],
                )
        finally:
            _running.reset(token)
        return states[0]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after the last layer [N, hidden size] to logits [N, vocabulary], float32."""
        self._require(self.shape.layers + 1)
        if self.shape.tied:
            self._require(0)
        logits: torch.Tensor = self._head(self._norm(hidden[None]))[0]
        scale = getattr(self.config, "logit_scale", None)  # Cohere
        if scale is not None:
            logits = logits * scale
        scaling = getattr(self.config, "logits_scaling", None)  # Granite
        if scaling is not None:
            logits = logits / scaling
        cap = getattr(self.config, "final_logit_softcapping", None)  # Gemma
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits.float()

    def _require(self, segment: int) -> None:
        """A segment that is not attached must not be executed; whoever schedules knows what is resident."""
        if self._missing[segment]:
            raise AgentError(
                f"segment {segment} is executed, but {min(self._missing[segment])} is not attached"
            )

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        """The module that has a parameter, and the parameter's name there."""
        path, _, attribute = name.rpartition(".")
        if not (self.shape.tied and name == LM_HEAD):
            try:
                owner = self._causal_lm.get_submodule(path)
            except AttributeError:
                owner = None
            if owner is not None and attribute in (owner._parameters | owner._buffers):
                return owner, attribute
        raise CheckpointError("the model has no such parameter", tensor=name)


def _attach_buffer(owner: nn.Module, attribute: str, tensor: torch.Tensor, *, name: str) -> None:
    """A buffer keeps the precision of its checkpoint: routers' corrections are float32 in bfloat16 models."""
    expected: torch.Tensor = getattr(owner, attribute)
    if tensor.shape != expected.shape or tensor.dtype not in (expected.dtype, torch.float32):
        raise CheckpointError(
            f"{tensor.dtype} {list(tensor.shape)} where the model has {expected.dtype} {list(expected.shape)}",
            tensor=name,
        )
    owner._buffers[attribute] = tensor


def _last_part(config: Any) -> str:
    """Attribute of the norm behind the layers, from the model's own pipeline plan."""
    plan = getattr(config, "base_model_pp_plan", None) or {"norm": ()}
    return str(list(plan)[-1])


_running: ContextVar[tuple[BatchPlan, AttentionKernel]] = ContextVar("running")
"""Whose layers are being called on this thread: not every family passes keyword arguments on to its attention."""


def _registered_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: q [1, H, T, D], k and v [1, Hkv, T, D] to ([1, T, H, D], None).

    Only the `sliding_window` argument counts, not the module's attribute, which some families set on layers that
    see everything. `s_aux` are the attention sinks. `attention_mask` is not used: the plan knows better.
    """
    batch, attention = _running.get()
    output = attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        batch=batch,
        layer=int(module.layer_idx),  # type: ignore[arg-type]
        scoring=Scoring(
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=sliding_window,
            softcap=softcap,
            sinks=kwargs.get("s_aux"),
        ),
    )
    return output[None], None


def _build(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The module tree: parameters on the meta device, buffers on `device`."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(ATTENTION, _registered_attention)
    # Buffers are excluded on purpose: no checkpoint has them, so on the meta device they would be lost.
    with _building, torch.inference_mode(mode=False), init_empty_weights(include_buffers=False):
        modules = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    for module in modules.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return modules.eval()


def _rotary_kinds(rotary: nn.Module, config: Any) -> list[str]:
    """For each layer which of the model's rotary embeddings it takes: "" where there is only one."""
    if hasattr(rotary, "layer_types"):
        return list(config.layer_types)
    return [""] * int(config.num_hidden_layers)
