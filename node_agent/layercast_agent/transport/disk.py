"""A link to this node's own packed files. They are checked like anybody else's chunks: disks rot too.

A segment whose file is in the page cache is *mapped* where the target's memory can be exchanged (a CPU device): no byte
moves. Everything else is read chunk by chunk by a few threads, straight into the chunk's staging (the parameters' own
place on a CPU, pinned memory on a GPU), checked there and committed to the device. Each thread does all steps for its
chunk, so disk, checking and copy engine work at the same time and nobody waits for a tier to be full.
docs/adr/0008 has the reasons and the measurements.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from layercast_agent import transfer_events as ev
from layercast_agent.checkpoint_files import PackedCheckpoint
from layercast_agent.crc32 import crc32
from layercast_agent.direct_io import PackedReader
from layercast_agent.errors import CheckpointError, PeerRefusedError
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
        self._deciding: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)  # by segment
        self._mapped: dict[int, bool] = {}  # by segment, once decided
        self._thread = threading.Thread(target=self._run, name="disk", daemon=True)
        self._thread.start()

    @property
    def received_bytes(self) -> int:
        """Bytes that arrived so far, over all readers."""
        return self._received_bytes

    def fetch(self, chunk: Chunk) -> None:
        """Queue one chunk for the readers."""
        self._asked.put_nowait(chunk)

    def close(self, reason: str) -> None:
        """Let each reader end after the chunk that it works on."""
        self._close_reason = self._close_reason or reason
        self._closing.set()
        with contextlib.suppress(queue.Full):
            for _ in range(READERS):
                self._asked.put_nowait(None)

    def _run(self) -> None:
        with self._ending(), contextlib.closing(PackedCheckpoint(self._folder)) as files:
            self._announce(files)
            with contextlib.closing(PackedReader(files)) as reader:
                others = [
                    threading.Thread(target=self._read_asked, args=(files, reader), name="disk", daemon=True)
                    for _ in range(READERS - 1)
                ]
                for thread in others:
                    thread.start()
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

    def _announce(self, files: PackedCheckpoint) -> None:
        if files.manifest.digest != self._manifest.digest:
            raise PeerRefusedError(f"{self._folder} holds another checkpoint")
        everything = {
            segment.index: ((1 << len(segment.chunk_crc32)) - 1).to_bytes(
                (len(segment.chunk_crc32) + 7) // 8, "little"
            )
            for segment in self._manifest.segments
        }
        self._request.post(ev.UpstreamConnected(link=self._request.link))
        self._request.post(ev.ChunksAnnounced(link=self._request.link, segments=everything))

    def _read_asked(self, files: PackedCheckpoint, reader: PackedReader) -> None:
        with self._ending():
            while (chunk := self._asked.get()) is not None and not self._closing.is_set():
                self._request.post(self._answer(files, reader, chunk))

    def _answer(self, files: PackedCheckpoint, reader: PackedReader, chunk: Chunk) -> ev.Event:
        link = self._request.link
        if self._is_mapped(files, reader, chunk.segment):
            return ev.ChunkArrived(link=link, chunk=chunk, whole_segment=True)
        staged = self._landing.staging(chunk)
        self._pace.take(len(staged))
        reader.read(chunk.segment, self._landing.range_of(chunk)[0], staged)
        with self._lock:
            self._received_bytes += len(staged)
        if self._landing.settle(chunk, staged):
            return ev.ChunkArrived(link=link, chunk=chunk)
        return ev.ChunkCorrupt(link=link, chunk=chunk)

    def _is_mapped(self, files: PackedCheckpoint, reader: PackedReader, segment: int) -> bool:
        """Decides once for each segment, when its first chunk is asked for: later its pages may have gone."""
        with self._lock:
            deciding = self._deciding[segment]
        with deciding:
            if segment not in self._mapped:
                view = files.view(segment, 0, self._manifest.segments[segment].nbytes)
                able = self._landing.may_adopt(segment) and not self._pace.limits
                share = reader.cached_share(segment, view) if able else 0.0
                maps = share >= MAPPED_SHARE_MIN and self._is_sound(files, segment)
                if maps:
                    bring_in(view)
                    self._landing.adopt(segment, view)
                self._mapped[segment] = maps
            return self._mapped[segment]

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
