"""The C++ layer: which build is taken, what happens without one, and that bfloat16 chooses the same tokens."""

from __future__ import annotations

import platform
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from layercast_agent.engine import native
from layercast_agent.engine.attention import BatchPlan, Span

ZEN_4 = ["sse2", "avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"]


def test_the_best_build_that_a_processor_runs_comes_first() -> None:
    assert native.supported_builds(ZEN_4, "x86_64") == ["avx512bf16", "avx512", "avx2", "sse"]
    assert native.supported_builds(ZEN_4[:5], "x86_64") == ["avx2", "sse"]
    assert native.supported_builds(["sse2"], "x86_64") == ["sse"]
    assert native.supported_builds([], "aarch64") == ["arm"]
    assert native.supported_builds(ZEN_4, "riscv64") == []


def test_without_a_compiler_plain_torch_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv("CXX", "/bin/false")
    reason = native.library.__wrapped__()
    assert isinstance(reason, str)
    assert "/bin/false failed" in reason
    monkeypatch.setenv(native.FOLDER_VARIABLE, "off")
    assert native.library.__wrapped__() == "LAYERCAST_NATIVE_DIR is off"


def test_a_build_is_kept(tmp_path: Path) -> None:
    name = native.supported_builds(native._cpu_flags(), platform.machine())[-1]
    first = native.build(name, tmp_path)
    made_at = first.stat().st_mtime_ns
    assert native.build(name, tmp_path) == first
    assert first.stat().st_mtime_ns == made_at
    assert list(tmp_path.iterdir()) == [first]
    # The least that a processor can do computes the same.
    native.Library(name, first)


@pytest.mark.parametrize("tokens", [1, 3, 20, 21, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_every_size(tokens: int, dtype: torch.dtype) -> None:
    """Few tokens are dot products, many are panels; widths that no register divides."""
    library = native.library()
    assert isinstance(library, native.Library), library
    generator = torch.Generator().manual_seed(tokens)
    for rows, width in ((1, 3), (33, 64), (129, 67)):
        hidden = torch.randn((tokens, width), generator=generator).to(dtype)
        matrix = torch.randn((rows, width), generator=generator).to(dtype)
        norm = torch.rand(width, generator=generator).to(dtype)
        shape = native.Shape(hidden=width, bfloat16=dtype is torch.bfloat16, eps=1e-5)
        found = library.head(shape, hidden=hidden, norm=norm, matrix=matrix)
        normed = torch.nn.functional.rms_norm(hidden.float(), (width,), norm.float(), 1e-5)
        torch.testing.assert_close(found, normed @ matrix.float().T, atol=1e-4, rtol=1e-4)


def test_bfloat16_chooses_the_same_tokens(fast: Any, families: ModuleType) -> None:
    """Where the best token leads by more than rounding can turn: as fp32 over the same rounded parameters."""
    prompt = families.prompts([120])[0]
    logits = {}
    for dtype in ("float32", "bfloat16"):
        judge = _rounded(fast.judge).to(getattr(torch, dtype))  # a copy: other tests share the judge
        model = families.attached(fast.config, judge, dtype, fast.block)
        kv = families.KVCache(model.shape, 40, page_size=4, device=families.CPU)
        batch = BatchPlan.of(kv, [Span(start=0, count=120, pages=kv.allocator.allocate(30))])
        hidden = model.run_layers(0, fast.layers, model.embed(torch.tensor(prompt)), batch)
        logits[dtype] = model.logits(hidden)
    exact, rounded = logits["float32"], logits["bfloat16"]
    noise = (exact - rounded).abs().max(-1).values
    best = exact.topk(2).values
    clear = (best[:, 0] - best[:, 1]) > 2 * noise.quantile(0.9)
    same = exact.argmax(-1) == rounded.argmax(-1)
    assert clear.sum() > 20
    assert same[clear].float().mean() >= 0.99
    assert noise.median() < 0.1 * exact.std()


def _rounded(judge: Any) -> Any:
    """A copy whose parameters are those that bfloat16 has."""
    import copy

    return copy.deepcopy(judge).to(torch.bfloat16).to(torch.float32)
