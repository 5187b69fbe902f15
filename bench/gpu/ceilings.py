"""What the device can do at most: copies, matrix products, copies from pinned memory."""

from __future__ import annotations

import platform

import torch
from bench.gpu.part import Figures, Setting, main, seconds


def measure(setting: Setting) -> Figures:
    """GB/s of a copy (read and written bytes), of reading, TFLOP/s of a bf16 product, GB/s from pinned memory."""
    device = setting.device
    nbytes = setting.choose(full=4 << 30, shake=2 << 30, small=8 << 20)
    one, other = (torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    one.view(torch.int32).random_()
    copied = 2 * nbytes / seconds(lambda: other.copy_(one), device)
    size = 8192 if not setting.small else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * size**3 / seconds(lambda: a @ b, device, repeat=20, warm=5)
    host = torch.empty(nbytes // 2, dtype=torch.uint8, pin_memory=device.type == "cuda")
    host.view(torch.int32)[::1024] = 1
    loaded = host.numel() / seconds(
        lambda: one[: host.numel()].copy_(host, non_blocking=True), device, repeat=5, warm=1
    )
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu"
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else 0.0
    return {
        "device": name,
        "device_gib": memory,
        "torch": torch.__version__,
        "copy_gb_per_s": copied / 1e9,
        "matmul_tflop_per_s": product / 1e12,
        "pinned_copy_gb_per_s": loaded / 1e9,
    }


if __name__ == "__main__":
    main(measure)
