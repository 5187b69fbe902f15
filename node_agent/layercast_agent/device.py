"""Memory of a device that parameters land in: the one place, beside the engine, that knows torch.

A transfer writes host bytes and a peer reads host bytes, whatever the device. On a CPU both touch the memory itself.
On CUDA incoming bytes pass through pinned memory, from which the copy engine takes them, and outgoing ones through
pinned memory as well; torch's caching host allocator keeps that memory from one chunk to the next. Every method may
be called from any thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from layercast_agent.host_memory import allocate
from layercast_agent.regions import Location

_BLOCK_WORDS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Words that are widened to 64 bits at once: what fits the cache, and what fills a GPU."""


SLAB_ALIGNMENT = 4096
"""Where a part of a slab may begin: a page of memory."""


class DeviceMemory:
    """`nbytes` bytes on a device, as `tensor`, uint8 [nbytes]; their first content is undefined.

    `slab_of` makes several in one allocation.
    """

    def __init__(self, nbytes: int, device: torch.device, *, part: torch.Tensor | None = None) -> None:
        """`part` uint8 [nbytes] is memory that is there already."""
        self.nbytes = nbytes
        self.in_place = device.type == "cpu"
        self.adopts = device.type == "cpu"
        self._adopted = False
        # Views of it become parameters, which must be usable inside and outside inference mode.
        with torch.inference_mode(mode=False):
            if part is None and device.type == "cpu":
                part = torch.frombuffer(allocate(nbytes), dtype=torch.uint8)
            self.tensor = torch.empty(nbytes, dtype=torch.uint8, device=device) if part is None else part
        self._host: memoryview | None = self.tensor.numpy().data if device.type == "cpu" else None
        # Own streams: neither the engine's kernels nor the other direction are waited for.
        self._streams = [] if device.type == "cpu" else [_stream(device), _stream(device)]

    def location(self) -> Location:
        """For one-sided reads: the device's memory itself, on CUDA too (GPUDirect)."""
        kind, device = ("DRAM", 0) if self._host is not None else ("VRAM", self.tensor.device.index or 0)
        return Location(address=self.tensor.data_ptr(), nbytes=self.nbytes, kind=kind, device=device)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Host-readable bytes [offset, offset + nbytes): the memory itself on a CPU, a copy on CUDA."""
        self._check(offset, nbytes)
        if self._host is not None:
            return self._host[offset : offset + nbytes]
        host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self._copy(host, self.tensor[offset : offset + nbytes], self._streams[0])
        return host.numpy().data

    def lasts(self, offset: int, nbytes: int) -> bool:
        """On a CPU. A copy's pinned memory is another chunk's as soon as it is not looked at any more."""
        return self._host is not None

    def staging(self, offset: int, nbytes: int) -> memoryview:
        """Writable host memory for the incoming bytes of that range; `commit` puts them there."""
        self._check(offset, nbytes)
        if self._adopted:  # the bytes are here; what comes from elsewhere meanwhile is looked at and dropped
            return memoryview(bytearray(nbytes))
        if self._host is not None:
            return self._host[offset : offset + nbytes]
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy().data

    def commit(self, offset: int, nbytes: int, staged: memoryview) -> None:
        """Makes staged bytes visible on the device to everybody; returns when they are."""
        self._check(offset, nbytes)
        if self._host is None:
            host = torch.frombuffer(staged, dtype=torch.uint8)
            self._copy(self.tensor[offset : offset + nbytes], host, self._streams[1])

    def adopt(self, source: memoryview) -> None:
        """Be `source`, bytes of host memory that are only read, from now on; only where `adopts`.

        `tensor` is another one afterwards; whoever took views of the old one keeps the old memory.
        """
        assert self.adopts
        if len(source) != self.nbytes:
            raise ValueError(f"{len(source)} bytes for a memory of {self.nbytes}")
        # torch warns of read-only memory, process-wide and once; parameters are never written to.
        writable = (ctypes.c_uint8 * self.nbytes).from_address(np.frombuffer(source, np.uint8).ctypes.data)
        writable.source = source  # type: ignore[attr-defined]  # lives as long as any view of the tensor
        with torch.inference_mode(mode=False):
            self.tensor = torch.frombuffer(writable, dtype=torch.uint8)
        self._adopted = True
        self._host = source

    def _check(self, offset: int, nbytes: int) -> None:
        if not 0 <= offset <= offset + nbytes <= self.nbytes:
            raise ValueError(f"bytes [{offset}, {offset + nbytes}) of {self.nbytes}")

    def _copy(self, to: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)
            done = stream.record_event()
        done.synchronize()


def slab_of(
    sizes: Sequence[int], device: torch.device, *, host: memoryview | None = None
) -> list[DeviceMemory]:
    """Memory of these sizes in one allocation, one behind the other, each at a multiple of SLAB_ALIGNMENT.

    On a CPU it is `host`, of at least `slab_bytes`, where the caller has some, e.g. with pages touched before.
    """
    starts = [0]
    for nbytes in sizes:
        starts.append(starts[-1] + -(-nbytes // SLAB_ALIGNMENT) * SLAB_ALIGNMENT)
    with torch.inference_mode(mode=False):
        if device.type == "cpu":
            slab = torch.frombuffer(allocate(starts[-1]) if host is None else host, dtype=torch.uint8)
        else:
            slab = torch.empty(starts[-1], dtype=torch.uint8, device=device)
        parts = [slab[start : start + nbytes] for start, nbytes in zip(starts, sizes, strict=False)]
    return [DeviceMemory(nbytes, device, part=part) for nbytes, part in zip(sizes, parts, strict=True)]


def slab_bytes(sizes: Sequence[int]) -> int:
    """What `slab_of` allocates."""
    return sum(-(-nbytes // SLAB_ALIGNMENT) * SLAB_ALIGNMENT for nbytes in sizes)


def free_bytes(device: torch.device) -> int | None:
    """What a GPU has left, whoever took the rest; None for a CPU, whose share was fixed at start."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def to_host(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The bytes of tensors of one device, one after another: uint8 [n] on the host, and nobody else's."""
    flat = [part.flatten().view(torch.uint8) for part in parts]
    if flat[0].device.type == "cpu":
        return torch.cat(flat)
    # Pinned: a request's state can be hundreds of megabytes, and ordinary memory takes a tenth of the bus.
    host = torch.empty(sum(part.numel() for part in flat), dtype=torch.uint8, pin_memory=True)
    for place, part in zip(host.split([part.numel() for part in flat]), flat, strict=True):  # type: ignore[no-untyped-call]
        place.copy_(part, non_blocking=True)
    torch.cuda.current_stream(flat[0].device).synchronize()
    return host


def from_host(data: bytes | bytearray | memoryview, device: torch.device) -> torch.Tensor:
    """A copy of host bytes on the device: uint8 [n]. The host's may be freed when this returns."""
    if device.type == "cpu" or memoryview(data).readonly:
        data = bytearray(data)
    return torch.frombuffer(data, dtype=torch.uint8).to(device)


CUDA_HOST_REGISTER_PORTABLE = 1
CUDA_HOST_REGISTER_READ_ONLY = 8


def register_host_memory(address: int, nbytes: int, device: torch.device) -> str:
    """Let the device's copy engine read host memory that is mapped read-only; once, at start: pinning takes a while.

    Returns why it could not be done, in words; then copies from it take a detour and are right all the same. Nothing
    is to be done for a CPU.
    """
    if device.type == "cpu" or not nbytes:
        return ""
    with torch.cuda.device(device):
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        flags = CUDA_HOST_REGISTER_PORTABLE | CUDA_HOST_REGISTER_READ_ONLY
        result = runtime.cudaHostRegister(address, nbytes, flags)
    if int(result) == 0:
        return ""
    return f"cudaHostRegister of {nbytes} bytes ended with error {int(result)}"


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it unannotated


def segment_checksum(data: torch.Tensor) -> int:
    """The checksum of `layercast_agent.checksum` over a tensor uint8 [n], computed on the device that holds it."""
    whole = data.numel() // 4 * 4
    words = data[:whole].view(torch.int32)
    if whole < data.numel():
        tail = torch.zeros(4, dtype=torch.uint8, device=data.device)
        tail[: data.numel() - whole] = data[whole:]
        words = torch.cat([words, tail.view(torch.int32)])
    block = _BLOCK_WORDS.get(data.device.type, 1 << 18)
    positions = torch.arange(1, block + 1, dtype=torch.int64, device=data.device)
    s1 = torch.zeros((), dtype=torch.int64, device=data.device)
    s2 = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, words.numel(), block):
        # Signed or not is the same modulo 2^32, and sums that wrap modulo 2^64 stay right modulo 2^32.
        wide = words[start : start + block].to(torch.int64)
        part = wide.sum()
        s1 += part
        s2 += (wide * positions[: wide.numel()]).sum() + start * part
    mask = 0xFFFF_FFFF
    return (int(s2) & mask) << 32 | (int(s1) & mask)
