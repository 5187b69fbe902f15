"""Errors of the agent and its workers: whose fault, and whether to try again.

AgentError
├── RequestError            the client's fault; replaying elsewhere would not help
│   └── RequestTooLongError
├── CheckpointError         the checkpoint's fault; names file, tensor and offset
│   └── UnsupportedArchitectureError
├── DeviceMemoryError       the device is too small for what was asked of it
├── PeerError               a peer's fault; another upstream may do
│   ├── PeerLostError
│   ├── PeerRefusedError
│   └── CorruptChunkError
├── RegionFencedError       the reader is late: the region was freed or replaced
└── NoCapacityError         nothing is wrong; there is no room now, try again

Exceptions of libraries end at the adapter that calls the library.
"""

from __future__ import annotations

from pathlib import Path


class AgentError(Exception):
    """Base of all; its text is a sentence for an operator's eyes."""


class RequestError(AgentError):
    """The request itself cannot be served."""


class RequestTooLongError(RequestError):
    """Prompt and output do not fit the context length or the KV cache."""


class CheckpointError(AgentError):
    """A checkpoint cannot be used.

    `file`, `tensor` and `offset_bytes` say where; each is part of the text too.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: Path | str | None = None,
        tensor: str | None = None,
        offset_bytes: int | None = None,
    ) -> None:
        where = [
            f"file {file}" if file is not None else "",
            f"tensor {tensor}" if tensor is not None else "",
            f"offset {offset_bytes}" if offset_bytes is not None else "",
        ]
        place = ", ".join(part for part in where if part)
        super().__init__(f"{problem} ({place})" if place else problem)
        self.file = file
        self.tensor = tensor
        self.offset_bytes = offset_bytes


class UnsupportedArchitectureError(CheckpointError):
    """The model's architecture is not one that the engine can run; the text names it."""


class DeviceMemoryError(AgentError):
    """Parameters and KV cache do not fit the device; the text gives both sums."""


class PeerError(AgentError):
    """A peer did not do its part."""


class PeerLostError(PeerError):
    """The peer died, stopped or cannot be reached within the deadline."""


class PeerRefusedError(PeerError):
    """The peer answered no: not held there, wrong token, being released."""


class CorruptChunkError(PeerError):
    """Bytes that arrived do not match the manifest's checksum."""


class RegionFencedError(AgentError):
    """The region named by (id, epoch) is not readable any more, or the range is outside it."""


class NoCapacityError(AgentError):
    """No room now: no idle worker, no free pages, queue full."""
