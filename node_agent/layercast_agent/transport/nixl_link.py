"""A link to a peer by one-sided reads: residency by gRPC as with tcp, bytes past the peer's processor.

Chunks are read into their staging memory, checked by this process and only then visible, as with every transport.
A peer that offers no one-sided reads is reached by tcp instead (`open_best`).

Threads: one opens and settles, one watches; the plane's own says when a read is over.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

import grpc
from layercast.peer.v1alpha1 import peer_pb2, peer_pb2_grpc

from layercast_agent import transfer_events as ev
from layercast_agent.errors import AgentError, PeerError, PeerLostError, PeerRefusedError, RegionFencedError
from layercast_agent.layout import Manifest
from layercast_agent.regions import Location, RegionRef, location_of
from layercast_agent.tls import Tls, sync_channel
from layercast_agent.transfer_events import Chunk
from layercast_agent.transport import ChunkLink, LinkRequest
from layercast_agent.transport.landing import Landing
from layercast_agent.transport.nixl import NixlPlane, RemoteRegions
from layercast_agent.transport.watch import CHANNEL_OPTIONS, HeldSegment, ResidencyWatch

QUEUE_MAX = 1024

_NOT_OFFERED = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED)

log = logging.getLogger(__name__)


def describe_peer(
    address: str, *, digest: str, tls: Tls | None, deadline_s: float
) -> peer_pb2.DescribeRegionsResponse | None:
    """How a peer's regions are read; None when it offers no one-sided reads. PeerLostError, PeerRefusedError."""
    with sync_channel(address, tls, options=CHANNEL_OPTIONS) as channel:
        try:
            request = peer_pb2.DescribeRegionsRequest(digest=digest)
            return peer_pb2_grpc.PeerServiceStub(channel).DescribeRegions(request, timeout=deadline_s)
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            if code in _NOT_OFFERED:
                return None
            kind = PeerRefusedError if code is grpc.StatusCode.NOT_FOUND else PeerLostError
            raise kind(f"{address} describes no regions: {error}") from error


class NixlLink:
    """One opening of a peer; see `ChunkLink`."""

    def __init__(
        self,
        request: LinkRequest,
        *,
        manifest: Manifest,
        landing: Landing,
        plane: NixlPlane,
        tls: Tls | None,
        connect_deadline_s: float,
        read_deadline_s: float,
        otherwise: Callable[[], ChunkLink] | None = None,
    ) -> None:
        """Starts at once; a chunk that is not there within `read_deadline_s` ends it.

        `otherwise` opens the link that is used when the peer offers no one-sided reads.
        """
        self._request = request
        self._manifest = manifest
        self._landing = landing
        self._plane = plane
        self._tls = tls
        self._connect_deadline_s = connect_deadline_s
        self._read_deadline_s = read_deadline_s
        self._otherwise = otherwise
        self._instead: ChunkLink | None = None
        self._regions: dict[int, RegionRef] = {}
        self._remote: RemoteRegions | None = None
        self._news: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUE_MAX)
        self._lock = threading.Lock()
        self._close_reason = ""
        self._connected = False
        self._done_bytes = 0
        self._watch: ResidencyWatch | None = None
        self._thread = threading.Thread(target=self._run, name="upstream", daemon=True)
        self._thread.start()

    @property
    def transport(self) -> str:
        """What is used instead where the peer offers no one-sided reads."""
        return self._instead.transport if self._instead is not None else "rdma"

    @property
    def received_bytes(self) -> int:
        """Bytes of chunks that are over; one-sided reads tell nothing before."""
        return self._instead.received_bytes if self._instead is not None else self._done_bytes

    def fetch(self, chunk: Chunk) -> None:
        """Queue one chunk for the link's thread."""
        if self._instead is not None:
            self._instead.fetch(chunk)
        else:
            self._news.put_nowait(lambda: self._read(chunk))

    def close(self, reason: str) -> None:
        """Wake the thread to its end."""
        with self._lock:
            self._close_reason = self._close_reason or reason
            instead = self._instead
        if instead is not None:
            instead.close(reason)
            return
        with contextlib.suppress(queue.Full):
            self._news.put_nowait(None)

    def _run(self) -> None:
        reason = "closed"
        try:
            description = describe_peer(
                self._request.upstream.address,
                digest=self._manifest.digest,
                tls=self._tls,
                deadline_s=self._connect_deadline_s,
            )
            if description is None and self._otherwise is not None:
                self._go_otherwise(self._otherwise)
                return
            if description is None:
                raise PeerRefusedError("the peer offers no one-sided reads")
            self._follow(description)
        except PeerError as error:
            reason = str(error)
        except Exception as error:  # the target's memory; another upstream would not help
            reason = f"{type(error).__name__}: {error}"
            self._request.post(ev.LocalFault(reason=reason))
        self._request.post(ev.UpstreamEnded(link=self._request.link, reason=self._close_reason or reason))

    def _go_otherwise(self, otherwise: Callable[[], ChunkLink]) -> None:
        log.info("the peer offers no one-sided reads", extra={"upstream": self._request.upstream.peer_id})
        with self._lock:
            self._instead = otherwise()
            closed = self._close_reason
        if closed:
            self._instead.close(closed)

    def _follow(self, description: peer_pb2.DescribeRegionsResponse) -> None:
        self._remote = self._plane.add_peer(description)
        self._watch = ResidencyWatch(
            address=self._request.upstream.address,
            tls=self._tls,
            manifest=self._manifest,
            on_segments=self._on_segments,
            on_end=lambda error: self.close(str(error)),
        )
        self._watch.start()
        try:
            while (news := self._news.get()) is not None and not self._close_reason:
                news()
        finally:
            self._plane.forget(self._remote.peer)  # from here on nothing is written any more
            self._watch.stop()
            self._watch.join()

    def _on_segments(self, segments: Mapping[int, HeldSegment]) -> None:
        with self._lock:
            self._regions.update({number: held.region for number, held in segments.items()})
        if not self._connected:
            self._connected = True
            self._request.post(ev.UpstreamConnected(link=self._request.link))
        bitmaps = {number: held.verified_chunks for number, held in segments.items()}
        self._request.post(ev.ChunksAnnounced(link=self._request.link, segments=bitmaps))

    def _read(self, chunk: Chunk) -> None:
        assert self._remote is not None
        offset, nbytes = self._landing.range_of(chunk)
        try:
            region = self._remote.find(self._regions[chunk.segment])
        except RegionFencedError as error:
            self._request.post(ev.FetchRefused(link=self._request.link, chunk=chunk, reason=str(error)))
            return
        source = replace(region, address=region.address + offset, nbytes=nbytes)
        staged = self._landing.staging(chunk)
        target: Location = location_of(staged)
        local = contextlib.ExitStack()
        local.enter_context(self._plane.registered(target))

        def done(error: AgentError | None) -> None:
            local.close()
            with contextlib.suppress(queue.Full):
                self._news.put_nowait(lambda: self._settle(chunk, staged, error))

        try:
            self._plane.read(self._remote, source, target, deadline_s=self._read_deadline_s, done=done)
        except PeerError:
            local.close()
            raise

    def _settle(self, chunk: Chunk, staged: memoryview, error: AgentError | None) -> None:
        if error is not None:
            raise error
        self._done_bytes += len(staged)
        if self._landing.settle(chunk, staged):
            self._request.post(ev.ChunkArrived(link=self._request.link, chunk=chunk))
        else:
            self._request.post(ev.ChunkCorrupt(link=self._request.link, chunk=chunk))
