"""CUDA graphs of decode steps: one for each batch size, captured while the replica serves.

A decode step of an 8 B model is three hundred launches of some microseconds each; the host cannot issue them as fast
as the GPU runs them. A graph is issued in one call. It is bound to addresses, so its inputs are copied into fixed
buffers, and a batch of another size runs in the next larger graph, in whose spare rows nothing is stored and nothing
is seen.

Capturing takes tens of milliseconds a size, so nobody waits for it: the first batch of a size runs as it is, and a
thread captures meanwhile on a stream of its own, in the mode in which other threads may go on (thread_local). If
that fails, for whatever reason, steps stay as they are, and the status says so.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from layercast_agent.engine.attention import BatchPlan, Span
from layercast_agent.engine.kv import KVCache
from layercast_agent.engine.tables import Decodes, Pages, Tables, page_table

if TYPE_CHECKING:
    from layercast_agent.engine.cuda import CudaModel

log = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
"""Sizes that get a graph; larger batches are bound by what they compute, not by their launches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """Fixed buffers of a graph of B rows: hidden [B, H] and all numbers, int32 and flat, so that they take one copy.

    The numbers are four rows of B (position, slot, positions seen, row in the batch) and then each row's `width` pages.
    """

    size: int
    width: int
    hidden: torch.Tensor
    numbers: torch.Tensor

    @classmethod
    def of(cls, model: CudaModel, kv: KVCache, size: int) -> _Inputs:
        pages = min(kv.allocator.total, -(-model.shape.context_length_max // kv.page_size))
        width = -(-pages // 16) * 16  # as wide as tables come
        numbers = _numbers(
            [], np.zeros((0, width), dtype=np.int32), page_size=kv.page_size, size=size, width=width
        )
        hidden = torch.zeros((size, model.shape.hidden_size), dtype=model.shape.dtype, device=kv.device)
        return cls(size=size, width=width, hidden=hidden, numbers=numbers.to(kv.device))

    def tables(self) -> Tables:
        """The buffers as a batch of single tokens."""
        position, slot, seen, row = self.numbers[: 4 * self.size].view(4, self.size)
        pages = self.numbers[4 * self.size :].view(self.size, self.width)
        decodes = Decodes(rows=row, lengths=seen, pages=pages)
        return Tables(positions=position, slots=slot, decodes=decodes, prefills=None)

    def set(self, hidden: torch.Tensor, batch: BatchPlan, pages: Pages) -> None:
        """The next replay's batch, and spare rows that store nothing and see nothing."""
        numbers = _numbers(batch.spans, pages, page_size=batch.kv.page_size, size=self.size, width=self.width)
        self.numbers.copy_(numbers.pin_memory(), non_blocking=True)
        self.hidden[: len(hidden)].copy_(hidden)


def _numbers(spans: Sequence[Span], pages: Pages, *, page_size: int, size: int, width: int) -> torch.Tensor:
    flat = np.zeros(size * (4 + width), dtype=np.int32)
    four = flat[: 4 * size].reshape(4, size)
    four[1], four[3] = -1, np.arange(size)
    for row, span in enumerate(spans):
        page, offset = divmod(span.start, page_size)
        four[:3, row] = span.start, span.pages[page] * page_size + offset, span.stop
    flat[4 * size :].reshape(size, width)[: len(spans), : pages.shape[1]] = pages
    return torch.from_numpy(flat)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: _Inputs
    output: torch.Tensor


class DecodeGraphs:
    """The graphs of one model over the KV cache that it is run with; another cache starts anew."""

    def __init__(self, model: CudaModel) -> None:
        self._model = model
        self._kv: KVCache | None = None
        self._captured: dict[int, _Captured] = {}
        self._asked: set[int] = set()
        self._failure: str | None = None
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="capture")
        self._stream: Any = None
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def state(self) -> str:
        """For status: which sizes are captured, or why none will be."""
        if self._failure is not None:
            return f"eager: capturing failed: {self._failure}"
        return f"graphs of {' '.join(map(str, sorted(self._captured)))}" if self._captured else "eager"

    def run(self, hidden: torch.Tensor, batch: BatchPlan) -> torch.Tensor | None:
        """All layers of a batch of single tokens; None when no graph fits it, which asks for one for the next time."""
        count = len(batch.spans)
        if count > BATCH_SIZES[-1] or any(span.count > 1 for span in batch.spans):
            return None
        size = BATCH_SIZES[bisect_left(BATCH_SIZES, count)]
        found = self._captured.get(size) if batch.kv is self._kv else None
        if found is None:
            self._ask_for(size, batch.kv)
            return None
        pages = page_table(batch.spans, batch.kv.page_size)
        if pages.shape[1] > found.inputs.width:
            return None
        found.inputs.set(hidden, batch, pages)
        found.graph.replay()
        # The buffer is the next step's, too.
        return found.output[:count].clone()

    def wait(self, timeout_s: float) -> None:
        """Returns when everything asked for is captured or has failed; for benchmarks and tests."""
        self._thread.submit(lambda: None).result(timeout_s)

    def _ask_for(self, size: int, kv: KVCache) -> None:
        with self._lock:
            if kv is not self._kv:
                self._kv, self._asked = kv, set()
                self._captured.clear()
            if size in self._asked or self._failure is not None:
                return
            self._asked.add(size)
        self._thread.submit(self._capture, size, kv)

    def _capture(self, size: int, kv: KVCache) -> None:
        try:
            captured = self._captured_graph(size, kv)
        except Exception as error:
            # Whatever the driver or a kernel objects to: steps go on without the graph.
            self._failure = f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("capturing a decode graph failed", extra={"batch_size": size}, exc_info=True)
            return
        with self._lock:
            if kv is self._kv:
                self._captured[size] = captured

    @torch.inference_mode()
    def _captured_graph(self, size: int, kv: KVCache) -> _Captured:
        if self._stream is None:
            self._stream = torch.cuda.Stream(kv.device)  # type: ignore[no-untyped-call]
        model, layers = self._model, self._model.shape.layers
        with torch.cuda.stream(self._stream):
            inputs = _Inputs.of(model, kv, size)
            # Once outside the graph: compiles and loads kernels, allocates cuBLAS's workspace. It stores nothing.
            model.execute(0, layers, inputs.hidden, kv, inputs.tables())
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = model.execute(0, layers, inputs.hidden, kv, inputs.tables())
            finally:
                graph.capture_end()
            self._pool = graph.pool()
        return _Captured(graph=graph, inputs=inputs, output=output)
