"""`python -m bench.load`: how close a load comes to the disk, and how it compares with other loaders.

A random Llama of at least 2 GiB is written, packed, and loaded to host memory again and again: cold (the files are
evicted from the page cache before each load), warm (in the page cache since they were written, as after a download
and packing) and read back (evicted, then read with plain reads), each load in a process of its own, all loaders in
turns so that a busy machine hurts all of them. Warm loads take tens of milliseconds, and the processor's caches
decide over half of that, so both loaders that only map files find the same: each of their loads, several a round,
follows one of the other, and no process touches gigabytes just before its clock starts (our memory reserve is left
out: mapped files need none). `fio` reads our packed files with O_DIRECT in the same turns. All ratios are of medians
of one run. The other loaders are installed beside, on demand, from the package registry; fio is needed (Debian: `apt
install fio`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import report
from layercast_agent.page_cache import cached_share
from layercast_agent.store import Store

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ROOT / "out" / "bench-loaders"
OTHERS = ("fastsafetensors==0.5.0", "runai-model-streamer==0.17.0", "humanize==4.17.0")
ITEM_BYTES = 2
HIDDEN, INNER, VOCAB, HEADS, KV_HEADS = 2048, 8192, 32_000, 32, 8
LOAD_DEADLINE_S = 300
TOKEN = "a token of this benchmark"
PEER = "layercast, from a peer"
CACHED_SHARE_MAX = 0.01
FIO_HUGE_PAGES = 32
"""Of 2 MiB: eight buffers of 4 MiB and fio's own."""
COLD = (
    "layercast",
    "layercast, fresh memory",
    "safetensors",
    "fastsafetensors",
    "runai-model-streamer",
    PEER,
)
MAPPING = ("layercast", "safetensors")
COPYING = ("fastsafetensors", "runai-model-streamer")
MAPPING_TURNS = 4  # a round


class BenchError(Exception):
    """A measurement that is none."""


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model."""
    keys = HIDDEN // HEADS * KV_HEADS
    layer = {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (keys, HIDDEN),
        "self_attn.v_proj.weight": (keys, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (INNER, HIDDEN),
        "mlp.up_proj.weight": (INNER, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INNER),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for index in range(layers):
        found |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def size_of(shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    total = ITEM_BYTES
    for length in shape:
        total *= length
    return total


def write_source(folder: Path, nbytes: int) -> Path:
    """A Hugging Face folder of one file of at least `nbytes` random bytes."""
    layers = next(n for n in range(1, 10_000) if sum(map(size_of, shapes(n).values())) >= nbytes)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes(layers).items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size_of(shape)]}
        end += size_of(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = folder / "model.safetensors"
    block = secrets.token_bytes(1 << 22)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(block)):
            file.write(memoryview(block)[: min(len(block), end - start)])
        os.fsync(file.fileno())
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return path


def pack(source: Path, store: Path) -> Path:
    """The folder of its packed form, made by the product's own store."""
    opened = Store(store)
    manifest = opened.prepare(
        key="bench", source=f"file://{source}", revision="", dtype="", progress=lambda progress: None
    )
    return opened.folder(manifest.digest)


def evict(files: Sequence[Path]) -> None:
    """Let the kernel forget them. BenchError when it does not: it keeps what somebody has mapped."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
            share = cached_share(descriptor, 0, view)
        os.close(descriptor)
        if share > CACHED_SHARE_MAX:
            raise BenchError(f"{share:.0%} of {file} stay in memory: a load of it would not be cold")


def read_all(files: Sequence[Path]) -> None:
    """Bring them into the page cache."""
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 22):
                pass


def install_others() -> Path | None:
    """The folder with the other loaders; None where no registry answers."""
    if not (LIBRARIES / "fastsafetensors").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(LIBRARIES)]
        done = subprocess.run(
            [*command, "-c", "constraints.txt", *OTHERS],
            check=False,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            print(f"other loaders cannot be installed, left out:\n{done.stderr}", file=sys.stderr)
            return None
    return LIBRARIES


def load_from_peer(settings: Mapping[str, Any], files: Sequence[Path], libraries: Path | None) -> float:
    """GB/s of a load from a peer that has everything in memory; the peer is gone afterwards, and its mappings."""
    read_all(files)
    with holder(Path(settings["packed"])) as upstream:
        return load_once(PEER, {**settings, "upstream": upstream}, libraries)


def load_once(loader: str, settings: Mapping[str, Any], libraries: Path | None) -> float:
    """GB/s of one load in its own process."""
    name = loader.removesuffix(", fresh memory")
    asked = {"reserve": name == loader, **settings, "loader": name}
    environment = dict(os.environ) | {"RUNAI_STREAMER_LOG_LEVEL": "ERROR"}
    if libraries is not None:
        environment["PYTHONPATH"] = str(libraries)
    done = subprocess.run(
        [sys.executable, "-m", "bench.loaders", json.dumps(asked)],
        cwd=ROOT,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=LOAD_DEADLINE_S,
    )
    if done.returncode:
        raise BenchError(f"{loader} failed: {done.stderr[-2000:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    if told["bytes"] != settings["nbytes"]:
        raise BenchError(f"{loader} loaded {told['bytes']} of {settings['nbytes']} bytes")
    return float(told["bytes"] / 1e9 / told["elapsed_s"])


def fio(files: Sequence[Path]) -> float:
    """GB/s of one sequential O_DIRECT read of files, as deep as any loader's, into huge pages where there are any.

    Into small pages a request to the disk has a segment for each 4 KiB, of which virtual disks take few: 0.8 GB/s of a
    disk that gives 3.2 were seen.
    """
    named = ":".join(str(file) for file in files)
    command = ["fio", "--name=read", f"--filename={named}", "--file_service_type=sequential", "--rw=read"]
    with huge_pages(FIO_HUGE_PAGES) as found:
        done = subprocess.run(
            [
                *command,
                "--readonly",
                "--bs=4M",
                "--direct=1",
                "--ioengine=libaio",
                "--iodepth=8",
                "--output-format=json",
                *(["--mem=shmhuge"] if found else []),
            ],
            stdout=subprocess.PIPE,
            check=True,
            timeout=LOAD_DEADLINE_S,
        )
    return float(json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"]) / 1e9


@contextlib.contextmanager
def huge_pages(count: int) -> Iterator[bool]:
    """Whether there are so many reserved huge pages for now; who is not root gets none."""
    reserved = Path("/proc/sys/vm/nr_hugepages")
    try:
        before = int(reserved.read_text())
        reserved.write_text(f"{before + count}")
    except OSError:
        yield False
        return
    try:
        yield int(reserved.read_text()) >= before + count
    finally:
        reserved.write_text(f"{before}")


@contextlib.contextmanager
def holder(packed: Path) -> Iterator[dict[str, str]]:
    """A peer that serves the packed files as an agent does; yields how to reach it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.holder", str(packed), TOKEN],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait(30)


Samples = dict[str, list[float]]


def measure(settings: Mapping[str, Any], *, rounds: int, libraries: Path | None) -> dict[str, Samples]:
    """GB/s by loader: warm, cold, and read back."""
    source = Path(settings["source"])
    files = [source, *sorted(Path(settings["packed"]).iterdir())]
    files = [file for file in files if file.is_file()]
    known = [name for name in COLD if libraries is not None or name.startswith(("layercast", "safetensors"))]
    cold: Samples = {"fio O_DIRECT": [], **{name: [] for name in known}}
    read_back: Samples = {name: [] for name in (*MAPPING, *COPYING) if name in known}
    warm = measure_warm(settings, rounds=rounds, libraries=libraries)  # first of all: nothing was evicted yet
    for turn in range(rounds):
        for name, taken in cold.items():
            evict(files)
            if name.startswith("fio"):
                # What we load: files that lie elsewhere on a virtual disk may be much slower or faster.
                taken.append(fio(sorted(Path(settings["packed"]).glob("segment-*"))))
            elif name == PEER:
                taken.append(load_from_peer(settings, files, libraries))
            else:
                taken.append(load_once(name, settings, libraries))
            print(f"  {turn + 1}/{rounds} cold {name}: {taken[-1]:.2f} GB/s", file=sys.stderr)
    for turn in range(rounds):
        evict(files)  # however the last loads left them: big and small pages are mapped at different costs
        for name, taken in read_back.items():
            read_all(files)
            taken.append(load_once(name, {**settings, "reserve": False}, libraries))
            print(f"  {turn + 1}/{rounds} read back {name}: {taken[-1]:.2f} GB/s", file=sys.stderr)
    return {"warm": warm, "cold": cold, "read back": read_back}


def measure_warm(settings: Mapping[str, Any], *, rounds: int, libraries: Path | None) -> Samples:
    """GB/s by loader, of files in the page cache."""
    turns = [MAPPING] * MAPPING_TURNS * rounds
    if libraries is not None:
        turns += [COPYING] * rounds
    warm: Samples = {}
    for turn, names in enumerate(turns):
        for name in names:
            rate = load_once(name, {**settings, "reserve": False}, libraries)
            warm.setdefault(name, []).append(rate)
            print(f"  {turn + 1}/{len(turns)} warm {name}: {rate:.2f} GB/s", file=sys.stderr)
    return warm


def figures(taken: Mapping[str, Samples]) -> dict[str, object]:
    """The ratios that are promised."""
    warm, middle, read_back = (
        {name: statistics.median(values) for name, values in taken[kind].items()}
        for kind in ("warm", "cold", "read back")
    )
    others = [value for name, value in middle.items() if not name.startswith(("fio", "layercast"))]
    return {
        "disk_ratio": middle["layercast"] / middle["fio O_DIRECT"],
        "best_other_ratio": middle["layercast"] / max(others),
        "warm_ratio": warm["layercast"] / warm["safetensors"],
        "read_back_ratio": read_back["layercast"] / read_back["safetensors"],
        "peer_ratio": middle["layercast, from a peer"] / middle["layercast"],
        "cold_gb_per_s": middle["layercast"],
        "warm_gb_per_s": warm["layercast"],
        "fio_gb_per_s": middle["fio O_DIRECT"],
    }


def run(*, nbytes: int, rounds: int, folder: Path) -> dict[str, object]:
    """Measure everything, print the table, return the figures."""
    print(report.hardware())
    libraries = install_others()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        origin = Path(place) / "source"
        origin.mkdir()
        source = write_source(origin, nbytes)
        packed = pack(origin, Path(place) / "store")
        manifest = json.loads((packed / "manifest.json").read_bytes())
        loaded_bytes = sum(t["nbytes"] for segment in manifest["segments"] for t in segment["tensors"])
        settings = {"source": str(source), "packed": str(packed), "nbytes": loaded_bytes, "token": TOKEN}
        taken = measure(settings, rounds=rounds, libraries=libraries)
    rows = [
        [f"{kind} {name}", f"{statistics.median(values):.2f}", f"{max(values):.2f}", f"{min(values):.2f}"]
        for kind, samples in taken.items()
        for name, values in samples.items()
    ]
    print(report.table(["", "median GB/s", "best", "worst"], rows))
    return {"bench": "load", "bytes": loaded_bytes, "rounds": rounds, **figures(taken)}


def main() -> int:
    """0 when everything was measured, 2 when this machine cannot."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gib", type=float, default=2.0, help="at least so much is loaded")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on the disk to be measured")
    arguments = parser.parse_args()
    if shutil.which("fio") is None:
        print("bench.load: fio is missing (Debian: apt install fio)", file=sys.stderr)
        return 2
    try:
        told = run(nbytes=int(arguments.gib * 2**30), rounds=arguments.rounds, folder=arguments.folder)
    except (BenchError, OSError, subprocess.SubprocessError) as error:
        print(f"bench.load: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(report.last_line(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
