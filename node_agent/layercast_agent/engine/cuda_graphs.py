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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from layercast_agent.engine.attention import BatchPlan
from layercast_agent.engine.kv import KVCache

if TYPE_CHECKING:
    from layercast_agent.engine.cuda import CudaModel, Tables

log = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
"""Sizes that get a graph; larger batches are bound by what they compute, not by their launches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """Fixed buffers for up to B rows: hidden [B, H]; positions, slots int64 [B]; rows, lengths int32 [B]; pages."""

    hidden: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor
    lengths: torch.Tensor
    pages: torch.Tensor

    @classmethod
    def of(cls, model: CudaModel, kv: KVCache, size: int) -> _Inputs:
        pages = min(kv.allocator.total, -(-model.shape.context_length_max // kv.page_size))
        device = kv.device
        return cls(
            hidden=torch.zeros((size, model.shape.hidden_size), dtype=model.shape.dtype, device=device),
            positions=torch.zeros(size, dtype=torch.int64, device=device),
            slots=torch.full((size,), -1, dtype=torch.int64, device=device),
            rows=torch.arange(size, dtype=torch.int32, device=device),
            lengths=torch.zeros(size, dtype=torch.int32, device=device),
            # A little wider than needed: tables come in multiples of 16.
            pages=torch.zeros((size, -(-pages // 16) * 16), dtype=torch.int32, device=device),
        )

    def tables(self) -> Tables:
        """The buffers as a batch of single tokens."""
        from layercast_agent.engine.cuda import Decodes, Tables

        decodes = Decodes(rows=self.rows, lengths=self.lengths, pages=self.pages)
        return Tables(positions=self.positions, slots=self.slots, decodes=decodes, prefills=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: _Inputs
    output: torch.Tensor


class DecodeGraphs:
    """The graphs of one model over one KV cache, the first it is run with."""

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
        from layercast_agent.engine.cuda import page_table

        count = len(batch.spans)
        if count > BATCH_SIZES[-1] or any(span.count > 1 for span in batch.spans):
            return None
        size = BATCH_SIZES[bisect_left(BATCH_SIZES, count)]
        found = self._captured.get(size)
        if found is None or batch.kv is not self._kv:
            self._ask_for(size, batch.kv)
            return None
        inputs = found.inputs
        table = torch.from_numpy(page_table(batch.spans, batch.kv.page_size))
        if table.shape[1] > inputs.pages.shape[1]:
            return None
        inputs.hidden[:count].copy_(hidden)
        inputs.positions[:count].copy_(batch.positions)
        inputs.slots.fill_(-1)
        inputs.slots[:count].copy_(batch.slots)
        inputs.lengths.zero_()
        inputs.lengths[:count].copy_(batch.positions + 1)
        inputs.pages[:count, : table.shape[1]].copy_(table)
        found.graph.replay()
        # The buffer is the next step's, too.
        return found.output[:count].clone()

    def wait(self, timeout_s: float) -> None:
        """Returns when everything asked for is captured or has failed; for benchmarks and tests."""
        self._thread.submit(lambda: None).result(timeout_s)

    def _ask_for(self, size: int, kv: KVCache) -> None:
        with self._lock:
            if self._kv is None:
                self._kv = kv
            if size in self._asked or self._failure is not None or kv is not self._kv:
                return
            self._asked.add(size)
        self._thread.submit(self._capture, size, kv)

    def _capture(self, size: int, kv: KVCache) -> None:
        try:
            self._captured[size] = self._captured_graph(size, kv)
        except Exception as error:
            # Whatever the driver or a kernel objects to: steps go on without the graph.
            self._failure = f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("capturing a decode graph failed", extra={"batch_size": size}, exc_info=True)

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
