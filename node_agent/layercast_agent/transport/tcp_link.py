"""A link to a peer: residency by gRPC, chunks by pipelined reads on one TCP connection.

Two threads: this one connects, then receives chunks straight into the target's memory; the watch tells what
the peer holds. `fetch` only writes a small frame, so the transfer's own thread never waits for the network.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Mapping

from layercast_agent import transfer_events as ev
from layercast_agent.errors import PeerError, PeerLostError
from layercast_agent.layout import Manifest
from layercast_agent.regions import RegionRef
from layercast_agent.transfer_events import Chunk
from layercast_agent.transport import ChunkLink, LinkRequest, tcp, wire
from layercast_agent.transport.landing import Landing
from layercast_agent.transport.watch import HeldSegment, ResidencyWatch
from layercast_agent.transport.wire import Deadline, ReadRequest, ResponseHeader, Status

RECEIVE_BYTES = 256 * 1024  # progress is told, and an end noticed, at this grain


class TcpLink:
    """One opening of a peer; see `ChunkLink`."""

    def __init__(
        self,
        request: LinkRequest,
        *,
        manifest: Manifest,
        landing: Landing,
        token: bytes,
        connect_deadline_s: float,
    ) -> None:
        """Starts at once."""
        self._request = request
        self._landing = landing
        self._token = token
        self._connect_deadline_s = connect_deadline_s
        self._lock = threading.Lock()
        self._regions: dict[int, RegionRef] = {}
        self._outstanding: deque[tuple[int, Chunk]] = deque()  # bounded by the transfer's window
        self._next_request_id = 0
        self._close_reason = ""
        self._connected = False
        self.received_bytes = 0
        self._socket: socket.socket | None = None
        self._watch = ResidencyWatch(
            address=request.upstream.address,
            manifest=manifest,
            on_segments=self._on_segments,
            on_end=lambda error: self.close(str(error)),
        )
        self._thread = threading.Thread(target=self._run, name="upstream", daemon=True)
        self._thread.start()

    def fetch(self, chunk: Chunk) -> None:
        """Send one request; a connection that fails here also ends in the receiving thread."""
        offset, nbytes = self._landing.range_of(chunk)
        with self._lock:
            region = self._regions[chunk.segment]
            self._next_request_id = (self._next_request_id + 1) % 2**32
            self._outstanding.append((self._next_request_id, chunk))
            frame = ReadRequest(
                request_id=self._next_request_id,
                region_id=region.region_id,
                epoch=region.epoch,
                offset=offset,
                nbytes=nbytes,
            ).pack()
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.sendall(frame)

    def close(self, reason: str) -> None:
        """Wake both threads; the receiving one says `UpstreamEnded` when it has stopped."""
        with self._lock:
            self._close_reason = self._close_reason or reason
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
        self._watch.stop()

    def _run(self) -> None:
        reason = "closed"
        try:
            sock = self._open_socket()
            self._watch.start()
            while True:
                self._receive_answer(sock)
        except PeerError as error:
            reason = str(error)
        except OSError as error:
            reason = f"connection lost: {error.strerror or error}"
        except Exception as error:  # the target's memory; another upstream would not help
            reason = f"{type(error).__name__}: {error}"
            self._request.post(ev.LocalFault(reason=reason))
        finally:
            self._watch.stop()
            self._watch.join()
            with self._lock:
                if self._socket is not None:
                    self._socket.close()
                    self._socket = None
            self._request.post(ev.UpstreamEnded(link=self._request.link, reason=self._close_reason or reason))

    def _open_socket(self) -> socket.socket:
        address = self._request.upstream.data_address
        sock = tcp.new_socket(address)
        with self._lock:
            self._socket = sock  # from here on `close` interrupts whatever happens with it
        self._check_open()
        tcp.connect(sock, address, token=self._token, deadline=Deadline(self._connect_deadline_s))
        sock.settimeout(None)  # the transfer watches progress and closes what does not move
        self._check_open()
        return sock

    def _check_open(self) -> None:
        with self._lock:
            if self._close_reason:
                raise PeerLostError(self._close_reason)

    def _on_segments(self, segments: Mapping[int, HeldSegment]) -> None:
        with self._lock:
            self._regions.update({number: held.region for number, held in segments.items()})
        if not self._connected:
            self._connected = True
            self._request.post(ev.UpstreamConnected(link=self._request.link))
        bitmaps = {number: held.verified_chunks for number, held in segments.items()}
        self._request.post(ev.ChunksAnnounced(link=self._request.link, segments=bitmaps))

    def _receive_answer(self, sock: socket.socket) -> None:
        header = ResponseHeader.unpack(wire.receive_bytes(sock, wire.RESPONSE_BYTES))
        with self._lock:
            request_id, chunk = self._outstanding.popleft() if self._outstanding else (-1, None)
        if chunk is None or header.request_id != request_id:
            raise PeerLostError("the peer answered something that was not asked")
        link = self._request.link
        if header.status is not Status.OK:
            reason = tcp.refusal(header, wire.receive_bytes(sock, header.nbytes))
            self._request.post(ev.FetchRefused(link=link, chunk=chunk, reason=str(reason)))
            return
        staged = self._landing.staging(chunk)
        if header.nbytes != len(staged):
            raise PeerLostError(f"the peer answered {header.nbytes} bytes for chunk {chunk}")
        for start in range(0, len(staged), RECEIVE_BYTES):
            self._check_open()
            part = staged[start : start + RECEIVE_BYTES]
            wire.receive_exactly(sock, part)
            self.received_bytes += len(part)
        if self._landing.settle(chunk, staged):
            self._request.post(ev.ChunkArrived(link=link, chunk=chunk))
        else:
            self._request.post(ev.ChunkCorrupt(link=link, chunk=chunk))


def open_link(
    request: LinkRequest, *, manifest: Manifest, landing: Landing, token: bytes, connect_deadline_s: float
) -> ChunkLink:
    """A link to whatever the upstream is: this node's files, or a peer."""
    if request.upstream.local_folder is not None:
        from layercast_agent.transport.disk import DiskLink

        return DiskLink(request, manifest=manifest, landing=landing, folder=request.upstream.local_folder)
    return TcpLink(
        request, manifest=manifest, landing=landing, token=token, connect_deadline_s=connect_deadline_s
    )
