"""What a replica remembers of its beginning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Timeline:
    """When what happened, seconds since the epoch; None until then."""

    assigned_at: float
    first_segment_at: float | None = None
    first_token_at: float | None = None
    complete_at: float | None = None
