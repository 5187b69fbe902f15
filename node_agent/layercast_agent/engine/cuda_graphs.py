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
from layercast_agent.engine.tables import Decodes, Tables

if TYPE_CHECKING:
    from layercast_agent.engine.cuda import CudaModel

log = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
"""Sizes that get a graph; larger batches are bound by what they compute, not by their launches."""


class _Inputs:
    """Fixed buffers of a graph of B rows: hidden [B, H] and all numbers, int32 and flat, so that they take one copy.

    The numbers are four rows of B (position, slot, positions seen, row in the batch) and then each row's `width` pages.
    Spare rows store nothing (slot -1) and see nothing.
    """

    def __init__(self, model: CudaModel, kv: KVCache, size: int) -> None:
        pages = min(kv.allocator.total, -(-model.shape.context_length_max // kv.page_size))
        self.width = -(-pages // 16) * 16
        self._size = size
        self._page_size = kv.page_size
        self.hidden = torch.zeros((size, model.shape.hidden_size), dtype=model.shape.dtype, device=kv.device)
        host = torch.zeros(size * (4 + self.width), dtype=torch.int32, pin_memory=kv.device.type == "cuda")
        self._numbers = host.to(kv.device)
        self._host, flat = host, host.numpy()
        self._four = flat[: 4 * size].reshape(4, size)
        self._four[3] = np.arange(size)
        self._pages = flat[4 * size :].reshape(size, self.width)
        self._held: list[list[int]] = [[] for _ in range(size)]
        self._sent: Any = torch.cuda.Event() if kv.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.set(())

    def tables(self) -> Tables:
        """The buffers as a batch of single tokens."""
        position, slot, seen, row = self._numbers[: 4 * self._size].view(4, self._size)
        pages = self._numbers[4 * self._size :].view(self._size, self.width)
        decodes = Decodes(rows=row, lengths=seen, pages=pages)
        return Tables(positions=position, slots=slot, decodes=decodes, prefills=None)

    def set(self, spans: Sequence[Span]) -> None:
        """The numbers of the next replay's batch; returns before they are there."""
        if self._sent is not None:
            self._sent.synchronize()  # the host's copy may still be on its way
        count, page_size = len(spans), self._page_size
        self._four[1:3] = ((-1,), (0,))
        self._four[0, :count] = [span.start for span in spans]
        self._four[1, :count] = [
            span.pages[span.start // page_size] * page_size + span.start % page_size for span in spans
        ]
        self._four[2, :count] = [span.stop for span in spans]
        for row, span in enumerate(spans):
            # Most steps change no page: comparing lists is far cheaper than converting them.
            if self._held[row] != span.pages:
                self._held[row] = list(span.pages)
                self._pages[row, : len(span.pages)] = span.pages
        self._numbers.copy_(self._host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()


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
        self._pool: Any = None

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
        if any(len(span.pages) > found.inputs.width for span in batch.spans):
            return None
        found.inputs.set(batch.spans)
        found.inputs.hidden[:count].copy_(hidden)
        found.graph.replay()
        # The buffer is the next step's, too.
        return found.output[:count].clone()

    def wait(self, timeout_s: float) -> None:
        """Returns when everything asked for is captured or has failed; for benchmarks and tests."""
        self._thread.submit(lambda: None).result(timeout_s)

    def _ask_for(self, size: int, kv: KVCache) -> None:
        with self._lock:
            if kv is not self._kv:
                # Nobody may capture into a pool whose last graph is gone.
                self._kv, self._asked, self._pool = kv, set(), torch.cuda.graph_pool_handle()
                self._captured.clear()
            if size in self._asked or self._failure is not None:
                return
            self._asked.add(size)
        self._thread.submit(self._capture, size, kv, self._pool)

    def _capture(self, size: int, kv: KVCache, pool: Any) -> None:
        try:
            captured = self._captured_graph(size, kv, pool)
        except Exception as error:
            # Whatever the driver or a kernel objects to: steps go on without the graph.
            self._failure = f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("capturing a decode graph failed", extra={"batch_size": size}, exc_info=True)
            return
        with self._lock:
            if kv is self._kv:
                self._captured[size] = captured

    @torch.inference_mode()
    def _captured_graph(self, size: int, kv: KVCache, pool: Any) -> _Captured:
        if self._stream is None:
            self._stream = torch.cuda.Stream(kv.device)  # type: ignore[no-untyped-call]
        model, layers = self._model, self._model.shape.layers
        with torch.cuda.stream(self._stream):
            inputs = _Inputs(model, kv, size)
            # Once outside the graph: compiles and loads kernels, allocates cuBLAS's workspace. It stores nothing.
            model.execute(0, layers, inputs.hidden, kv, inputs.tables())
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                output = model.execute(0, layers, inputs.hidden, kv, inputs.tables())
            finally:
                graph.capture_end()
        return _Captured(graph=graph, inputs=inputs, output=output)
