"""States of a transfer and of its upstreams, and every transition that there is.

Two coupled machines: one of the transfer, and one for each upstream. `transfer.py` says when a cue is due;
where a cue leads is said only here. Anything that the tables do not have is a bug in `transfer.py` or in the
runner, and raises KeyError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from layercast_agent.transfer_events import UpstreamSpec


class Phase(Enum):
    """Of the transfer."""

    RUNNING = auto()
    STALLED = auto()
    COMPLETE = auto()
    FAILED = auto()


class Link(Enum):
    """Of one upstream."""

    RESTING = auto()  # not open; opened when its back-off is over
    OPENING = auto()
    LIVE = auto()
    CLOSING = auto()  # told to stop; may still write what is in flight
    SPENT = auto()  # failed too often; only a new list revives it


class Cue(Enum):
    """What moves either of them."""

    OPEN = auto()
    CONNECTED = auto()
    CLOSE = auto()
    ENDED = auto()
    GIVE_UP = auto()
    REVIVE = auto()
    NO_UPSTREAM = auto()
    GOES_ON = auto()
    LAST_CHUNK = auto()
    STOP = auto()


LINK_TRANSITIONS: Mapping[Link, Mapping[Cue, Link]] = {
    Link.RESTING: {Cue.OPEN: Link.OPENING, Cue.GIVE_UP: Link.SPENT},
    Link.OPENING: {Cue.CONNECTED: Link.LIVE, Cue.CLOSE: Link.CLOSING, Cue.ENDED: Link.RESTING},
    Link.LIVE: {Cue.CLOSE: Link.CLOSING, Cue.ENDED: Link.RESTING},
    Link.CLOSING: {Cue.ENDED: Link.RESTING},
    Link.SPENT: {Cue.REVIVE: Link.RESTING},
}
PHASE_TRANSITIONS: Mapping[Phase, Mapping[Cue, Phase]] = {
    Phase.RUNNING: {
        Cue.NO_UPSTREAM: Phase.STALLED,
        Cue.LAST_CHUNK: Phase.COMPLETE,
        Cue.STOP: Phase.FAILED,
    },
    Phase.STALLED: {
        Cue.GOES_ON: Phase.RUNNING,
        Cue.LAST_CHUNK: Phase.COMPLETE,
        Cue.STOP: Phase.FAILED,
    },
    Phase.COMPLETE: {},
    Phase.FAILED: {},
}
OPEN = frozenset({Link.OPENING, Link.LIVE, Link.CLOSING})


@dataclass(slots=True, eq=False)
class Upstream:
    """One upstream of the list, and the present opening of it, if there is one."""

    spec: UpstreamSpec
    since: float
    """When hope in it began, or was last renewed: listed, opened, connected, announced something new."""

    rest_until: float
    """Not opened before."""

    link: int = 0
    """Number of the present or last opening."""

    state: Link = Link.RESTING
    announced: int = 0
    """Chunks that it holds, as bits in fetch order."""

    moved_at: float = 0.0
    """Its last byte, or when it was asked after having had nothing to do."""

    attempts: int = 0
    """Openings that ended since its last good chunk, or since it was listed."""

    corrupt: int = 0
    """Corrupt chunks in this opening."""

    owed: int = 0
    """Somebody worse took its place: so many new chunks must it announce before it is preferred again."""

    reason: str = "not connected yet"
    """Why it failed last."""

    @property
    def untried(self) -> bool:
        """Not open yet, and nothing speaks against it."""
        return self.attempts == 0 and self.state in (Link.RESTING, Link.OPENING)
