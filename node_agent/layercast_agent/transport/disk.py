"""A link to this node's own packed files. They are checked like anybody else's chunks: disks rot too."""

from __future__ import annotations

import contextlib
import queue
import threading
from pathlib import Path

from layercast_agent import transfer_events as ev
from layercast_agent.checkpoint_files import PackedCheckpoint
from layercast_agent.errors import CheckpointError, PeerRefusedError
from layercast_agent.layout import Manifest
from layercast_agent.transfer_events import Chunk
from layercast_agent.transport import LinkRequest
from layercast_agent.transport.landing import Landing

QUEUE_MAX = 1024  # far above any window; a transfer that asks for more is broken


class DiskLink:
    """One opening of a folder; see `ChunkLink`."""

    def __init__(self, request: LinkRequest, *, manifest: Manifest, landing: Landing, folder: Path) -> None:
        """Starts at once."""
        self._request = request
        self._manifest = manifest
        self._landing = landing
        self._folder = folder
        self._asked: queue.Queue[Chunk | None] = queue.Queue(QUEUE_MAX)  # None wakes the thread to its end
        self._closing = threading.Event()
        self._close_reason = ""
        self.received_bytes = 0
        self._thread = threading.Thread(target=self._run, name="disk", daemon=True)
        self._thread.start()

    def fetch(self, chunk: Chunk) -> None:
        """Queue one chunk for the reading thread."""
        self._asked.put_nowait(chunk)

    def close(self, reason: str) -> None:
        """Let the reading thread end after the chunk that it copies."""
        self._close_reason = self._close_reason or reason
        self._closing.set()
        with contextlib.suppress(queue.Full):
            self._asked.put_nowait(None)

    def _run(self) -> None:
        reason = "closed"
        try:
            with contextlib.closing(PackedCheckpoint(self._folder)) as files:
                self._announce(files)
                self._copy_asked(files)
        except (CheckpointError, PeerRefusedError, OSError) as error:
            reason = str(error)
        except Exception as error:  # the target's memory; another upstream would not help
            reason = f"{type(error).__name__}: {error}"
            self._request.post(ev.LocalFault(reason=reason))
        finally:
            self._request.post(ev.UpstreamEnded(link=self._request.link, reason=self._close_reason or reason))

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

    def _copy_asked(self, files: PackedCheckpoint) -> None:
        link = self._request.link
        while (chunk := self._asked.get()) is not None and not self._closing.is_set():
            offset, nbytes = self._landing.range_of(chunk)
            with files.view(chunk.segment, offset, nbytes) as view:
                good = self._landing.copy_in(chunk, view)
            self.received_bytes += nbytes
            if good:
                self._request.post(ev.ChunkArrived(link=link, chunk=chunk))
            else:
                self._request.post(ev.ChunkCorrupt(link=link, chunk=chunk))
