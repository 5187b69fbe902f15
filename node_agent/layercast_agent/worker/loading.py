"""Turns a manifest into a model without parameters, and the memory that its parameters will land in.

Everything that takes time or memory at a scale-up beside the transfer itself happens here, once, before the first
chunk is asked for: the plan, the allocation, the construction of the modules on the meta device.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from layercast.agent.v1alpha1 import agent_pb2

from layercast_agent.device import DeviceMemory, free_bytes, slab_bytes, slab_of
from layercast_agent.engine.engine import Engine, EngineLimits
from layercast_agent.engine.guidance import Guides
from layercast_agent.engine.kv import KVCache
from layercast_agent.engine.model import ModelShape, Wanted, build_model, shape_of
from layercast_agent.holdings import Holding
from layercast_agent.layout import Manifest, SegmentSpec
from layercast_agent.regions import RegionRef
from layercast_agent.residency import Residency
from layercast_agent.worker.host import WorkerHost
from layercast_agent.worker.memory_plan import PAGE_TOKENS, MemoryPlan, plan_memory

log = logging.getLogger(__name__)

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of dtypes."""

REQUESTS_WAITING_MAX = 256
"""Bound of the engine's queue; gateways keep the long queue."""

STEP_TOKENS_MAX = {"cpu": 128, "cuda": 2048}
"""Tokens a step, by kind of device: small enough that decodes of the batch are not delayed for long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMemory:
    """A model on a device: modules, parameter memory, KV cache, and what peers may read of it."""

    manifest: Manifest
    shape: ModelShape
    engine: Engine
    memories: Sequence[DeviceMemory]
    residency: Residency
    regions: tuple[RegionRef, ...]
    host: WorkerHost
    plan: MemoryPlan

    def tensors(self, segment: int) -> Mapping[str, torch.Tensor]:
        """Views into a segment's memory by parameter name; no copy."""
        return views(self.manifest.segments[segment], self.memories[segment])

    def close(self, *, deadline_s: float) -> None:
        """Withdraws the copy: watchers go elsewhere, then readers are waited for."""
        self.host.holdings.remove(self.manifest.digest)
        for region in self.regions:
            self.host.table.remove(region.region_id, deadline_s=deadline_s)
        if self.host.reserve is not None:
            self.host.reserve.reset()


def views(segment: SegmentSpec, memory: DeviceMemory) -> dict[str, torch.Tensor]:
    """A segment's parameters by name, as they lie in its memory; no copy."""
    return {
        spec.name: memory.tensor[spec.offset : spec.offset + spec.nbytes]
        .view(TORCH_DTYPES[spec.dtype])
        .view(spec.shape)
        for spec in segment.tensors
    }


def build(
    *,
    spec: agent_pb2.StartReplicaRequest,
    manifest: Manifest,
    files: Mapping[str, bytes],
    host: WorkerHost,
) -> ModelMemory:
    """Plans and allocates; nothing is resident yet. Takes up to seconds: call it off the asyncio thread.

    Raises UnsupportedArchitectureError for the model's fault, DeviceMemoryError for the device's.
    """
    shape = shape_of(manifest.config, manifest.dtype)
    context_length_max = min(spec.context_length_max or shape.context_length_max, shape.context_length_max)
    batch_size_max = spec.batch_size_max or 16
    sizes = [segment.nbytes for segment in manifest.segments]
    free = free_bytes(host.device)
    allowed = host.settings.device_memory_bytes
    plan = plan_memory(
        device_bytes=allowed if free is None else min(allowed, free),
        parameter_bytes=slab_bytes(sizes),
        kv_bytes_per_token=shape.layers * shape.kv_row_bytes,
        context_length_max=context_length_max,
        batch_size_max=batch_size_max,
    )
    log.info("the device's memory is planned", extra=asdict(plan))
    wanted = Wanted(spec.engine if spec.engine not in ("", "auto") else host.settings.engine)
    model = build_model(config=manifest.config, shape=shape, device=host.device, wanted=wanted)
    model.check({spec.name: spec.shape for segment in manifest.segments for spec in segment.tensors})
    engine = Engine(
        model=model,
        kv=KVCache(shape, plan.kv_pages, page_size=PAGE_TOKENS, device=host.device),
        limits=EngineLimits(
            batch_size_max=batch_size_max,
            step_tokens_max=spec.step_tokens_max or STEP_TOKENS_MAX[host.device.type],
            waiting_max=REQUESTS_WAITING_MAX,
            context_length_max=context_length_max,
            prefix_caching=not spec.prefix_caching_off,
        ),
        key=manifest.digest,
        guides=Guides(files=files, vocab_size=shape.vocab_size),
    )
    touched = None if host.reserve is None else host.reserve.take(slab_bytes(sizes))
    memories = slab_of(sizes, host.device, host=touched)
    if host.plane is not None:
        for memory in memories:
            memory.adopts = False  # network cards read it where it was registered
    residency = Residency(manifest)
    regions = tuple(host.table.add(memory) for memory in memories)
    host.holdings.add(Holding(manifest=manifest, files=files, residency=residency, regions=regions))
    return ModelMemory(
        manifest=manifest,
        shape=shape,
        engine=engine,
        memories=memories,
        residency=residency,
        regions=regions,
        host=host,
        plan=plan,
    )
