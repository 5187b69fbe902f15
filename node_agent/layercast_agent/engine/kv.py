"""KV pages: one allocation for all layers, written by slot and read in place where pages lie in one run.

A slot is one position of one page; slot = page x page size + offset. In memory layer comes first, then key or value,
then slots: the KV of some layers at some positions is one indexed read, in the order in which a handoff sends it.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch

from layercast_agent.engine.architectures import ModelShape
from layercast_agent.engine.pages import PageAllocator

__all__ = ["KVCache", "PageAllocator"]


class KVCache:
    """Keys and values of all layers. `allocator` says whose pages are whose; the engine's scheduler uses it."""

    def __init__(self, shape: ModelShape, pages: int, page_size: int = 16, *, device: torch.device) -> None:
        self.page_size = page_size
        self.device = device
        self.dtype = shape.dtype
        self.layers = shape.layers
        self.row_bytes = shape.kv_row_bytes
        """Bytes of one position in one layer."""
        self.allocator = PageAllocator(pages)
        size = (shape.layers, 2, pages * page_size, shape.kv_heads, shape.head_dim)
        with torch.inference_mode(mode=False):
            # Outside inference mode, so that it may be written both inside and outside.
            self._slots = _zeros(size, shape.dtype, device)

    def key(self, layer: int) -> torch.Tensor:
        """Keys of a layer, [pages, page size, kv heads, head dim]; a view."""
        return self._slots[layer, 0].view(-1, self.page_size, *self._slots.shape[3:])

    def value(self, layer: int) -> torch.Tensor:
        """Values of a layer, [pages, page size, kv heads, head dim]; a view."""
        return self._slots[layer, 1].view(-1, self.page_size, *self._slots.shape[3:])

    def slots(self, pages: Sequence[int], start: int, stop: int) -> torch.Tensor:
        """Slots of positions [start, stop) of a request that holds these pages: [stop - start] int64, on the host."""
        positions = torch.arange(start, stop)
        table = torch.tensor(pages, dtype=torch.int64)
        return table[positions // self.page_size] * self.page_size + positions % self.page_size

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores keys and values [T, kv heads, head dim] of the positions at `slots` [T] (on the device)."""
        self._slots[layer, 0].index_copy_(0, slots, keys)
        self._slots[layer, 1].index_copy_(0, slots, values)

    def by_head(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer at all slots, each [kv heads, slots, head dim]; views."""
        keys, values = self._slots[layer].transpose(1, 2).unbind(0)
        return keys, values

    def export_rows(
        self, pages: Sequence[int], *, first: int, last: int, start: int, stop: int
    ) -> torch.Tensor:
        """A copy of layers [first, last) at positions [start, stop): [layers, 2, positions, kv heads, head dim]."""
        slots = self.slots(pages, start, stop).to(self.device)
        return self._slots[first:last].index_select(2, slots)

    def import_rows(self, pages: Sequence[int], data: torch.Tensor, *, first: int, start: int) -> None:
        """Stores what `export_rows` returned from layer `first` and position `start` on."""
        layers, _, positions = data.shape[:3]
        slots = self.slots(pages, start, start + positions).to(self.device)
        self._slots[first : first + layers].index_copy_(2, slots, data.to(self.device))


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros: a stale NaN could leak through a mask. On a CPU the kernel's own, which cost nothing until written:
    torch.zeros touches every page, seconds of a scale-up for gigabytes. Small pages: a layer's first token would zero
    two huge ones, and while a replica loads that took twice as long as the layer (numpy.zeros asks for huge ones).
    """
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    nbytes = math.prod(size) * dtype.itemsize
    memory = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes).view(dtype).view(size)
