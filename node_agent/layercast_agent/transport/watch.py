"""Learns from a peer which chunks it holds: the reading side of PeerService.WatchResidency.

One thread and one channel a watch. gRPC's own exceptions end here; what the peer says is checked against the
manifest before anybody believes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc
from layercast.peer.v1alpha1 import peer_pb2, peer_pb2_grpc

from layercast_agent.errors import PeerError, PeerLostError, PeerRefusedError
from layercast_agent.layout import Manifest
from layercast_agent.regions import RegionRef
from layercast_agent.tls import Tls, sync_channel

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.enable_http_proxy", 0),  # peers are inside the cluster, whatever the environment says
    ("grpc.keepalive_time_ms", 10_000),  # notices a node that vanished without a word
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.enable_retries", 0),  # an upstream that fails is replaced, not retried behind our back
    ("grpc.use_local_subchannel_pool", 1),  # a new opening must not inherit the back-off of an old one
)

_REFUSALS = frozenset(
    {
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldSegment:
    """What a peer says of one segment."""

    region: RegionRef
    verified_chunks: bytes


class ResidencyWatch:
    """Follows one checkpoint at one peer until it is stopped or the peer ends it."""

    def __init__(
        self,
        *,
        address: str,
        manifest: Manifest,
        host_memory: bool = False,
        on_segments: Callable[[Mapping[int, HeldSegment]], None],
        on_end: Callable[[PeerError], None],
        tls: Tls | None = None,
    ) -> None:
        """Callbacks run in the watch's own thread; `on_end` once, as the last one, unless it was stopped.

        `host_memory` asks for the copy in the agent's host memory and no other.
        """
        self._host_memory = host_memory
        self._manifest = manifest
        self._on_segments = on_segments
        self._on_end = on_end
        self._stopped = threading.Event()
        self._channel = sync_channel(address, tls, options=CHANNEL_OPTIONS)
        # Not in the thread: gRPC's stubs crash the process on a channel that is closed meanwhile; a call is refused.
        self._stub = peer_pb2_grpc.PeerServiceStub(self._channel)
        self._thread = threading.Thread(target=self._run, name="residency-watch", daemon=True)

    def start(self) -> None:
        """Begin; the first message comes as soon as the peer is reached."""
        self._thread.start()

    def stop(self) -> None:
        """End the watch; never blocks for long and may be called from any thread, more than once."""
        self._stopped.set()
        self._channel.close()  # cancels the stream

    def join(self) -> None:
        """Wait until no callback can come any more; only after `stop`, from another thread."""
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._follow()
            error: PeerError = PeerLostError("the peer ended its residency stream")
        except PeerError as problem:
            error = problem
        except grpc.RpcError as problem:
            error = _peer_error(problem)
        except ValueError as problem:  # how gRPC says that the channel was closed meanwhile
            error = PeerLostError(str(problem))
        if not self._stopped.is_set():
            self._on_end(error)

    def _follow(self) -> None:
        request = peer_pb2.WatchResidencyRequest(digest=self._manifest.digest, host_memory=self._host_memory)
        for message in self._stub.WatchResidency(request):
            if self._stopped.is_set():
                return
            self._on_segments({item.segment: self._checked(item) for item in message.segments})

    def _checked(self, item: peer_pb2.SegmentResidency) -> HeldSegment:
        segments = self._manifest.segments
        if item.segment >= len(segments):
            raise PeerRefusedError(f"the peer speaks of segment {item.segment} of {len(segments)}")
        if item.region.size_bytes != segments[item.segment].nbytes:
            raise PeerRefusedError(
                f"the peer's segment {item.segment} has {item.region.size_bytes} bytes, "
                f"the manifest's {segments[item.segment].nbytes}"
            )
        region = RegionRef(
            region_id=item.region.region_id, epoch=item.region.epoch, nbytes=item.region.size_bytes
        )
        return HeldSegment(region=region, verified_chunks=item.verified_chunks)


def _peer_error(problem: grpc.RpcError) -> PeerError:
    if not isinstance(problem, grpc.Call):
        return PeerLostError(str(problem))
    code = problem.code()
    text = f"{code.name}: {problem.details()}"
    return PeerRefusedError(text) if code in _REFUSALS else PeerLostError(text)
