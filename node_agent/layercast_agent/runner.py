"""Drives one parameter transfer: signatures first, body follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from layercast_agent.regions import WritableMemory
from layercast_agent.residency import Residency

if TYPE_CHECKING:
    from layercast_agent.layout import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamSpec:
    peer_id: str
    address: str = ""
    data_address: str = ""
    local_folder: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferLimits:
    window_chunks: int = 4
    stall_s: float = 1.0
    progress_deadline_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferOutcome:
    transfer_id: str
    complete: bool
    reason: str  # "" when complete; "cancelled", or what went wrong on this side


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferStatus:
    transfer_id: str
    generation: int
    upstream: str
    done_bytes: int
    total_bytes: int
    bytes_per_s: int
    failures: tuple[str, ...]
    stalled: bool
    complete: bool


class TransferRunner:
    def __init__(
        self,
        *,
        transfer_id: str,
        manifest: Manifest,
        memories: Sequence[WritableMemory],
        residency: Residency,
        upstreams: Sequence[UpstreamSpec],
        generation: int,
        segment_order: Sequence[int],
        token: bytes,
        on_segment: Callable[[int], None],
        on_end: Callable[[TransferOutcome], None],
        limits: TransferLimits = TransferLimits(),
    ) -> None: ...

    def start(self) -> None: ...
    def replace_upstreams(self, upstreams: Sequence[UpstreamSpec], generation: int) -> None: ...
    def cancel(self, deadline_s: float) -> None: ...
    def status(self) -> TransferStatus: ...
