"""Carries out one parameter transfer: threads and sockets around the machine of `transfer.py`.

`TransferDriver` turns instructions into calls and has no thread or clock of its own, so that simulations run
it in virtual time. `TransferRunner` gives it one thread, which alone touches the machine; links post events
to its mailbox from theirs.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from layercast_agent import transfer_events as ev
from layercast_agent.errors import NoCapacityError
from layercast_agent.layout import Manifest
from layercast_agent.read_bytes import ReadBytes
from layercast_agent.regions import WritableMemory
from layercast_agent.residency import Residency
from layercast_agent.tls import Tls
from layercast_agent.transfer import Transfer
from layercast_agent.transfer_events import Event, TransferLimits, UpstreamSpec
from layercast_agent.transfer_states import Phase
from layercast_agent.transport import ChunkLink, LinkRequest, OpenLink, Post
from layercast_agent.transport.landing import Landing
from layercast_agent.transport.nixl import NixlPlane
from layercast_agent.transport.tcp_link import open_link

__all__ = [
    "TransferDriver",
    "TransferLimits",
    "TransferOutcome",
    "TransferRunner",
    "TransferStatus",
    "UpstreamSpec",
]

TICK_S = 0.1  # grain of all deadlines of a transfer
MAILBOX_MAX = 4096
FAILURES_MAX = 32  # remembered for status, oldest forgotten first

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferOutcome:
    """How a transfer ended."""

    transfer_id: str
    complete: bool
    reason: str
    """Empty when complete; else "cancelled", or what went wrong on this side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferStatus:
    """What a transfer is at the moment; as `Transfer` of agent.proto."""

    transfer_id: str
    generation: int
    upstream: str
    done_bytes: int
    total_bytes: int
    bytes_per_s: int
    failures: tuple[str, ...]
    stalled: bool
    complete: bool
    stall_reason: str


class TransferDriver:
    """Turns instructions into calls. Not thread-safe: one caller of `handle` at a time."""

    def __init__(
        self,
        *,
        transfer_id: str,
        machine: Transfer,
        residency: Residency,
        open_link: OpenLink,
        post: Post,
        on_segment: Callable[[int], None],
        on_end: Callable[[TransferOutcome], None],
        on_arrival: Callable[[str, ev.ChunkArrived], None] = lambda transport, event: None,
    ) -> None:
        """`post` brings an event back to `handle`, later and from outside of it."""
        self._on_arrival = on_arrival
        self.machine = machine
        self.failures: deque[str] = deque(maxlen=FAILURES_MAX)
        self.stall_reason = ""
        self._transfer_id = transfer_id
        self._residency = residency
        self._open_link = open_link
        self._post = post
        self._on_segment = on_segment
        self._on_end = on_end
        self._links: dict[int, ChunkLink] = {}
        self._pending: deque[Event] = (
            deque()
        )  # drained by each `handle`; a failed instruction adds at most two
        self._told_bytes: dict[int, int] = {}  # received bytes of each link when it last told of progress

    def handle(self, event: Event, now: float) -> None:
        """Take one event and carry out what follows from it. A callback that raises fails the transfer."""
        self._pending.append(event)
        while self._pending:
            self._take(self._pending.popleft(), now)

    def _take(self, event: Event, now: float) -> None:
        match event:
            case ev.Ticked():
                for moved in self._progress():
                    self._carry_out(self.machine.receive(moved, now))
            case ev.UpstreamEnded(link=number):
                self._links.pop(number, None)
                self._told_bytes.pop(number, None)
            case ev.ChunkArrived(link=number) if number in self._links:
                self._on_arrival(self._links[number].transport, event)
            case ev.ChunkCorrupt(link=number, chunk=chunk):
                self._log(logging.WARNING, "corrupt chunk refused", link=number, chunk=str(chunk))
        self._carry_out(self.machine.receive(event, now))

    def _progress(self) -> list[Event]:
        moved: list[Event] = []
        for number, link in self._links.items():
            received = link.received_bytes
            if received != self._told_bytes.get(number, 0):
                self._told_bytes[number] = received
                moved.append(ev.BytesReceived(link=number))
        return moved

    def _carry_out(self, instructions: list[ev.Instruction]) -> None:
        for instruction in instructions:
            try:
                self._obey(instruction)
            except (
                Exception
            ) as error:  # memory, threads or a callback: this side's fault, but still end in order
                log.exception("transfer broken on this side", extra={"transfer_id": self._transfer_id})
                reason = f"{type(error).__name__}: {error}"
                self._pending.append(ev.LocalFault(reason=reason))
                if isinstance(instruction, ev.OpenUpstream):
                    self._pending.append(ev.UpstreamEnded(link=instruction.link, reason=reason))

    def _obey(self, instruction: ev.Instruction) -> None:
        match instruction:
            case ev.ChunkVerified(chunk=chunk):
                self._residency.mark(chunk.segment, chunk.chunk)
            case ev.FetchChunk(link=number, chunk=chunk):
                self._links[number].fetch(chunk)
            case ev.OpenUpstream(link=number, upstream=upstream):
                request = LinkRequest(link=number, upstream=upstream, post=self._post)
                self._links[number] = self._open_link(request)
            case ev.CloseUpstream(link=number, reason=reason):
                if number in self._links:
                    self._links[number].close(reason)
            case ev.SegmentComplete(segment=segment):
                self._on_segment(segment)
            case _:
                self._tell(instruction)

    def _tell(self, instruction: ev.Instruction) -> None:
        match instruction:
            case ev.UpstreamFailed(upstream=upstream, reason=reason):
                failure = f"{upstream.peer_id}: {reason}"
                if failure not in self.failures:  # one that is tried again and again is told once
                    self.failures.append(failure)
                self._log(logging.WARNING, "upstream failed", upstream=upstream.peer_id, reason=reason)
            case ev.TransferStalled(reason=reason):
                self.stall_reason = reason
                self._log(logging.WARNING, "transfer stalled", reason=reason)
            case ev.TransferResumed():
                self.stall_reason = ""
                self._log(logging.INFO, "transfer goes on")
            case ev.TransferComplete():
                self.stall_reason = ""
                self._log(logging.INFO, "transfer complete")
                self._on_end(TransferOutcome(transfer_id=self._transfer_id, complete=True, reason=""))
            case ev.TransferFailed(reason=reason):
                self._log(logging.INFO, "transfer ended", reason=reason)
                self._on_end(TransferOutcome(transfer_id=self._transfer_id, complete=False, reason=reason))

    def _log(self, level: int, sentence: str, **fields: object) -> None:
        log.log(level, sentence, extra={"transfer_id": self._transfer_id, **fields})


class Mailbox:
    """A bounded queue of events between threads; posting to a closed one does nothing."""

    def __init__(self, size: int) -> None:
        self._events: deque[Event] = deque()
        self._size = size
        self._closed = False
        self._changed = threading.Condition()

    def post(self, event: Event) -> None:
        """Append; waits for room, which the reader makes or `close` makes unnecessary."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._events) < self._size or self._closed)
            if not self._closed:
                self._events.append(event)
                self._changed.notify_all()

    def take(self, timeout_s: float) -> Event | None:
        """The oldest event, or None when none came in time."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._events), timeout=timeout_s)
            if not self._events:
                return None
            self._changed.notify_all()
            return self._events.popleft()

    def close(self) -> None:
        """Drop what is left and all that still comes."""
        with self._changed:
            self._closed = True
            self._events.clear()
            self._changed.notify_all()


class TransferRunner:
    """One transfer with its thread. All methods are thread-safe; `cancel` is not for its own callbacks."""

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
        limits: TransferLimits | None = None,
        tls: Tls | None = None,
        plane: NixlPlane | None = None,
        read_bytes: ReadBytes | None = None,
    ) -> None:
        """Continues from what `residency` has; nothing happens before `start`.

        `on_segment(index)` once for each segment that this transfer completes, `on_end` once; both from the
        runner's thread, and should they raise, the transfer fails. ValueError: sizes or order do not fit.
        """
        limits = limits or TransferLimits()
        self._transfer_id = transfer_id
        self._manifest, self._limits = manifest, limits
        self._read_bytes = read_bytes or ReadBytes()
        self._residency = residency
        self._held_bytes = residency.done_bytes
        self._mailbox = Mailbox(MAILBOX_MAX)
        self._started_at = time.monotonic()
        self._ended_at: float | None = None
        self._on_end = on_end
        machine = Transfer(
            chunk_counts=[manifest.chunk_count(segment.index) for segment in manifest.segments],
            segment_order=segment_order,
            held=residency.snapshot()[1],
            upstreams=upstreams,
            generation=generation,
            now=self._started_at,
            limits=limits,
        )
        self._driver = TransferDriver(
            transfer_id=transfer_id,
            machine=machine,
            residency=residency,
            open_link=self._links_into(memories, token=token, tls=tls, plane=plane),
            post=self._mailbox.post,
            on_segment=on_segment,
            on_end=self._end,
            on_arrival=self._count,
        )
        self._thread = threading.Thread(target=self._run, name="transfer", daemon=True)

    def _links_into(
        self, memories: Sequence[WritableMemory], *, token: bytes, tls: Tls | None, plane: NixlPlane | None
    ) -> OpenLink:
        return functools.partial(
            open_link,
            manifest=self._manifest,
            landing=Landing(manifest=self._manifest, memories=memories),
            token=token,
            connect_deadline_s=self._limits.open_deadline_s,
            tls=tls,
            plane=plane,
            read_deadline_s=self._limits.progress_deadline_s,
        )

    def start(self) -> None:
        """Begin; returns at once."""
        self._started_at = time.monotonic()
        self._thread.start()

    def replace_upstreams(self, upstreams: Sequence[UpstreamSpec], generation: int) -> None:
        """Another list, best first; what has arrived stays. An old or equal generation changes nothing."""
        self._mailbox.post(ev.UpstreamsReplaced(upstreams=tuple(upstreams), generation=generation))

    def cancel(self, deadline_s: float) -> None:
        """Stop; after it returned no byte is written into the memories and no callback comes any more.

        Raises:
            NoCapacityError: a link did not stop within `deadline_s`. The memories must not be reused yet;
                call again.
        """
        self._mailbox.post(ev.TransferCancelled())
        if self._thread.ident is not None:
            self._thread.join(deadline_s)
        if self._thread.is_alive():
            raise NoCapacityError(f"transfer {self._transfer_id} has not stopped within {deadline_s:g} s")

    def status(self) -> TransferStatus:
        """A moment's picture."""
        machine, stall_reason = self._driver.machine, self._driver.stall_reason
        done_bytes = self._residency.done_bytes
        elapsed_s = (self._ended_at or time.monotonic()) - self._started_at
        return TransferStatus(
            transfer_id=self._transfer_id,
            generation=machine.generation,
            upstream=machine.upstream,
            done_bytes=done_bytes,
            total_bytes=self._manifest.nbytes,
            bytes_per_s=int((done_bytes - self._held_bytes) / elapsed_s) if elapsed_s > 0 else 0,
            failures=tuple(self._driver.failures.copy()),
            stalled=bool(stall_reason),
            complete=machine.phase is Phase.COMPLETE,
            stall_reason=stall_reason,
        )

    def _run(self) -> None:
        driver = self._driver
        driver.handle(ev.Ticked(), time.monotonic())
        ticked_at = time.monotonic()
        while not driver.machine.finished:
            event = self._mailbox.take(max(0.0, ticked_at + TICK_S - time.monotonic()))
            now = time.monotonic()
            if event is not None:
                driver.handle(event, now)
            if now - ticked_at >= TICK_S:
                ticked_at = now
                driver.handle(ev.Ticked(), now)
        self._mailbox.close()

    def _count(self, transport: str, event: ev.ChunkArrived) -> None:
        segment = event.chunk.segment
        _, nbytes = self._manifest.chunk_range(segment, event.chunk.chunk)
        whole = self._manifest.segments[segment].nbytes
        self._read_bytes.add(transport, whole if event.whole_segment else nbytes)

    def _end(self, outcome: TransferOutcome) -> None:
        self._ended_at = time.monotonic()
        self._on_end(outcome)
