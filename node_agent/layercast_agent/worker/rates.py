"""How fast this device computes, learned from what its steps took. Pure: seconds are given by the caller.

A step costs something however few tokens it has: the parameters are read, kernels are launched. The operator divides
waiting prompt tokens by the rate of a replica that has plenty of them, so only a step of a good part of a chunk
measures that rate. A smaller one bounds it: n tokens in s seconds say that a chunk of c tokens takes between s, if
tokens were free, and s c/n, if steps were. It raises a rate that it exceeds, and never lowers one that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

WINDOW_S = 2.0
"""Time constant, in seconds of the steps that count."""

MEASURES_FROM = 0.25
"""Part of a chunk from which a step measures: whatever a step costs, a full chunk has at most four times its rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRate:
    """Prompt tokens a second of a replica with a full queue."""

    chunk_tokens: int
    """Most tokens of a step."""
    tokens_per_s: float = 0.0
    """0 before the first step; from small steps alone, the geometric mean of both bounds."""
    measured: bool = False
    """A step of a good part of a chunk was seen."""
    samples: int = 0
    """Steps that count so far."""

    def after(self, *, tokens: int, seconds: float, part: float = 1.0) -> PrefillRate:
        """What is known after a step that took `tokens` prompt tokens through `part` of the layers in `seconds`."""
        if tokens <= 0 or seconds <= 0:
            return self
        shown = tokens * part / seconds
        measures = tokens >= MEASURES_FROM * self.chunk_tokens
        if measures and not self.measured:
            return replace(self, tokens_per_s=shown, measured=True, samples=1)
        if self.measured and not measures and shown <= self.tokens_per_s:
            return self
        if not self.measured:
            shown *= math.sqrt(self.chunk_tokens / tokens)
        # A plain mean at first: the first step of all is colder than those that follow.
        weight = min(1.0, max(seconds / WINDOW_S, 1 / (self.samples + 1)))
        rate = self.tokens_per_s + weight * (shown - self.tokens_per_s)
        return replace(self, tokens_per_s=rate, samples=self.samples + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """What something takes, lately; 0 before the first time."""

    seconds: float = 0.0
    samples: int = 0

    def after(self, seconds: float) -> Mean:
        """A plain mean at first, then with a tenth for the newest."""
        weight = max(0.1, 1 / (self.samples + 1))
        return Mean(seconds=self.seconds + weight * (seconds - self.seconds), samples=self.samples + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Predictions whose outcome is known: how many, and the sums of both."""

    count: int = 0
    predicted_s: float = 0.0
    actual_s: float = 0.0

    def with_one(self, *, predicted_s: float, actual_s: float) -> Compared:
        """One more; nothing was predicted where `predicted_s` is 0."""
        if predicted_s <= 0:
            return self
        return Compared(
            count=self.count + 1,
            predicted_s=self.predicted_s + predicted_s,
            actual_s=self.actual_s + actual_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """What steps take, and how well that was foreseen: `prefill` steps that measure, `decode` steps without prompts."""

    prefill: PrefillRate
    decode: Mean = field(default_factory=Mean)
    compared: Mapping[str, Compared] = field(default_factory=dict)

    def after(self, *, tokens: int, seconds: float, part: float = 1.0, decoded: bool = False) -> StepTimes:
        """As `PrefillRate.after`; `decoded` says that a step without prompt tokens gave tokens."""
        if decoded and tokens == 0:
            compared = self._compared("decode", self.decode.seconds, seconds)
            return replace(self, decode=self.decode.after(seconds), compared=compared)
        compared = self.compared
        if self.prefill.measured and tokens >= MEASURES_FROM * self.prefill.chunk_tokens:
            compared = self._compared("prefill", tokens * part / self.prefill.tokens_per_s, seconds)
        prefill = self.prefill.after(tokens=tokens, seconds=seconds, part=part)
        return replace(self, prefill=prefill, compared=compared)

    def expected_s(self, tokens: float) -> float:
        """What a step with so many prompt tokens takes; at least what one without any does."""
        rate = self.prefill.tokens_per_s
        return max(self.decode.seconds, tokens / rate if rate > 0 else 0.0)

    def _compared(self, what: str, predicted_s: float, actual_s: float) -> Mapping[str, Compared]:
        known = self.compared.get(what, Compared())
        return {**self.compared, what: known.with_one(predicted_s=predicted_s, actual_s=actual_s)}
