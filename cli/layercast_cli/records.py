"""What a demo run records: every request, what the cluster looked like while it ran, and where phases began.

Everything in the report is computed from these values; nothing else is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from layercast_cli.status import Scale

REFERENCE, STEADY, BURST, LOW = "reference", "steady", "burst", "low"
PHASES = (REFERENCE, STEADY, BURST, LOW)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request as its client saw it; times in unix seconds.

    `token_at` holds the arrival of every piece of text. `error` is empty when the answer came to its end.
    """

    index: int
    phase: str
    prompt: int
    sent_at: float
    ended_at: float
    token_at: tuple[float, ...] = ()
    text: str = ""
    finish_reason: str = ""
    error: str = ""

    @property
    def ok(self) -> bool:
        """The answer came to its end."""
        return not self.error

    @property
    def ttft_s(self) -> float | None:
        """Time to first token in seconds; None when none came."""
        return self.token_at[0] - self.sent_at if self.token_at else None

    @property
    def tbt_s(self) -> tuple[float, ...]:
        """Times between tokens in seconds."""
        return tuple(b - a for a, b in zip(self.token_at, self.token_at[1:], strict=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSample:
    """One replica at one moment."""

    replica_id: str
    node: str
    state: str
    layers_resident: int
    layers_total: int
    source: str
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The cluster at one moment (unix seconds); None for what was not to be had just then."""

    at: float
    phase: str
    sent: int
    requests_waiting: float | None
    requests_in_flight: float | None
    handoffs: float | None
    desired: int
    serving: int
    replicas: tuple[ReplicaSample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRecord:
    """One whole run.

    `phase_at` is when each phase began, `capacity` the measured rate of one replica in requests a second,
    `reference` the answer of the single replica by prompt, `settings` what the run was asked to do.
    """

    settings: Mapping[str, Any]
    started_at: float
    ended_at: float
    capacity: float
    wanted_replicas: int
    phase_at: Mapping[str, float] = field(default_factory=dict)
    reference: Mapping[int, str] = field(default_factory=dict)
    requests: tuple[RequestRecord, ...] = ()
    samples: tuple[Sample, ...] = ()
    scales: tuple[Scale, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a file that other programs can read."""
        return asdict(self)
