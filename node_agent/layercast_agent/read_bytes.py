"""How many verified parameter bytes a process has read, by transport: the figure that shows a silent detour."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

TRANSPORTS = ("rdma", "tcp", "shm", "disk")


class ReadBytes:
    """Counts since the process's start. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes: Counter[str] = Counter(dict.fromkeys(TRANSPORTS, 0))

    def add(self, transport: str, nbytes: int) -> None:
        """One chunk, or a whole segment, that is verified."""
        with self._lock:
            self._bytes[transport] += nbytes

    def by_transport(self) -> Mapping[str, int]:
        """All transports, those that were never used included."""
        with self._lock:
            return dict(self._bytes)
