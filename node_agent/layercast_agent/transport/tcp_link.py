"""A link to a peer: residency by gRPC, chunks by pipelined reads on two TCP connections.

One stream is one core of each end, so there are two, and a chunk is asked of the one that has less to do. A chunk is
one call into the kernel and one crc32 (in smaller pieces, waking the interpreter costs more than a warm cache saves).

Threads: one a stream connects it and receives straight into the target's memory; the watch tells what the peer
holds, and connects meanwhile. `fetch` only writes small frames, so the transfer's own thread
never waits for the network.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from layercast_agent import transfer_events as ev
from layercast_agent.errors import PeerError, PeerLostError
from layercast_agent.layout import Manifest
from layercast_agent.regions import RegionRef
from layercast_agent.tls import Tls
from layercast_agent.transfer_events import Chunk
from layercast_agent.transport import ChunkLink, LinkRequest, tcp, wire
from layercast_agent.transport.disk import DiskLink
from layercast_agent.transport.landing import Landing
from layercast_agent.transport.nixl_link import NixlLink
from layercast_agent.transport.secure import Stream
from layercast_agent.transport.shm_link import ShmLink
from layercast_agent.transport.watch import HeldSegment, ResidencyWatch
from layercast_agent.transport.wire import Deadline, ReadRequest, ResponseHeader, Status

if TYPE_CHECKING:
    from layercast_agent.transport.nixl import NixlPlane

PROGRESS_S = 0.25  # a receive that is not done by then tells how far it came
STREAMS = 2


@dataclass(slots=True, kw_only=True)
class _Stream:
    """One connection, and what was asked of it in order: (request id, chunk)."""

    socket: Stream
    outstanding: deque[tuple[int, Chunk]] = field(default_factory=deque)  # bounded by the window
    received_bytes: int = 0


class TcpLink:
    """One opening of a peer; see `ChunkLink`."""

    transport = "tcp"

    def __init__(
        self,
        request: LinkRequest,
        *,
        manifest: Manifest,
        landing: Landing,
        token: bytes,
        connect_deadline_s: float,
        tls: Tls | None = None,
    ) -> None:
        """Starts at once."""
        self._tls = tls
        self._request = request
        self._landing = landing
        self._token = token
        self._connect_deadline_s = connect_deadline_s
        self._lock = threading.Lock()
        self._regions: dict[int, RegionRef] = {}
        self._streams: list[_Stream] = []
        self._next_request_id = 0
        self._close_reason = ""
        self._connected = False
        self._opened = 0  # streams
        self._settled = threading.Event()  # the streams are open, or will never be
        self._watch = ResidencyWatch(
            address=request.upstream.address,
            tls=tls,
            manifest=manifest,
            on_segments=self._on_segments,
            on_end=lambda error: self.close(str(error)),
        )
        self._thread = threading.Thread(target=self._run, name="upstream", daemon=True)
        self._thread.start()

    @property
    def received_bytes(self) -> int:
        """Bytes that came in so far, over all streams."""
        with self._lock:
            return sum(stream.received_bytes for stream in self._streams)

    def fetch(self, chunk: Chunk) -> None:
        """Send the request; a connection that fails here also ends in its receiving thread."""
        offset, nbytes = self._landing.range_of(chunk)
        with self._lock:
            region = self._regions[chunk.segment]
            stream = min(self._streams, key=lambda stream: len(stream.outstanding))
            self._next_request_id = (self._next_request_id + 1) % 2**32
            stream.outstanding.append((self._next_request_id, chunk))
            frame = ReadRequest(
                request_id=self._next_request_id,
                region_id=region.region_id,
                epoch=region.epoch,
                offset=offset,
                nbytes=nbytes,
            ).pack()
            with contextlib.suppress(OSError):
                stream.socket.sendall(frame)

    def close(self, reason: str) -> None:
        """Wake all threads; the first one says `UpstreamEnded` when all have stopped."""
        with self._lock:
            self._close_reason = self._close_reason or reason
            for stream in self._streams:
                with contextlib.suppress(OSError):
                    stream.socket.shutdown(socket.SHUT_RDWR)
        self._settled.set()
        self._watch.stop()

    def _run(self) -> None:
        others: list[threading.Thread] = []
        with self._ending():
            self._watch.start()
            for _ in range(STREAMS - 1):
                other = threading.Thread(target=self._serve_stream, name="upstream", daemon=True)
                other.start()
                others.append(other)
            self._serve_stream()
        for thread in others:
            thread.join()
        self._watch.join()
        with self._lock:
            for stream in self._streams:
                stream.socket.close()
            reason = self._close_reason
        self._request.post(ev.UpstreamEnded(link=self._request.link, reason=reason))

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """Whatever ends the block ends the whole link; the first reason is the one that is told."""
        reason = "closed"
        try:
            yield
        except PeerError as error:
            reason = str(error)
        except OSError as error:
            reason = f"connection lost: {error.strerror or error}"
        except Exception as error:  # the target's memory; another upstream would not help
            reason = f"{type(error).__name__}: {error}"
            self._request.post(ev.LocalFault(reason=reason))
        finally:
            self.close(reason)

    def _serve_stream(self) -> None:
        with self._ending():
            stream = self._open_stream()
            with self._lock:
                self._opened += 1
                last = self._opened == STREAMS
            if last:
                self._settled.set()
            while True:
                self._receive_answer(stream)

    def _open_stream(self) -> _Stream:
        address = self._request.upstream.data_address
        sock = tcp.new_socket(address)
        stream = _Stream(socket=sock)
        with self._lock:
            self._streams.append(stream)  # from here on `close` interrupts whatever it does
        self._check_open()
        deadline = Deadline(self._connect_deadline_s)
        connected = tcp.connect(sock, address, token=self._token, deadline=deadline, tls=self._tls)
        with self._lock:
            stream.socket = connected
        connected.settimeout(None)  # the transfer watches progress and closes what does not move
        wire.receive_in_turns(connected, PROGRESS_S)
        self._check_open()
        return stream

    def _check_open(self) -> None:
        with self._lock:
            if self._close_reason:
                raise PeerLostError(self._close_reason)

    def _on_segments(self, segments: Mapping[int, HeldSegment]) -> None:
        self._settled.wait()  # whatever ends the link ends this too
        with self._lock:
            if self._close_reason:
                return
            self._regions.update({number: held.region for number, held in segments.items()})
        if not self._connected:
            self._connected = True
            self._request.post(ev.UpstreamConnected(link=self._request.link))
        bitmaps = {number: held.verified_chunks for number, held in segments.items()}
        self._request.post(ev.ChunksAnnounced(link=self._request.link, segments=bitmaps))

    def _receive_answer(self, stream: _Stream) -> None:
        frame = bytearray(wire.RESPONSE_BYTES)
        self._fill(stream, memoryview(frame))
        header = ResponseHeader.unpack(frame)
        with self._lock:
            request_id, chunk = stream.outstanding[0] if stream.outstanding else (-1, None)
        if chunk is None or header.request_id != request_id:
            raise PeerLostError("the peer answered something that was not asked")
        if header.status is not Status.OK:
            text = bytearray(header.nbytes)
            self._fill(stream, memoryview(text))
            answer: ev.Event = ev.FetchRefused(
                link=self._request.link, chunk=chunk, reason=str(tcp.refusal(header, text))
            )
        else:
            answer = self._receive_chunk(stream, chunk, header.nbytes)
        with self._lock:
            stream.outstanding.popleft()
        self._request.post(answer)

    def _receive_chunk(self, stream: _Stream, chunk: Chunk, nbytes: int) -> ev.Event:
        staged = self._landing.staging(chunk)
        if nbytes != len(staged):
            raise PeerLostError(f"the peer answered {nbytes} bytes for {chunk}")
        self._fill(stream, staged)
        link = self._request.link
        if self._landing.settle(chunk, staged):
            return ev.ChunkArrived(link=link, chunk=chunk)
        return ev.ChunkCorrupt(link=link, chunk=chunk)

    def _fill(self, stream: _Stream, view: memoryview) -> None:
        """Fill `view` from the stream, telling how far it is."""
        done = 0
        while done < len(view):
            self._check_open()
            count = wire.receive_turn(stream.socket, view[done:])
            done += count
            stream.received_bytes += count


def open_link(
    request: LinkRequest,
    *,
    manifest: Manifest,
    landing: Landing,
    token: bytes,
    connect_deadline_s: float,
    tls: Tls | None = None,
    plane: NixlPlane | None = None,
    read_deadline_s: float = 5.0,
) -> ChunkLink:
    """A link to whatever the upstream is: this node's files, this node's host memory, or a peer."""
    if request.upstream.memory_socket is not None:
        return ShmLink(
            request,
            manifest=manifest,
            landing=landing,
            path=request.upstream.memory_socket,
            token=token,
            connect_deadline_s=connect_deadline_s,
            tls=tls,
        )
    if request.upstream.local_folder is not None:
        return DiskLink(request, manifest=manifest, landing=landing, folder=request.upstream.local_folder)
    by_tcp = functools.partial(
        TcpLink,
        request,
        manifest=manifest,
        landing=landing,
        token=token,
        connect_deadline_s=connect_deadline_s,
        tls=tls,
    )
    if plane is None:
        return by_tcp()
    return NixlLink(
        request,
        manifest=manifest,
        landing=landing,
        plane=plane,
        tls=tls,
        connect_deadline_s=connect_deadline_s,
        read_deadline_s=read_deadline_s,
        otherwise=by_tcp,
    )
