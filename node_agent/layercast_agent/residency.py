"""Which verified chunks of one checkpoint a process holds, and who wants to know.

Residency is the only thing that a holder tells its peers about a checkpoint: a chunk that is marked here may
be read by anybody, executed, and forwarded; a chunk that is not may hold anything. Marks are never taken
back: a holder that loses its memory removes the whole holding.

The bitmaps have the wire's form (`SegmentResidency.verified_chunks`): chunk c is bit c % 8 of byte c // 8,
least significant bit first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from layercast_agent.layout import Manifest


class Residency:
    """Verified chunks of one checkpoint. Thread-safe; `mark` is called by one writer as chunks arrive."""

    def __init__(self, manifest: Manifest, *, complete: bool = False) -> None:
        """Nothing is held, or with `complete` everything."""
        self._lock = threading.Lock()
        self._layers = manifest.layers
        self._sizes = [
            [manifest.chunk_range(s.index, c)[1] for c in range(manifest.chunk_count(s.index))]
            for s in manifest.segments
        ]
        self._bitmaps = [bytearray((len(sizes) + 7) // 8) for sizes in self._sizes]
        self._missing = [len(sizes) for sizes in self._sizes]
        self._changed_at = [0] * len(self._sizes)
        self._done_bytes = 0
        self._version = 0
        self._subscribers: dict[int, Callable[[], None]] = {}
        self._next_subscriber = 0
        if complete:
            self._fill()

    def _fill(self) -> None:
        for segment, sizes in enumerate(self._sizes):
            for chunk in range(len(sizes)):
                self._bitmaps[segment][chunk // 8] |= 1 << chunk % 8
            self._missing[segment] = 0
            self._done_bytes += sum(sizes)

    def mark(self, segment: int, chunk: int) -> bool:
        """Say that a chunk is verified and readable.

        Returns True when that made its segment complete; marking twice changes nothing and returns False.
        Subscribers are called from this thread afterwards.
        """
        with self._lock:
            if self._has(segment, chunk):
                return False
            self._bitmaps[segment][chunk // 8] |= 1 << chunk % 8
            self._missing[segment] -= 1
            self._done_bytes += self._sizes[segment][chunk]
            self._version += 1
            self._changed_at[segment] = self._version
            completed = self._missing[segment] == 0
            subscribers = tuple(self._subscribers.values())
        for callback in subscribers:
            callback()
        return completed

    def _has(self, segment: int, chunk: int) -> bool:
        if not 0 <= chunk < len(self._sizes[segment]):
            raise IndexError(f"segment {segment} has no chunk {chunk}")
        return bool(self._bitmaps[segment][chunk // 8] >> chunk % 8 & 1)

    def has(self, segment: int, chunk: int) -> bool:
        """Whether a chunk is verified."""
        with self._lock:
            return self._has(segment, chunk)

    def segment_complete(self, segment: int) -> bool:
        """Whether all chunks of a segment are verified."""
        with self._lock:
            return self._missing[segment] == 0

    @property
    def complete(self) -> bool:
        """Whether the whole checkpoint is verified."""
        with self._lock:
            return not any(self._missing)

    @property
    def layers_resident(self) -> int:
        """How many layers are complete, in whatever order they came; embed and head do not count."""
        with self._lock:
            return self._missing[1 : self._layers + 1].count(0)

    @property
    def done_bytes(self) -> int:
        """Verified bytes."""
        with self._lock:
            return self._done_bytes

    @property
    def version(self) -> int:
        """Grows by one with each mark."""
        with self._lock:
            return self._version

    def bitmap(self, segment: int) -> bytes:
        """Verified chunks of one segment."""
        with self._lock:
            return bytes(self._bitmaps[segment])

    def snapshot(self, *, since: int = -1) -> tuple[int, dict[int, bytes]]:
        """The version, and the bitmaps of all segments that changed after version `since` (-1: of all)."""
        with self._lock:
            changed = {
                segment: bytes(self._bitmaps[segment])
                for segment, version in enumerate(self._changed_at)
                if version > since
            }
            return self._version, changed

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` after each change, from the marking thread; it must be quick and not raise.

        Returns a function that ends the subscription; calling it twice is harmless.
        """
        with self._lock:
            key = self._next_subscriber
            self._next_subscriber += 1
            self._subscribers[key] = callback

        def unsubscribe() -> None:
            with self._lock:
                self._subscribers.pop(key, None)

        return unsubscribe
