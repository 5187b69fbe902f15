"""A link to the agent of this node: residency by gRPC, chunks by copying them out of its mapped host memory.

One rule: a chunk is copied under a lease, never used in place. A replica that computed in the agent's memory would
keep the host copy from being dropped for as long as it serves, and the last gigabyte per second is not what a load
waits for (docs/adr/0011-shared-memory-by-lease.md has the numbers).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from layercast_agent import transfer_events as ev
from layercast_agent.errors import PeerError, PeerLostError, PeerRefusedError
from layercast_agent.layout import Manifest
from layercast_agent.regions import RegionRef
from layercast_agent.tls import Tls
from layercast_agent.transfer_events import Chunk
from layercast_agent.transport import LinkRequest, shm, wire
from layercast_agent.transport.landing import Landing
from layercast_agent.transport.shm import Kind, LeaseAnswer, LeaseRequest
from layercast_agent.transport.watch import HeldSegment, ResidencyWatch
from layercast_agent.transport.wire import Deadline, Status

PROT_READ = 1
MAP_SHARED = 1
COPIERS = 4  # one sums 8 to 11 GB/s, less than a device takes
MAP_FAILED = ctypes.c_void_p(-1).value

Register = Callable[[int, int], str]
"""(address, bytes) of a new mapping to why a device cannot read it directly; empty when it can."""


class ArenaMap:
    """Another process's arena, mapped read-only here for good: a copy engine may know its address."""

    def __init__(self, descriptor: int, nbytes: int, register: Register | None) -> None:
        """Maps and registers. OSError when the kernel refuses."""
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = (
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_long,
        )
        # By hand: Python's own mmap hides the address of a mapping that is read-only.
        address = libc.mmap(None, nbytes, PROT_READ, MAP_SHARED, descriptor, 0)
        if address == MAP_FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self.data = memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")
        self.problem = register(address, nbytes) if register is not None else ""
        self.pinned = register is not None and not self.problem


class ArenaMaps:
    """The arenas that this process has mapped, by their ids. Thread-safe."""

    def __init__(self) -> None:
        self.register: Register | None = None
        """Set once at the start of a process whose device wants memory registered."""
        self._lock = threading.Lock()
        self._maps: dict[int, ArenaMap] = {}

    def open(self, arena_id: int, nbytes: int, descriptor: int) -> ArenaMap:
        """The mapping of an arena; takes the descriptor over. PeerRefusedError when it cannot be mapped."""
        try:
            with self._lock:
                if arena_id not in self._maps:
                    if os.fstat(descriptor).st_size < nbytes:
                        raise PeerRefusedError("the peer's memory is smaller than it says")
                    self._maps[arena_id] = ArenaMap(descriptor, nbytes, self.register)
                return self._maps[arena_id]
        except OSError as error:
            raise PeerRefusedError(f"the peer's memory cannot be mapped: {error.strerror}") from error
        finally:
            os.close(descriptor)


MAPS = ArenaMaps()
"""Of this process: mapping and registering the same memory for each transfer would cost more than the transfer."""


def map_now(path: Path, *, token: bytes, deadline_s: float, maps: ArenaMaps = MAPS) -> ArenaMap:
    """Map (and register) the arena behind a socket before anything is loaded from it. PeerError as `shm.connect`."""
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as sock:
        return maps.open(*shm.connect(sock, path, token=token, deadline=Deadline(deadline_s)))


class ShmLink:
    """One opening of this node's host copies; see `ChunkLink`.

    Threads: one connects, several take answers in turns and copy side by side (one sums less than a device takes), the
    watch tells what is there. `fetch` only writes a small frame.
    """

    transport = "shm"

    def __init__(
        self,
        request: LinkRequest,
        *,
        manifest: Manifest,
        landing: Landing,
        path: Path,
        token: bytes,
        connect_deadline_s: float,
        tls: Tls | None = None,
        maps: ArenaMaps = MAPS,
    ) -> None:
        """Starts at once. `tls` is for residency; the bytes stay inside the machine."""
        self.received_bytes = 0
        self._request = request
        self._landing = landing
        self._path = path
        self._token = token
        self._connect_deadline_s = connect_deadline_s
        self._maps = maps
        self._lock = threading.Lock()
        # Whoever reads an answer has it: answers come in the order of the questions.
        self._answering = threading.Lock()
        self._regions: dict[int, RegionRef] = {}
        self._asked: deque[tuple[int, Chunk]] = deque()  # bounded by the window
        self._next_lease_id = 0
        self._close_reason = ""
        self._connected = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._watch = ResidencyWatch(
            address=request.upstream.address,
            tls=tls,
            manifest=manifest,
            host_memory=True,
            on_segments=self._on_segments,
            on_end=lambda error: self.close(str(error)),
        )
        self._thread = threading.Thread(target=self._run, name="shm-upstream", daemon=True)
        self._thread.start()

    def fetch(self, chunk: Chunk) -> None:
        """Ask for a lease; a connection that fails here also ends in its own thread."""
        offset, nbytes = self._landing.range_of(chunk)
        with self._lock:
            region = self._regions[chunk.segment]
            self._next_lease_id = (self._next_lease_id + 1) % 2**32
            self._asked.append((self._next_lease_id, chunk))
            frame = LeaseRequest(
                kind=Kind.LEASE,
                lease_id=self._next_lease_id,
                region_id=region.region_id,
                epoch=region.epoch,
                offset=offset,
                nbytes=nbytes,
            )
            with contextlib.suppress(OSError):
                self._socket.sendall(frame.pack())

    def close(self, reason: str) -> None:
        """Wake both threads; `UpstreamEnded` follows when they have stopped."""
        with self._lock:
            self._close_reason = self._close_reason or reason
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        self._watch.stop()

    def _run(self) -> None:
        others: list[threading.Thread] = []
        with self._ending():
            mapped = self._maps.open(
                *shm.connect(
                    self._socket, self._path, token=self._token, deadline=Deadline(self._connect_deadline_s)
                )
            )
            self._socket.settimeout(None)  # the transfer watches progress and closes what does not move
            self._check_open()
            self._watch.start()
            for _ in range(COPIERS - 1):
                other = threading.Thread(target=self._copy, args=(mapped,), name="shm-copy", daemon=True)
                other.start()
                others.append(other)
            self._copy(mapped)
        for thread in others:
            thread.join()
        self._watch.join()
        with self._lock:
            self._socket.close()
            reason = self._close_reason
        self._request.post(ev.UpstreamEnded(link=self._request.link, reason=reason))

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """Whatever ends the block ends the link; the first reason is the one that is told."""
        reason = "closed"
        try:
            yield
        except PeerError as error:
            reason = str(error)
        except OSError as error:
            reason = f"connection lost: {error.strerror or error}"
        except Exception as error:  # the target's memory; another upstream would not help
            reason = f"{type(error).__name__}: {error}"
            self._request.post(ev.LocalFault(reason=reason))
        finally:
            self.close(reason)

    def _check_open(self) -> None:
        with self._lock:
            if self._close_reason:
                raise PeerLostError(self._close_reason)

    def _on_segments(self, segments: Mapping[int, HeldSegment]) -> None:
        with self._lock:
            self._regions.update({number: held.region for number, held in segments.items()})
        if not self._connected:
            self._connected = True
            self._request.post(ev.UpstreamConnected(link=self._request.link))
        bitmaps = {number: held.verified_chunks for number, held in segments.items()}
        self._request.post(ev.ChunksAnnounced(link=self._request.link, segments=bitmaps))

    def _copy(self, mapped: ArenaMap) -> None:
        with self._ending():
            while True:
                lease_id, chunk, granted = self._next_answer()
                if isinstance(granted, str):
                    refused = ev.FetchRefused(link=self._request.link, chunk=chunk, reason=granted)
                    self._request.post(refused)
                else:
                    self._take(mapped, lease_id, chunk, granted)

    def _next_answer(self) -> tuple[int, Chunk, int | str]:
        """(lease, chunk, where its bytes lie in the arena, or why it is not granted)."""
        with self._answering:
            answer = LeaseAnswer.unpack(wire.receive_bytes(self._socket, shm.ANSWER_BYTES))
            with self._lock:
                lease_id, chunk = self._asked.popleft() if self._asked else (-1, None)
            if chunk is None or answer.lease_id != lease_id:
                raise PeerLostError("the peer answered something that was not asked")
            if answer.status is Status.OK:
                return lease_id, chunk, answer.at
            return lease_id, chunk, wire.receive_bytes(self._socket, answer.at).decode(errors="replace")

    def _take(self, mapped: ArenaMap, lease_id: int, chunk: Chunk, at: int) -> None:
        """Copy a chunk under its lease, give the lease back, and say what came of it."""
        _, nbytes = self._landing.range_of(chunk)
        if at + nbytes > len(mapped.data):
            raise PeerLostError("the peer speaks of bytes outside its memory")
        good = self._landing.copy_in(chunk, mapped.data[at : at + nbytes], pinned=mapped.pinned)
        # Fails when the lease has been taken away meanwhile: what was copied may then be anything.
        with self._lock:
            self._socket.sendall(LeaseRequest(kind=Kind.RETURN, lease_id=lease_id).pack())
            self.received_bytes += nbytes
        answer = ev.ChunkArrived if good else ev.ChunkCorrupt
        self._request.post(answer(link=self._request.link, chunk=chunk))
