"""What can happen to a transfer, what it can ask for, and its limits: the vocabulary of `transfer.py`.

A *link* is one opening of an upstream, with a number that is never used again, so that news of an opening
that is over cannot be taken for news of the present one.

The one rule that the two sides share: `UpstreamEnded` is the last event of a link, and it says that no byte
will be written into memory on its behalf any more. Until then its chunks in flight belong to it, closed or
not, and nobody else is asked for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamSpec:
    """Where chunks may come from: a peer, or with `local_folder` this node's own packed files."""

    peer_id: str
    """Replica id of a worker, node name of an agent, or any name for local files."""

    address: str = ""
    """host:port of its PeerService; unused for local files."""

    data_address: str = ""
    """host:port of its data plane; unused for local files."""

    local_folder: Path | None = None
    """Folder of a packed checkpoint on this node."""

    disk_bytes_per_s: int = 0
    """Most bytes read from the folder per second; 0 is as fast as the disk."""

    memory_socket: Path | None = None
    """Where this node's own agent hands out its host memory; its copies are then read without the network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One unit of transfer."""

    segment: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.segment}/{self.chunk}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferLimits:
    """Bounds of one transfer; times in seconds."""

    window_chunks: int = 8
    """Chunks in flight. Chunk x window of 8-32 MiB fills a hop at 2 Gbit/s without delaying the next hop."""

    stall_s: float = 1.0
    """How long a better upstream without news holds back a worse one that has what is missing."""

    progress_deadline_s: float = 5.0
    """An upstream that sends no byte of what it was asked for this long is given up."""

    chunk_deadline_s: float = 60.0
    """One chunk may take this long, however steadily it trickles."""

    open_deadline_s: float = 2.0
    """Connecting may take this long."""

    corrupt_max: int = 2
    """So many chunks that do not match, and a link is closed."""

    backoff_s: float = 0.25
    """Rest after the first failure; doubles with each until a good chunk arrives."""

    backoff_s_max: float = 5.0
    """Longest rest."""

    attempts_max: int = 20
    """Failures without a good chunk between, after which only a new list revives an upstream."""

    upstreams_max: int = 16
    """Of a longer list only the best are used: each costs a connection at both ends."""

    def __post_init__(self) -> None:
        """ValueError for a bound that would make no progress possible."""
        if min(self.window_chunks, self.corrupt_max, self.attempts_max, self.upstreams_max) < 1:
            raise ValueError("window, corrupt, attempts and upstreams must be at least 1")


# --- events ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamsReplaced:
    """The operator gave another list, best first; an old or equal generation changes nothing."""

    upstreams: tuple[UpstreamSpec, ...]
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamConnected:
    """Both ends know each other; chunks that it announces can be fetched."""

    link: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunksAnnounced:
    """What the upstream holds now of some segments: bitmaps, least significant bit first."""

    link: int
    segments: Mapping[int, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class BytesReceived:
    """Bytes came in since this was last said, though perhaps no whole chunk."""

    link: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkArrived:
    """A chunk is in memory, equal to the manifest's checksum; with `whole_segment`, so is the rest of its segment."""

    link: int
    chunk: Chunk
    whole_segment: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkCorrupt:
    """A chunk came and did not match; what memory holds there is worth nothing."""

    link: int
    chunk: Chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRefused:
    """The upstream answered no to one chunk: fenced, being released."""

    link: int
    chunk: Chunk
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamEnded:
    """The link is over, by itself or as asked; nothing is written for it any more."""

    link: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferCancelled:
    """The target is not wanted any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFault:
    """This side failed (its memory, its callbacks): no upstream can help."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    """Nothing happened but time."""


Event = (
    UpstreamsReplaced
    | UpstreamConnected
    | ChunksAnnounced
    | BytesReceived
    | ChunkArrived
    | ChunkCorrupt
    | FetchRefused
    | UpstreamEnded
    | TransferCancelled
    | LocalFault
    | Ticked
)

# --- instructions ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenUpstream:
    """Connect and learn what it holds."""

    link: int
    upstream: UpstreamSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseUpstream:
    """Stop writing for this link, then say `UpstreamEnded`."""

    link: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchChunk:
    """Ask for one chunk; answers come in any order."""

    link: int
    chunk: Chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkVerified:
    """Said once a chunk: tell everybody that it can be read here."""

    chunk: Chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentComplete:
    """Said once a segment, after its last chunk: it may be executed."""

    segment: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamFailed:
    """For the record: why a link was given up."""

    upstream: UpstreamSpec
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferStalled:
    """No upstream can continue it; new ones are needed. What has arrived stays."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferResumed:
    """It goes on after a stall."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferComplete:
    """Every chunk is verified. Links that are open close after this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferFailed:
    """Cancelled or broken on this side, and all links are over: memory is quiet."""

    reason: str


Instruction = (
    OpenUpstream
    | CloseUpstream
    | FetchChunk
    | ChunkVerified
    | SegmentComplete
    | UpstreamFailed
    | TransferStalled
    | TransferResumed
    | TransferComplete
    | TransferFailed
)
