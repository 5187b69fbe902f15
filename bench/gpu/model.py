"""Prefill and decode of an 8 B-shaped model against the ceilings of the same run."""

from __future__ import annotations

import contextlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from bench.gpu.part import Figures, Setting, engine_of, main, random_model, request, seconds, synchronize

from layercast_agent.engine.attention import BatchPlan, Span
from layercast_agent.engine.engine import Engine
from layercast_agent.engine.model import LayeredModel

CAPTURE_DEADLINE_S = 60.0


def measure(setting: Setting) -> Figures:
    """All figures of the model; a measurement that fails leaves its traceback and no figure."""
    started = time.perf_counter()
    model = random_model(setting.config(), setting.device)
    synchronize(setting.device)
    figures: Figures = {"build_s": time.perf_counter() - started}
    sizes = (1, 4) if setting.small else (1, 32)
    parts: list[Callable[[], Figures]] = [partial(_prefill, setting, model)]
    parts += [partial(_decode, setting, model, size) for size in sizes]
    parts += [partial(_layerwise, setting, model)]
    for part in parts:
        try:
            figures |= part()
        except torch.OutOfMemoryError:
            raise
        except Exception:
            traceback.print_exc()
    figures["block"] = model.block
    return figures


def _matrix_parameters(model: LayeredModel) -> int:
    """Parameters of the layers' matrices, each of which costs a token two operations."""
    return sum(p.numel() for name, p in model.named_tensors() if ".layers." in name and p.dim() == 2)


def _prefill(setting: Setting, model: LayeredModel) -> Figures:
    """One prompt in one step, from the request to its first token."""
    length = 2048 if not setting.small else 128
    engine = engine_of(model, positions=4 * length, batch_size=4, step_tokens=length)
    times = []
    for turn in range(setting.choose(full=10, shake=5, small=3)):
        engine.add(request(f"p{turn}", length, 1, vocabulary=model.shape.vocab_size, seed=turn))
        synchronize(setting.device)
        started = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - started)
    took = statistics.median(times[1:])
    config = setting.config()
    attention = 2 * length**2 * config["num_attention_heads"] * model.shape.head_dim * model.shape.layers
    head = 2 * model.shape.vocab_size * model.shape.hidden_size
    operations = 2 * _matrix_parameters(model) * length + attention + head
    figures: Figures = {
        "prefill_first_s": times[0],
        "prefill_ms": took * 1e3,
        "prefill_tokens_per_s": length / took,
        "prefill_tflop_per_s": operations / took / 1e12,
    }
    if known := setting.known.get("matmul_tflop_per_s"):
        figures["prefill_of_matmul"] = operations / took / 1e12 / float(known)
    return figures


def _decode(setting: Setting, model: LayeredModel, size: int) -> Figures:
    """Steps of a full batch, host time included, eager and as graphs."""
    length, steps = (512, setting.choose(full=100, shake=40, small=4)) if not setting.small else (32, 4)
    tokens = 3 * steps + 20
    engine = engine_of(model, positions=size * (length + tokens + 16), batch_size=size, step_tokens=2048)
    for index in range(size):
        engine.add(request(f"d{index}", length, tokens, vocabulary=model.shape.vocab_size, seed=index))
    while engine.waiting or engine.prefilling:
        engine.step()
    graphs = getattr(model, "_graphs", None)
    with _without_graphs(model):
        eager = _steps(engine, min(steps, 10), setting.device)
    if graphs is not None:
        engine.step()  # asks for the graph
        graphs.wait(CAPTURE_DEADLINE_S)
    took = _steps(engine, steps, setting.device)
    _profile(engine, setting, size)
    # What a step must read: all parameters but the embeddings, and the KV of every position so far.
    parameters = sum(p.numel() for name, p in model.named_tensors() if "embed_tokens" not in name)
    position = 2 * model.shape.kv_heads * model.shape.head_dim * model.shape.layers
    seen = length + min(steps, 10) + steps // 2
    nbytes = (parameters + size * seen * position) * model.shape.dtype.itemsize
    figures: Figures = {
        f"decode_b{size}_eager_ms": eager * 1e3,
        f"decode_b{size}_ms": took * 1e3,
        f"decode_b{size}_tokens_per_s": size / took,
        f"decode_b{size}_gb_per_s": nbytes / took / 1e9,
    }
    if known := setting.known.get("copy_gb_per_s"):
        figures[f"decode_b{size}_of_copy"] = nbytes / took / 1e9 / float(known)
    return figures


@contextlib.contextmanager
def _without_graphs(model: Any) -> Iterator[None]:
    """Steps inside run as they do before anything is captured."""
    graphs = getattr(model, "_graphs", None)
    if graphs is None:
        yield
        return
    model._graphs = None
    try:
        yield
    finally:
        model._graphs = graphs


def _steps(engine: Engine, steps: int, device: torch.device) -> float:
    times = []
    for _ in range(steps):
        synchronize(device)
        started = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _profile(engine: Engine, setting: Setting, size: int) -> None:
    """Where a step's time goes, for people."""
    if setting.device.type != "cuda":
        return
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(3):
                engine.step()
        table = found.key_averages().table(
            sort_by="self_device_time_total", row_limit=14, max_name_column_width=60
        )
        print(f"decode of {size}, three steps:\n{table}")
    except Exception:
        traceback.print_exc()  # the figures do not need it


def _layerwise(setting: Setting, model: LayeredModel) -> Figures:
    """All layers one by one against all in one call, for a prompt."""
    length = 2048 if not setting.small else 64
    engine = engine_of(model, positions=length, batch_size=1, step_tokens=length)
    kv = engine._kv
    spans = [Span(start=0, count=length, pages=kv.allocator.allocate(-(-length // 16)))]
    hidden = torch.randn(length, model.shape.hidden_size, device=setting.device).to(model.shape.dtype)
    batch = BatchPlan.of(kv, spans)

    def one_by_one() -> None:
        states = hidden
        for layer in range(model.shape.layers):
            states = model.run_layers(layer, layer + 1, states, batch)

    def at_once() -> None:
        model.run_layers(0, model.shape.layers, hidden, batch)

    def both() -> tuple[float, ...]:
        return tuple(seconds(run, setting.device, repeat=3, warm=1) for run in (at_once, one_by_one))

    rounds = [both() for _ in range(3)]
    whole, single = (min(times) for times in zip(*rounds, strict=True))
    return {"layerwise_cost": single / whole - 1}


if __name__ == "__main__":
    main(measure)
