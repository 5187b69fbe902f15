"""Who may read which memory: regions, each fenced by an epoch.

Peers read memory of this process (parameters, and the state of requests that move) through the transport.
A region names such memory by (id, epoch). Two things must never happen: that a peer reads memory which has
been freed and means something else by now, and that memory is freed while a peer still reads it. So every
read goes through `RegionTable.reading`, which checks the name and the range and counts the reader, and
`remove` first fences the region, then waits for its readers, and for bytes that were sent by reference to have left.

Ids are never used twice in a process, and the epoch differs between two starts of a process, so a name that
was learnt from a dead process is refused by its successor on the same port.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from layercast_agent.errors import NoCapacityError, RegionFencedError
from layercast_agent.host_memory import allocate

LENT_POLL_S = 0.005


class ReadableMemory(Protocol):
    """Memory that peers may read."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Host-readable bytes [offset, offset + nbytes), format `B`."""


class WritableMemory(ReadableMemory, Protocol):
    """Memory that a transfer fills."""

    @property
    def in_place(self) -> bool:
        """Whether `staging` is the memory itself. Otherwise `commit` takes any host bytes, pinned ones fastest."""

    def staging(self, offset: int, nbytes: int) -> memoryview:
        """Writable host memory for incoming bytes of that range, format `B`."""

    def commit(self, offset: int, nbytes: int, staged: memoryview) -> None:
        """Make the staged bytes visible in the memory itself."""


class LastingMemory(ReadableMemory, Protocol):
    """Memory whose bytes may be sent by reference, that is, read by the kernel some time after a read has ended."""

    def lasts(self, offset: int, nbytes: int) -> bool:
        """Whether `view` of that range is the memory itself, and nobody writes there while a region names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where memory lies that a network card may read or write by itself."""

    address: int
    nbytes: int
    kind: str = "DRAM"
    device: int = 0


class AdoptingMemory(WritableMemory, Protocol):
    """Memory that can also be exchanged for bytes that lie ready elsewhere."""

    @property
    def adopts(self) -> bool:
        """Whether it is such memory: a device of its own cannot."""

    def adopt(self, source: memoryview) -> None:
        """Be `source`, of the same size, from now on, without a copy; it is not written to."""


class HostMemory:
    """Host memory as a worker's on a CPU, zeroed, or the given bytes without a copy: for benchmarks and tests."""

    in_place = True

    def __init__(self, source: int | bytearray) -> None:
        self._bytes = allocate(source) if isinstance(source, int) else memoryview(source)
        self.nbytes = len(self._bytes)

    def location(self) -> Location:
        """For one-sided reads and writes."""
        return location_of(self.view(0, self.nbytes))

    def view(self, offset: int, nbytes: int) -> memoryview:
        """The bytes themselves."""
        return self._bytes[offset : offset + nbytes]

    def lasts(self, offset: int, nbytes: int) -> bool:
        """As parameters do."""
        return True

    def staging(self, offset: int, nbytes: int) -> memoryview:
        """The bytes themselves: what is received is already in place."""
        return self.view(offset, nbytes)

    def commit(self, offset: int, nbytes: int, staged: memoryview) -> None:
        """Nothing is left to do; the staging is the memory."""


def location_of(view: memoryview) -> Location:
    """Where host bytes lie; whoever uses it keeps the view alive."""
    return Location(address=np.frombuffer(view, np.uint8).__array_interface__["data"][0], nbytes=len(view))


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionRef:
    """Name of a region, as peers say it."""

    region_id: int
    epoch: int
    nbytes: int


@dataclass(slots=True)
class _Entry:
    memory: ReadableMemory
    readers: int = 0
    fenced: bool = False


class RegionTable:
    """The regions of this process. Thread-safe."""

    def __init__(self, *, epoch: int | None = None) -> None:
        """`epoch` names this start of the process; random unless a test gives it."""
        self._epoch = secrets.randbits(62) + 1 if epoch is None else epoch
        self._entries: dict[int, _Entry] = {}
        self._next_id = 1
        self._changed = threading.Condition()
        self.on_remove: Callable[[int], None] = lambda region_id: None
        """Called by `remove` when a region has no readers any more, before its memory may be reused."""

        self.lent: Callable[[int], bool] = lambda region_id: False
        """Whether bytes of a region without readers are still on their way out of its memory itself."""

    def memory(self, region_id: int) -> ReadableMemory:
        """The memory of a region. RegionFencedError when it is not readable any more."""
        with self._changed:
            entry = self._entries.get(region_id)
            if entry is None or entry.fenced:
                raise RegionFencedError(f"region {region_id} is not readable here")
            return entry.memory

    def add(self, memory: ReadableMemory) -> RegionRef:
        """Let peers read `memory` until `remove`; the table keeps it alive."""
        with self._changed:
            region_id = self._next_id
            self._next_id += 1
            self._entries[region_id] = _Entry(memory)
        return RegionRef(region_id=region_id, epoch=self._epoch, nbytes=memory.nbytes)

    @contextmanager
    def reading(self, region_id: int, epoch: int, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Hold bytes [offset, offset + nbytes) of a region for the length of the block.

        Raises:
            RegionFencedError: unknown id, another epoch, being removed, or a range outside the region.
        """
        memory = self.enter(region_id, epoch, offset, nbytes)
        try:
            with memory.view(offset, nbytes) as view:
                yield view
        finally:
            self.leave(region_id)

    def enter(self, region_id: int, epoch: int, offset: int, nbytes: int) -> ReadableMemory:
        """Count a reader of that range and return the memory, which stays until the reader's `leave`.

        RegionFencedError as `reading`.
        """
        with self._changed:
            entry = self._entries.get(region_id)
            if entry is None or entry.fenced or epoch != self._epoch:
                raise RegionFencedError(f"region {region_id} of epoch {epoch} is not readable here")
            size = entry.memory.nbytes
            if offset < 0 or nbytes < 0 or offset + nbytes > size:
                raise RegionFencedError(
                    f"bytes [{offset}, {offset + nbytes}) are outside region {region_id} of {size} bytes"
                )
            entry.readers += 1
            return entry.memory

    def leave(self, region_id: int) -> None:
        """Undo one `enter`."""
        with self._changed:
            self._entries[region_id].readers -= 1
            self._changed.notify_all()

    def readers(self, region_id: int) -> int:
        """How many read that region at the moment."""
        with self._changed:
            entry = self._entries.get(region_id)
            return entry.readers if entry is not None else 0

    def remove(self, region_id: int, *, deadline_s: float) -> None:
        """Refuse new reads at once, then wait for the current ones. Unknown ids succeed.

        Raises:
            NoCapacityError: somebody still reads, or bytes are still on their way, after `deadline_s`; the region
                stays fenced, the memory must not be reused yet, and the call may be repeated.
        """
        end = time.monotonic() + deadline_s
        with self._changed:
            entry = self._entries.get(region_id)
            if entry is None:
                return
            entry.fenced = True
            if not self._changed.wait_for(lambda: entry.readers == 0, timeout=deadline_s):
                raise NoCapacityError(
                    f"region {region_id} is still being read by {entry.readers} after {deadline_s} s"
                )
        while self.lent(region_id):
            if time.monotonic() >= end:
                raise NoCapacityError(
                    f"bytes of region {region_id} are still being sent after {deadline_s} s"
                )
            time.sleep(LENT_POLL_S)
        self.on_remove(region_id)
        with self._changed:
            self._entries.pop(region_id, None)
