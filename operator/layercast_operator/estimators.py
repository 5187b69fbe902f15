"""What will take how long, said beforehand and corrected by what then did. Pure.

An estimate begins with a prior that is stated: bytes over the rates that nodes tell or that are assumed, and
`START_S` for a device to take a model on. Each time something ends, the ratio of what it took and of its prior is
learned, and the next prior of the same kind is multiplied by what was learned. The ratio is averaged as a logarithm,
so that twice as long and half as long cancel out; one that is absurd counts as `RATIO_MAX`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

START_S = 0.5
"""From the command until a replica has memory, an address and a transfer."""

WEIGHT = 0.3
"""Of the newest ratio. The prior itself counts as one observation, so the first has a half."""

RATIO_MAX = 20.0
"""What took longer than that many times its prior was held up by something else, and so was its opposite."""

LEAST_S = 1e-3
"""Clocks of two machines may say that something ended before it began."""


class What(Enum):
    """What is predicted of a new replica; a label of metrics and a field of status."""

    FIRST_SEGMENT = "first-segment"
    """From the command that starts it to its first segment: a layer, for one that shares a queue."""
    LOAD = "load"
    """From the command that starts it until it has everything."""
    TRANSFER = "transfer"
    """From the command that says whom it reads from until it has everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """By which factor priors of one kind were wrong, lately."""

    log_factor: float = 0.0
    samples: int = 0

    @property
    def factor(self) -> float:
        """A prior is multiplied by it."""
        return math.exp(self.log_factor)

    def after(self, *, prior_s: float, actual_s: float) -> Correction:
        """What is known after something took `actual_s`."""
        ratio = max(actual_s, LEAST_S) / max(prior_s, LEAST_S)
        seen = math.log(min(max(ratio, 1 / RATIO_MAX), RATIO_MAX))
        weight = max(WEIGHT, 1 / (self.samples + 2))
        moved = self.log_factor + weight * (seen - self.log_factor)
        return Correction(log_factor=moved, samples=self.samples + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One estimate, and what came of it. Seconds to the millisecond, so that a status tells all of it."""

    what: What
    way: str
    """Where the parameters come from: the kind of copy that is read."""
    begun_at: float
    """From when it counts, seconds since the epoch."""
    prior_s: float
    predicted_s: float
    actual_s: float | None = None

    def ended(self, at: float | None) -> Prediction:
        """With what it took, when it has ended and was still open."""
        if at is None or self.actual_s is not None:
            return self
        return replace(self, actual_s=round(max(at - self.begun_at, LEAST_S), 3))


Estimates = Mapping[tuple[What, str], Correction]
"""What was learned, by what is predicted and by the kind of copy."""


def predict(estimates: Estimates, what: What, way: str, *, prior_s: float, at: float) -> Prediction:
    """The estimate for something that begins now."""
    return Prediction(
        what=what,
        way=way,
        begun_at=at,
        prior_s=round(prior_s, 3),
        predicted_s=round(prior_s * factor_of(estimates, what, way), 3),
    )


def learned(estimates: Estimates, prediction: Prediction) -> Estimates:
    """The estimates after a prediction came true, or did not."""
    if prediction.actual_s is None:
        return estimates
    kind = (prediction.what, prediction.way)
    known = estimates.get(kind, Correction())
    return {**estimates, kind: known.after(prior_s=prediction.prior_s, actual_s=prediction.actual_s)}


def factor_of(estimates: Estimates, what: What, way: str) -> float:
    """By what a prior of that kind is multiplied now."""
    return estimates.get((what, way), Correction()).factor
