"""Gives a CPU device a fixed speed, so that several of them share a small machine like devices would.

Three workers on two cores are not three devices: whoever is busy takes what the others leave, and a second replica
would make the first one slower. A share of a core, enforced after every turn, makes each worker as fast alone as
among others. On a machine with a core for each worker, and on a GPU, the share is 1 and this does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class ComputeShare:
    """A duty cycle: processor time used is at most `share` of the time that passes.

    Pure: times in seconds are given by the caller, and the pause to take is returned.
    """

    share: float
    debt_s: float = 0.0

    DEBT_MAX_S = 0.5

    def after(self, *, cpu_s: float, wall_s: float) -> float:
        """The pause that is due after a turn that used `cpu_s` and took `wall_s`.

        Idle time is not saved up: a worker that waited does not run faster afterwards.
        """
        if self.share >= 1.0:
            return 0.0
        self.debt_s = min(self.DEBT_MAX_S, max(0.0, self.debt_s + cpu_s / self.share - wall_s))
        return self.debt_s

    def paused(self, seconds: float) -> None:
        """Tells that a pause was taken."""
        self.debt_s = max(0.0, self.debt_s - seconds)
