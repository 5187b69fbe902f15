"""Parameters from pinned host memory into a device's regions, chunk by chunk, as a load of the host's copy does."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch
from bench.gpu.part import Figures, Setting, main, synchronize

from layercast_agent.device import DeviceMemory


def measure(setting: Setting) -> Figures:
    """GB/s by size of chunk and number of committing threads, and the share of the plain pinned copy."""
    device = setting.device
    nbytes = setting.choose(full=2 << 30, shake=1 << 30, small=16 << 20)
    memory = DeviceMemory(nbytes, device)
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    host.view(torch.int32).random_()
    figures: Figures = {}
    best = 0.0
    for chunk in (4 << 20, 16 << 20):
        for threads in (1, 2, 4):
            speed = max(_run(memory, host, chunk, threads) for _ in range(3))
            best = max(best, speed)
            figures[f"load_{chunk >> 20}mib_{threads}_threads_gb_per_s"] = speed / 1e9
    if not bool((memory.tensor == host.to(device)).all()):
        raise SystemExit("the device does not hold the host's bytes")
    if ceiling := setting.known.get("pinned_copy_gb_per_s"):
        figures["load_of_pinned_copy"] = best / 1e9 / float(ceiling)
    return figures


def _run(memory: DeviceMemory, host: torch.Tensor, chunk: int, threads: int) -> float:
    view = host.numpy().data
    memory.tensor.zero_()
    synchronize(memory.tensor.device)

    def commit(offset: int) -> None:
        staged = view[offset : offset + chunk]
        if memory.tensor.device.type == "cpu":
            memory.staging(offset, len(staged))[:] = staged
        memory.commit(offset, len(staged), staged)

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(commit, range(0, memory.nbytes, chunk)))
    return memory.nbytes / (time.perf_counter() - started)


if __name__ == "__main__":
    main(measure)
