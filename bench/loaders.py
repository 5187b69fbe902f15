"""One load of a checkpoint by one loader, in a process of its own: `python -m bench.loaders SETTINGS_JSON`.

Imports, and for our own loader what a worker does before its first load (touching its reserve, where one is asked
for), come before the clock starts. A load has ended when every parameter is a tensor and each of its pages was
touched, for all loaders by the same line of code. The answer is one JSON line.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from layercast_agent.checkpoint_files import read_manifest
from layercast_agent.device import slab_bytes, slab_of
from layercast_agent.host_memory import Reserve
from layercast_agent.residency import Residency
from layercast_agent.runner import TransferOutcome, TransferRunner, UpstreamSpec
from layercast_agent.worker.loading import views

PAGE_BYTES = 4096
DEADLINE_S = 300.0
CPU = torch.device("cpu")

Tensors = Mapping[str, torch.Tensor]
Load = Callable[[], Tensors]


def touch(tensors: Iterable[torch.Tensor]) -> int:
    """Read one byte of every page; the sum keeps anybody from leaving it out."""
    return sum(int(t.reshape(-1).view(torch.uint8)[::PAGE_BYTES].sum()) for t in tensors)


def layercast(settings: Mapping[str, Any], upstream: UpstreamSpec) -> Load:
    """Our own: what a worker does on StartTransfer, into memory that it touched while it was warmed up or not."""
    manifest = read_manifest(Path(settings["packed"]))
    sizes = [segment.nbytes for segment in manifest.segments]
    reserve = Reserve(slab_bytes(sizes)) if settings["reserve"] else None
    if reserve is not None and not reserve.wait_touched(DEADLINE_S):
        raise TimeoutError("the reserve was not touched")

    def load() -> Tensors:
        memories = slab_of(sizes, CPU, host=None if reserve is None else reserve.take(slab_bytes(sizes)))
        tensors: dict[str, torch.Tensor] = {}
        over = threading.Event()
        outcomes: list[TransferOutcome] = []

        def on_end(outcome: TransferOutcome) -> None:
            outcomes.append(outcome)
            over.set()

        runner = TransferRunner(
            transfer_id="bench",
            manifest=manifest,
            memories=memories,
            residency=Residency(manifest),
            upstreams=[upstream],
            generation=1,
            segment_order=(),
            token=settings["token"].encode(),
            on_segment=lambda index: tensors.update(views(manifest.segments[index], memories[index])),
            on_end=on_end,
        )
        runner.start()
        if not over.wait(DEADLINE_S) or not outcomes[0].complete:
            raise RuntimeError(f"the load did not end well: {runner.status()}")
        return tensors

    return load


def from_disk(settings: Mapping[str, Any]) -> Load:
    """From this machine's packed files."""
    return layercast(settings, UpstreamSpec(peer_id="disk", local_folder=Path(settings["packed"])))


def from_peer(settings: Mapping[str, Any]) -> Load:
    """From a peer over loopback."""
    return layercast(settings, UpstreamSpec(**settings["upstream"]))


def safetensors(settings: Mapping[str, Any]) -> Load:
    """safetensors' load_file, which maps the file."""
    from safetensors.torch import load_file

    return lambda: load_file(settings["source"])


def fastsafetensors(settings: Mapping[str, Any]) -> Load:
    """fastsafetensors without GPUDirect Storage."""
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    def load() -> Tensors:
        loader = SafeTensorsFileLoader(SingleGroup(), CPU, nogds=True)
        loader.add_filenames({0: [settings["source"]]})
        buffer = loader.copy_files_to_device()
        return {name: buffer.get_tensor(name) for name in loader.get_keys()}

    return load


def runai(settings: Mapping[str, Any]) -> Load:
    """Run:ai Model Streamer with its defaults."""
    from runai_model_streamer import SafetensorsStreamer

    def load() -> Tensors:
        with SafetensorsStreamer() as streamer:
            streamer.stream_file(settings["source"])
            return dict(streamer.get_tensors())

    return load


LOADERS: Mapping[str, Callable[[Mapping[str, Any]], Load]] = {
    "layercast": from_disk,
    "layercast, from a peer": from_peer,
    "safetensors": safetensors,
    "fastsafetensors": fastsafetensors,
    "runai-model-streamer": runai,
}


def main() -> None:
    """Load once and tell how long it took."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    touch([torch.zeros(PAGE_BYTES)])  # the first call of any of these operations takes milliseconds
    load = LOADERS[settings["loader"]](settings)
    began, began_cpu = time.perf_counter(), time.process_time()
    tensors = load()
    touch(tensors.values())
    elapsed_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
    print(
        json.dumps({"elapsed_s": elapsed_s, "cpu_s": cpu_s, "bytes": nbytes, "tensors": len(tensors)}),
        flush=True,
    )


if __name__ == "__main__":
    main()
