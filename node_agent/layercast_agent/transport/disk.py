"""A link to this node's own packed files. They are checked like anybody else's chunks: disks rot too.

A segment whose file is in the page cache is *mapped* where the target's memory can be exchanged (a CPU device): no byte
moves. Everything else is read chunk by chunk by a few threads, into memory that is used again and again (pinned staging
on a GPU, a buffer of each thread on a CPU), checked there and committed or copied. Each thread does all steps for its
chunk, so disk, checking and copy engine work at the same time and nobody waits for a tier to be full.
docs/adr/0008 has the reasons and the measurements.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path

from layercast_agent import transfer_events as ev
from layercast_agent.checkpoint_files import PackedCheckpoint, holds
from layercast_agent.crc32 import crc32
from layercast_agent.direct_io import PackedReader
from layercast_agent.errors import CheckpointError, PeerRefusedError
from layercast_agent.host_memory import allocate
from layercast_agent.layout import Manifest
from layercast_agent.page_cache import bring_in, remember_verified, was_verified
from layercast_agent.transfer_events import Chunk
from layercast_agent.transport import LinkRequest
from layercast_agent.transport.egress import EgressLimiter
from layercast_agent.transport.landing import Landing

QUEUE_MAX = 1024  # far above any window; a transfer that asks for more is broken
MAPPED_SHARE_MIN = 0.9  # with so much of a file in memory, reading the rest costs less than copying all
READERS = 4  # two keep a disk busy; the others check and copy meanwhile


class DiskLink:
    """One opening of a folder; see `ChunkLink`."""

    transport = "disk"

    def __init__(self, request: LinkRequest, *, manifest: Manifest, landing: Landing, folder: Path) -> None:
        """Starts at once."""
        self._request = request
        self._manifest = manifest
        self._landing = landing
        self._folder = folder
        self._pace = EgressLimiter(request.upstream.disk_bytes_per_s)
        self._asked: queue.Queue[Chunk | None] = queue.Queue(QUEUE_MAX)  # None wakes a reader to its end
        self._closing = threading.Event()
        self._close_reason = ""
        self._lock = threading.Lock()
        self._received_bytes = 0
        self._undecided = deque(segment.index for segment in manifest.segments)
        self._deciding: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)  # by segment
        self._usable: dict[
            int, memoryview | None
        ] = {}  # by segment, once decided: the file's bytes as they lie there
        self._mapped: set[int] = set()
        self._thread = threading.Thread(target=self._run, name="disk", daemon=True)
        self._thread.start()

    @property
    def received_bytes(self) -> int:
        """Bytes that arrived so far, over all readers."""
        return self._received_bytes

    def fetch(self, chunk: Chunk) -> None:
        """Queue one chunk for the readers; what was decided for before it was asked for is there at once."""
        usable = self._usable.get(chunk.segment)
        if usable is None:
            self._asked.put_nowait(chunk)
        else:
            self._map(chunk, usable)

    def close(self, reason: str) -> None:
        """Let each reader end after the chunk that it works on."""
        self._close_reason = self._close_reason or reason
        self._closing.set()
        with contextlib.suppress(queue.Full):
            for _ in range(READERS):
                self._asked.put_nowait(None)

    def _run(self) -> None:
        with self._ending(), contextlib.closing(self._open()) as files:
            self._announce()
            with contextlib.closing(PackedReader(files)) as reader:
                others = [
                    threading.Thread(target=self._help, args=(files, reader), name="disk", daemon=True)
                    for _ in range(READERS - 1)
                ]
                for thread in others:
                    thread.start()
                with self._ending():  # the others are waited for however it ends
                    self._read_asked(files, reader)
                for thread in others:
                    thread.join()
        self._request.post(ev.UpstreamEnded(link=self._request.link, reason=self._close_reason))

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """Whatever ends the block ends the whole link; the first reason is the one that is told."""
        reason = "closed"
        try:
            yield
        except (CheckpointError, PeerRefusedError, OSError) as error:
            reason = str(error)
        except Exception as error:  # the target's memory; another upstream would not help
            reason = f"{type(error).__name__}: {error}"
            self._request.post(ev.LocalFault(reason=reason))
        finally:
            self.close(reason)

    def _open(self) -> PackedCheckpoint:
        if not holds(self._folder, self._manifest.digest):
            raise PeerRefusedError(f"{self._folder} holds another checkpoint")
        return PackedCheckpoint(self._folder, manifest=self._manifest)

    def _announce(self) -> None:
        everything = {
            segment.index: ((1 << len(segment.chunk_crc32)) - 1).to_bytes(
                (len(segment.chunk_crc32) + 7) // 8, "little"
            )
            for segment in self._manifest.segments
        }
        self._request.post(ev.UpstreamConnected(link=self._request.link))
        self._request.post(ev.ChunksAnnounced(link=self._request.link, segments=everything))

    def _help(self, files: PackedCheckpoint, reader: PackedReader) -> None:
        with self._ending():
            self._look_ahead(files, reader)
            self._read_asked(files, reader)

    def _read_asked(self, files: PackedCheckpoint, reader: PackedReader) -> None:
        own = allocate(self._manifest.chunk_bytes)  # costs nothing before it is used
        while (chunk := self._asked.get()) is not None and not self._closing.is_set():
            self._answer(files, reader, chunk, own)

    def _look_ahead(self, files: PackedCheckpoint, reader: PackedReader) -> None:
        """Decide for segments before they are asked for, as long as files are in memory."""
        while self._undecided and not self._closing.is_set():
            with contextlib.suppress(IndexError):  # another reader was faster
                if self._decide(files, reader, self._undecided.popleft()) is None:
                    self._undecided.clear()

    def _answer(self, files: PackedCheckpoint, reader: PackedReader, chunk: Chunk, own: memoryview) -> None:
        usable = self._decide(files, reader, chunk.segment)
        if usable is not None:
            self._map(chunk, usable)
            return
        offset, nbytes = self._landing.range_of(chunk)
        in_place = self._landing.in_place(chunk.segment)
        read = own[:nbytes] if in_place else self._landing.staging(chunk)
        self._pace.take(nbytes)
        reader.read(chunk.segment, offset, read)
        with self._lock:
            self._received_bytes += nbytes
        # Still in the cache: summing and copying it costs less than summing it where it would have been read to.
        right = self._landing.copy_in(chunk, read) if in_place else self._landing.settle(chunk, read)
        answer = ev.ChunkArrived if right else ev.ChunkCorrupt
        self._request.post(answer(link=self._request.link, chunk=chunk))

    def _map(self, chunk: Chunk, usable: memoryview) -> None:
        """Make the file's bytes the memory of the chunk's segment, and say so, once."""
        with self._lock:
            if chunk.segment in self._mapped:
                return  # the answer for another chunk of it has said so
            self._landing.adopt(chunk.segment, usable)
            self._mapped.add(chunk.segment)
        self._request.post(ev.ChunkArrived(link=self._request.link, chunk=chunk, whole_segment=True))

    def _decide(self, files: PackedCheckpoint, reader: PackedReader, segment: int) -> memoryview | None:
        """The segment's bytes where they can be used as they lie there, once for all: later their pages may go."""
        with self._lock:
            deciding = self._deciding[segment]
        with deciding:
            if segment not in self._usable:
                view = files.view(segment, 0, self._manifest.segments[segment].nbytes)
                able = self._landing.may_adopt(segment) and not self._pace.limits
                share = reader.cached_share(segment, view) if able else 0.0
                usable = (
                    share >= MAPPED_SHARE_MIN
                    and self._is_sound(files, segment)
                    and bring_in(view, share=share)
                )
                self._usable[segment] = view if usable else None
            return self._usable[segment]

    def _is_sound(self, files: PackedCheckpoint, segment: int) -> bool:
        """Whether the mapped bytes are the manifest's. A wrong chunk is told when it is read as usual."""
        spec, path = self._manifest.segments[segment], files.path(segment)
        if was_verified(path, spec.checksum):
            return True
        for chunk, expected in enumerate(spec.chunk_crc32):
            with files.view(segment, *self._manifest.chunk_range(segment, chunk)) as view:
                if self._closing.is_set() or crc32(view) != expected:
                    return False
        remember_verified(path, spec.checksum)
        return True
