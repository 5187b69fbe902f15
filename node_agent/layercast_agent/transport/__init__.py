"""How chunks travel: one seam between the transfer's decisions and the ways to carry them out.

A *link* is one opening of an upstream (`transfer_events.py`). Every way to reach an upstream (`tcp_link`,
`disk`, and `memory` in simulations) is a `ChunkLink` that is told what to fetch and answers with events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from layercast_agent.transfer_events import Chunk, Event, UpstreamSpec

Post = Callable[[Event], None]


class ChunkLink(Protocol):
    """One opening of an upstream. Its last event is `UpstreamEnded`, after which it writes nothing."""

    @property
    def transport(self) -> str:
        """What carries the bytes; see `read_bytes.TRANSPORTS`."""

    @property
    def received_bytes(self) -> int:
        """Bytes that came in so far; tells a slow link from a dead one."""

    def fetch(self, chunk: Chunk) -> None:
        """Ask for a chunk that was announced; never blocks. The answer is an event."""

    def close(self, reason: str) -> None:
        """Stop; never blocks. `UpstreamEnded` follows soon. Calling it twice is harmless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRequest:
    """What a link is opened with."""

    link: int
    upstream: UpstreamSpec
    post: Post


OpenLink = Callable[[LinkRequest], ChunkLink]
