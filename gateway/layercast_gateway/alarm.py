"""A timer of the event loop that is moved far less often than what it waits for changes."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable


class Alarm:
    """Calls back at the earliest time that was asked for since it rang last; it may ring too early, never too late."""

    def __init__(self, ring: Callable[[], object]) -> None:
        self._ring = ring
        self._at = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def at_latest(self, when: float) -> None:
        """Ring at `when` (monotonic seconds) or before."""
        if when >= self._at:
            return
        self.close()
        self._at = when
        self._timer = asyncio.get_running_loop().call_later(max(0.0, when - time.monotonic()), self._rings)

    def close(self) -> None:
        """Rings no more."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._at = None, math.inf

    def _rings(self) -> None:
        self._timer, self._at = None, math.inf
        self._ring()
