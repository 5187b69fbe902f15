"""How fast this process may send: one limit for all connections, which urgent bytes do not wait for.

Parameters are many and patient; the state of a request that moves is small and somebody waits for it. Both
use the same network card, so both are charged to the same account, but only parameters wait until it is
positive again. (Generic cell rate algorithm: the account is a time, "free at".)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# After a pause so much time's worth of bytes may be sent at once; a tick of the kernel's timer is less.
BURST_S = 0.01


class EgressLimiter:
    """A token bucket shared by all connections of a process. Thread-safe; first come, first served."""

    def __init__(
        self,
        bytes_per_s: int | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """None or 0 means no limit."""
        self._bytes_per_s = bytes_per_s or 0
        self._clock = clock
        self._sleep = sleep
        self._free_at = 0.0
        self._lock = threading.Lock()

    @property
    def limits(self) -> bool:
        """Whether anybody ever waits here."""
        return bool(self._bytes_per_s)

    def take(self, nbytes: int, *, urgent: bool = False) -> None:
        """Return when `nbytes` may be sent: urgent ones at once, whatever the account says."""
        if not self._bytes_per_s:
            return
        with self._lock:
            now = self._clock()
            start = max(self._free_at, now - BURST_S)
            self._free_at = start + nbytes / self._bytes_per_s
        if not urgent and start > now:
            self._sleep(start - now)
