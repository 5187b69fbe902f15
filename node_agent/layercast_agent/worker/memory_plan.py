"""Plans a device's memory before anything is allocated: parameters first, the rest for KV pages.

Too little memory is found out here, at admission, with both sums in the sentence, and never by an allocation that
fails in the middle of a scale-up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from layercast_agent.errors import DeviceMemoryError

PAGE_TOKENS = 16
"""Tokens a KV page; what most paged kernels are tuned for."""

WORKSPACE_FRACTION = 0.05
"""Left for activations and the allocator; more than any step at our batch sizes used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """How a device's memory is divided for a replica, in bytes: one parameter slab, one KV arena, the rest."""

    device_bytes: int
    parameter_bytes: int
    kv_pages: int
    kv_page_bytes: int
    workspace_bytes: int

    @property
    def kv_bytes(self) -> int:
        return self.kv_pages * self.kv_page_bytes

    @property
    def total_bytes(self) -> int:
        return self.parameter_bytes + self.kv_bytes


def plan_memory(
    *,
    device_bytes: int,
    parameter_bytes: int,
    kv_bytes_per_token: int,
    context_length_max: int,
    batch_size_max: int,
) -> MemoryPlan:
    """As many KV pages as fit, at most what a full batch of full contexts could use.

    Raises DeviceMemoryError, which says what would fit, when not even one full context fits beside the parameters.
    """
    page_bytes = PAGE_TOKENS * kv_bytes_per_token
    context_pages = -(-context_length_max // PAGE_TOKENS)
    workspace_bytes = device_bytes - int(device_bytes * (1 - WORKSPACE_FRACTION))
    free_bytes = device_bytes - workspace_bytes - parameter_bytes
    pages = min(free_bytes // page_bytes, context_pages * batch_size_max)
    if pages < context_pages:
        raise DeviceMemoryError(
            f"the device has {_mib(device_bytes)}; the parameters need {_mib(parameter_bytes)} "
            f"and the KV cache of one context of {context_length_max} tokens "
            f"{_mib(context_pages * page_bytes)}, beside {WORKSPACE_FRACTION:.0%} for activations: "
            + _what_would_fit(
                pages=pages, needed_bytes=parameter_bytes + context_pages * page_bytes, page_bytes=page_bytes
            )
        )
    return MemoryPlan(
        device_bytes=device_bytes,
        parameter_bytes=parameter_bytes,
        kv_pages=int(pages),
        kv_page_bytes=page_bytes,
        workspace_bytes=workspace_bytes,
    )


def _what_would_fit(*, pages: int, needed_bytes: int, page_bytes: int) -> str:
    device = f"a device of {_mib(math.ceil(needed_bytes / (1 - WORKSPACE_FRACTION)))} would do"
    if pages < 1:
        return f"{device}, and no context fits this one"
    return f"{device}, or a context of at most {pages * PAGE_TOKENS} tokens here"


def _mib(nbytes: int) -> str:
    return f"{math.ceil(nbytes / 2**20)} MiB"
