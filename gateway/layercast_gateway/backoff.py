"""How long to pause before trying again: doubling from a first pause to a longest one, with chance mixed in.

The chance keeps many gateways from knocking at one restarted process in the same instant.
"""

from __future__ import annotations

import random
from collections.abc import Callable


class Backoff:
    """Pauses in seconds. `chance` returns a number in [0, 1); tests pass their own."""

    def __init__(self, *, first_s: float, most_s: float, chance: Callable[[], float] = random.random) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._chance = chance
        self._next_s = first_s

    def next_s(self) -> float:
        """The next pause: between half of the current step and all of it; the step then doubles."""
        pause_s = self._next_s * (0.5 + self._chance() / 2)
        self._next_s = min(self._next_s * 2, self._most_s)
        return pause_s

    def reset(self) -> None:
        """It worked: the next pause is the first one again."""
        self._next_s = self._first_s
