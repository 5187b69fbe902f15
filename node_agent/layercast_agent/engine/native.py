"""Finds, builds and loads the C++ layer of a CPU: one source file, one shared object, a C interface.

Built where it is first needed, into a cache, in some seconds of a worker's warm-up; an image builds it once, by
`python -m layercast_agent.engine.native`. It knows nothing of torch's or Python's interfaces, so a build fits every
version of both. What a machine's processor offers decides between a few builds, best first, and a build is used only
after it has computed a small matrix right; otherwise plain torch serves, and the replica's status says which.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("layer.cpp")

FOLDER_VARIABLE = "LAYERCAST_NATIVE_DIR"
"""Where builds are kept; `off` switches the native layer off."""

BUILD_DEADLINE_S = 120.0

_FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-Wall", "-Wextra")

_X86_LEVELS = (
    ("avx512bf16", ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")),
    ("avx512", ("avx512f", "avx512bw", "avx512dq", "avx512vl")),
    ("avx2", ("avx2", "fma", "f16c", "bmi2")),
    ("sse", ("sse2",)),
)
"""Name and what /proc/cpuinfo must list for it."""

_MARCH = {
    "avx512bf16": ("-march=x86-64-v4", "-mavx512bf16"),
    "avx512": ("-march=x86-64-v4",),
    "avx2": ("-march=x86-64-v3",),
    "sse": (),
    "arm": (),
}


class NativeUnavailableError(Exception):
    """There is no compiler, or it cannot build the source, or the result does not compute right."""


class Shape(ctypes.Structure):
    """LcShape of layer.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("hidden", "heads", "kv_heads", "head_dim", "inner", "bfloat16")
        ),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


class Matrix(ctypes.Structure):
    """Matrix of layer.cpp."""

    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("rows", ctypes.c_int64))


class Layer(ctypes.Structure):
    """LcLayer of layer.cpp."""

    _fields_ = (
        ("qkv", Matrix * 3),
        ("output", Matrix),
        ("gate_up", Matrix * 2),
        ("down", Matrix),
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_norm", "query_norm", "key_norm")),
        ("window", ctypes.c_int64),
    )


class Batch(ctypes.Structure):
    """LcBatch of layer.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "requests", "pages_widest", "page_size")),
        *((name, ctypes.c_void_p) for name in ("pages", "stops", "offsets", "slots", "cos", "sin")),
    )


def supported_builds(cpu_flags: Sequence[str], machine: str) -> list[str]:
    """Builds that a processor can run, best first."""
    if machine == "aarch64":
        return ["arm"]
    if machine != "x86_64":
        return []
    present = set(cpu_flags)
    return [name for name, needed in _X86_LEVELS if present.issuperset(needed)]


def build(name: str, folder: Path) -> Path:
    """The shared object of that name in `folder`, built unless it is there. Raises NativeUnavailableError."""
    flags = (*_FLAGS, *_MARCH[name])
    key = hashlib.sha256(SOURCE.read_bytes() + repr(flags).encode()).hexdigest()[:16]
    target = folder / f"layer-{name}-{key}.so"
    if target.exists():
        return target
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NativeUnavailableError("there is no C++ compiler")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _compile(compiler, flags, Path(scratch))
            # Workers of one machine may build at once: the last one wins, with equal bytes.
            (Path(scratch) / "layer.so").replace(target)
    except OSError as error:
        raise NativeUnavailableError(f"{folder} cannot be written: {error.strerror}") from error
    return target


def _compile(compiler: str, flags: Sequence[str], scratch: Path) -> None:
    """Compiles and links in two steps: linking must not name an OpenMP runtime, torch's serves."""
    commands = (
        (compiler, *flags, "-c", str(SOURCE), "-o", str(scratch / "layer.o")),
        (compiler, "-shared", str(scratch / "layer.o"), "-o", str(scratch / "layer.so")),
    )
    for command in commands:
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_DEADLINE_S)
        except subprocess.CalledProcessError as error:
            last = (error.stderr or "").strip().splitlines()[-1:] or ["no message"]
            raise NativeUnavailableError(f"{compiler} failed: {last[0]}") from error
        except subprocess.TimeoutExpired as error:
            raise NativeUnavailableError(f"{compiler} took over {BUILD_DEADLINE_S:.0f} s") from error


class Library:
    """One loaded build."""

    def __init__(self, name: str, path: Path) -> None:
        """Raises NativeUnavailableError when it cannot be loaded or computes wrong."""
        self.name = name
        try:
            _share_openmp()
            self._calls = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeUnavailableError(f"{path.name} cannot be loaded: {error}") from error
        self._calls.lc_work.restype = ctypes.c_int64
        self.check()

    def work(self, shape: Shape, tokens: int) -> torch.Tensor:
        """Memory that a call for that many tokens needs."""
        floats = self._calls.lc_work(ctypes.byref(shape), ctypes.c_int64(tokens))
        return torch.empty(floats, dtype=torch.float32)

    def attention(
        self,
        shape: Shape,
        layer: Layer,
        batch: Batch,
        *,
        hidden: torch.Tensor,
        result: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        work: torch.Tensor,
    ) -> None:
        """lc_attention of layer.cpp."""
        self._calls.lc_attention(
            ctypes.byref(shape),
            ctypes.byref(layer),
            ctypes.byref(batch),
            pointer(hidden),
            pointer(result),
            pointer(keys),
            pointer(values),
            pointer(work),
        )

    def mlp(
        self, shape: Shape, layer: Layer, *, hidden: torch.Tensor, result: torch.Tensor, work: torch.Tensor
    ) -> None:
        """lc_mlp of layer.cpp."""
        self._calls.lc_mlp(
            ctypes.byref(shape),
            ctypes.byref(layer),
            ctypes.c_int64(len(hidden)),
            pointer(hidden),
            pointer(result),
            pointer(work),
        )

    def head(
        self, shape: Shape, *, hidden: torch.Tensor, norm: torch.Tensor, matrix: torch.Tensor
    ) -> torch.Tensor:
        """Logits [T, rows of the matrix], float32, of hidden states [T, hidden size] after a norm."""
        logits = torch.empty(len(hidden), len(matrix), dtype=torch.float32)
        work = torch.empty(2 * hidden.numel(), dtype=torch.float32)
        self._calls.lc_head(
            ctypes.byref(shape),
            ctypes.c_int64(len(hidden)),
            pointer(hidden),
            pointer(norm),
            pointer(matrix),
            ctypes.c_int64(len(matrix)),
            pointer(logits),
            pointer(work),
        )
        return logits

    def check(self) -> None:
        """Compares small products with torch's. Raises NativeUnavailableError."""
        generator = torch.Generator().manual_seed(0)
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in (1, 5, 50):
                hidden = torch.randn((tokens, 70), generator=generator).to(dtype)
                matrix, norm = (
                    torch.randn((99, 70), generator=generator).to(dtype),
                    torch.ones(70, dtype=dtype),
                )
                shape = Shape(hidden=70, bfloat16=dtype is torch.bfloat16, eps=1e-6)
                found = self.head(shape, hidden=hidden, norm=norm, matrix=matrix)
                normed = torch.nn.functional.rms_norm(hidden.float(), (70,), norm.float(), 1e-6)
                if not torch.allclose(
                    found, normed @ matrix.float().T, atol=0.2 if dtype.itemsize == 2 else 1e-3
                ):
                    raise NativeUnavailableError(f"the {self.name} build computes wrong on this processor")


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    """Where a tensor's numbers are."""
    return ctypes.c_void_p(tensor.data_ptr())


@functools.cache
def library() -> Library | str:
    """The best build that works here, or why there is none. Builds it when needed: seconds, once a machine."""
    setting = os.environ.get(FOLDER_VARIABLE, "")
    if setting == "off":
        return f"{FOLDER_VARIABLE} is off"
    reason = f"no build for {platform.machine()} processors"
    for name in supported_builds(_cpu_flags(), platform.machine()):
        try:
            return Library(name, build(name, folder()))
        except NativeUnavailableError as error:
            reason = str(error)
            log.warning("a native layer cannot be used", extra={"build": name, "reason": reason})
    return reason


def folder() -> Path:
    """Where builds are kept."""
    setting = os.environ.get(FOLDER_VARIABLE, "")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(setting).expanduser() if setting else Path(cache).expanduser() / "layercast" / "native"


def _cpu_flags() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])


def _share_openmp() -> None:
    """Makes the OpenMP runtime that torch has loaded visible to what is loaded next: one pool of threads."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {
        line.split()[-1]
        for line in maps
        if Path(line.split()[-1]).name.startswith(("libgomp", "libiomp", "libomp"))
    }
    if not runtimes:
        raise OSError("torch has no OpenMP runtime loaded")
    # The one beside torch, where something else has brought another.
    best = max(runtimes, key=lambda path: ("torch" in path, path))
    ctypes.CDLL(best, mode=ctypes.RTLD_GLOBAL)


def main() -> None:
    """Builds everything that this machine's kind of processor may run, for an image."""
    machine = platform.machine()
    names = ["arm"] if machine == "aarch64" else [name for name, _ in _X86_LEVELS]
    for name in names:
        build(name, folder())


if __name__ == "__main__":
    main()
