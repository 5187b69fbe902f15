"""Wakes everybody who waits for the next change of something, and misses nobody who began to wait before it."""

from __future__ import annotations

import asyncio
from contextlib import suppress


class Pulse:
    """Whoever looks at the state and then waits, without awaiting in between, sees every change after the look."""

    def __init__(self) -> None:
        self._next: asyncio.Future[None] | None = None

    def fire(self) -> None:
        """Something changed."""
        if self._next is not None:
            self._next.set_result(None)
            self._next = None

    async def wait(self, timeout_s: float) -> None:
        """Returns at the next change, or after the timeout."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        with suppress(TimeoutError):
            # Not asyncio.wait_for: in Python 3.11 it loses a cancellation that comes together with the change.
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self._next)
