"""Which packed checkpoints make room for another one on a node's disk. Pure.

Least recently used goes first. Nothing goes that a ModelService wants or that is in use here; and while nobody has
said what is wanted nothing goes at all, because unknown is not unwanted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from layercast_agent.errors import NoCapacityError


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One checkpoint on disk."""

    digest: str
    nbytes: int
    used_at: float
    """Seconds since the epoch."""


def choose(
    held: Sequence[Packed],
    *,
    need_bytes: int,
    bytes_max: int,
    used: Collection[str],
    wanted: Collection[str] | None,
) -> tuple[Packed, ...]:
    """What to remove so that `need_bytes` more fit into `bytes_max`; 0 is no limit.

    `used` are digests that something here reads or runs; `wanted` those of existing ModelServices, None when nobody
    has told yet. NoCapacityError with all sums when they do not fit.
    """
    excess = sum(one.nbytes for one in held) + need_bytes - bytes_max
    if not bytes_max or excess <= 0:
        return ()
    gone: list[Packed] = []
    for one in sorted(held, key=lambda one: (one.used_at, one.digest)):
        if excess > 0 and wanted is not None and one.digest not in used and one.digest not in wanted:
            gone.append(one)
            excess -= one.nbytes
    if excess <= 0:
        return tuple(gone)
    kept = sum(one.nbytes for one in held if one.digest in used or one.digest in (wanted or ()))
    why = (
        f"{kept} bytes of it are in use or wanted by ModelServices"
        if wanted is not None
        else "the operator has not said yet which checkpoints are wanted"
    )
    raise NoCapacityError(
        f"the packed checkpoint needs {need_bytes} bytes, the store may hold {bytes_max} and holds "
        f"{sum(one.nbytes for one in held)}; {why}"
    )
