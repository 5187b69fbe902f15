"""Plans a device's memory before anything is allocated: parameters first, the rest for KV pages.

Too little memory is found out here, at admission, with both sums in the sentence, and never by an allocation that
fails in the middle of a scale-up.
"""

from __future__ import annotations

from dataclasses import dataclass

from layercast_agent.errors import DeviceMemoryError

PAGE_TOKENS = 16
"""Tokens a KV page; what most paged kernels are tuned for."""

WORKSPACE_FRACTION = 0.05
"""Left for activations and the allocator; more than any step at our batch sizes used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What is allocated for a replica, in bytes."""

    parameter_bytes: int
    kv_pages: int
    kv_page_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.parameter_bytes + self.kv_pages * self.kv_page_bytes


def plan_memory(
    *,
    device_bytes: int,
    parameter_bytes: int,
    kv_bytes_per_token: int,
    context_length_max: int,
    batch_size_max: int,
) -> MemoryPlan:
    """As many KV pages as fit, at most what a full batch of full contexts could use.

    Raises DeviceMemoryError when not even one full context fits beside the parameters.
    """
    page_bytes = PAGE_TOKENS * kv_bytes_per_token
    context_pages = -(-context_length_max // PAGE_TOKENS)
    free_bytes = int(device_bytes * (1 - WORKSPACE_FRACTION)) - parameter_bytes
    pages = min(free_bytes // page_bytes, context_pages * batch_size_max)
    if pages < context_pages:
        raise DeviceMemoryError(
            f"the device has {device_bytes / 2**20:.0f} MiB; the parameters need {parameter_bytes / 2**20:.0f} MiB "
            f"and the KV cache of one context of {context_length_max} tokens "
            f"{context_pages * page_bytes / 2**20:.0f} MiB, beside {WORKSPACE_FRACTION:.0%} for activations"
        )
    return MemoryPlan(parameter_bytes=parameter_bytes, kv_pages=int(pages), kv_page_bytes=page_bytes)
