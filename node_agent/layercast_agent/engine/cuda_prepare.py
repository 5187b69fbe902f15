"""Compiles and loads the kernels of a model before its first layer is resident.

Triton compiles a kernel when it is first launched, for the types and the divisibility of its arguments: more than a
second for a model, a few hundredths when the node's cache on disk has it. So a thread launches each kernel once, with
arguments of the model's kind that read next to nothing and store nothing, while the parameters are on their way.
"""

from __future__ import annotations

import threading

import torch

from layercast_agent.engine.llama import LlamaShape

PAGE_SIZE = 16
BATCHES = (1, 2, 32, 64)
"""One of each class of batches for which a kernel is compiled by itself."""


class Preparation:
    """A thread that launches every kernel once: first those that prompts need, then those for few rows."""

    def __init__(
        self, sizes: LlamaShape, dtype: torch.dtype, device: torch.device, page_size: int = PAGE_SIZE
    ) -> None:
        self._arguments = (sizes, dtype, device)
        self._page_size = page_size
        self._failure: Exception | None = None
        self._for_prompts, self._for_all = threading.Event(), threading.Event()
        # No daemon: the interpreter would end it in the middle of a compiler, which ends the process with SIGABRT.
        threading.Thread(target=self._run, name="kernels").start()

    def wait(self, *, few: bool) -> None:
        """Returns once the kernels of a batch of few rows, or of many, are there. Raises what went wrong with them."""
        (self._for_all if few else self._for_prompts).wait()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                launch_for_prompts(*self._arguments, page_size=self._page_size)
                self._for_prompts.set()
                launch_for_few(*self._arguments)
        except Exception as error:
            # Told to whoever needs the kernels, on its own thread.
            self._failure = error
        finally:
            self._for_prompts.set()
            self._for_all.set()


def launch_for_prompts(
    sizes: LlamaShape, dtype: torch.dtype, device: torch.device, *, page_size: int
) -> None:
    """Each kernel once, as `cuda.CudaModel.execute` launches it, but those that stream matrices."""
    from layercast_agent.engine import triton_ops as ops

    row = torch.ones((2, sizes.hidden_size), dtype=dtype, device=device)
    ops.rms_norm(row, row[0], sizes.norm_eps)
    ops.add_rms_norm(row, row.clone(), row[0], sizes.norm_eps)
    ops.silu_mul(torch.ones((2, 2 * sizes.inner), dtype=dtype, device=device))
    _attention(sizes, dtype, device, page_size)


def launch_for_few(sizes: LlamaShape, dtype: torch.dtype, device: torch.device) -> None:
    """The products of few rows."""
    from layercast_agent.engine import triton_ops as ops

    if dtype.itemsize > 2:
        return
    for batch in BATCHES:
        for gated in (False, True):
            # As many columns as the table wants to see, and a matrix of few.
            tiles = ops.tiles_of(batch, 1 << 20, gated=gated)
            if tiles is not None:
                matrix = torch.ones((256, sizes.hidden_size), dtype=dtype, device=device)
                ops.skinny(matrix[:batch], matrix, tiles, gated=gated)


def _attention(sizes: LlamaShape, dtype: torch.dtype, device: torch.device, page_size: int) -> None:
    from layercast_agent.engine import triton_ops as ops
    from layercast_agent.engine.triton_attention import decode_attention, prefill_attention

    heads = sizes.heads + 2 * sizes.kv_heads
    qkv = torch.ones((2, heads * sizes.head_dim), dtype=dtype, device=device)
    cache = torch.ones((page_size, sizes.kv_heads, sizes.head_dim), dtype=dtype, device=device)
    angles = torch.ones((2, sizes.head_dim // 2), device=device)
    nothing = torch.zeros(16, dtype=torch.int32, device=device)
    gain = torch.ones(sizes.head_dim, dtype=dtype, device=device)
    for numbers in (torch.int32, torch.int64):
        ops.rope_store(
            qkv,
            norms=(gain, gain) if sizes.qk_norm else None,
            angles=(angles, angles),
            positions=nothing[:2].to(numbers),
            slots=torch.full((2,), -1, dtype=numbers, device=device),
            keys=cache,
            values=cache,
            q_heads=sizes.heads,
            eps=sizes.norm_eps,
        )
    out = torch.empty((2, sizes.heads * sizes.head_dim), dtype=dtype, device=device)
    pages = nothing.view(1, 16)
    for window in set(sizes.windows):
        decode_attention(
            qkv, cache, cache, rows=nothing[:1], lengths=nothing[:1], pages=pages, out=out,
            page_size=page_size, scale=sizes.scale, window=window,
        )  # fmt: skip
        prefill_attention(
            qkv, cache, cache, tiles=(nothing[:1], nothing[:1]), rows=nothing[:1], starts=nothing[:1],
            counts=nothing[:1], pages=pages, out=out, page_size=page_size, scale=sizes.scale, window=window,
        )  # fmt: skip
