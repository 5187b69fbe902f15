"""The pull protocol of one parameter transfer: events in, instructions out, no I/O.

A target fetches chunks from upstreams, given best first. This file decides which chunk is asked of whom and
when an upstream is given up; it has no sockets, threads or clock. `runner.py` carries out what it says,
`transfer_events.py` is the vocabulary, `transfer_states.py` the table of transitions.

* Every upstream of the list is opened, so that a substitute is known before it is needed. Chunks are asked
  of one at a time, the *active* one: the best that holds something which is missing here. In a chain that is
  the predecessor, which is itself still loading; when it announces nothing for `stall_s`, another that has
  more takes its place, until the better one has announced a window of new chunks. (It need not be ahead of
  us to be preferred again: two targets that feed from one holder halve its egress, and stay a star for ever.)
* Chunks are asked for in the fetch order, skipping what the active upstream has not announced. At most
  `window_chunks` are in flight, over all links together.
* An upstream that dies, refuses, is corrupt `corrupt_max` times or sends no byte for `progress_deadline_s`
  is closed. It is tried again after a back-off, `attempts_max` times without a good chunk between.
* When nobody can continue, the transfer is stalled: it says why, keeps its bitmap and waits.

Chunks are bits of Python integers, in fetch order: bit 0 is fetched first. So "the next chunk to ask for" is
the lowest bit of missing & ~in flight & announced.

Invariants:
  a chunk is verified once; while in flight it belongs to one link, until that link's `UpstreamEnded`;
  chunks in flight <= window_chunks; nothing is asked of a link that has not announced it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from layercast_agent import transfer_events as ev
from layercast_agent.transfer_events import Chunk, TransferLimits, UpstreamSpec
from layercast_agent.transfer_states import (
    LINK_TRANSITIONS,
    OPEN,
    PHASE_TRANSITIONS,
    Cue,
    Link,
    Phase,
    Upstream,
)


@dataclass(slots=True)
class _Request:
    upstream: Upstream
    asked_at: float


class Transfer:
    """One transfer. `receive` takes an event and the time, and returns what to do, in order."""

    def __init__(
        self,
        *,
        chunk_counts: Sequence[int],
        segment_order: Sequence[int] = (),
        held: Mapping[int, bytes] | None = None,
        upstreams: Sequence[UpstreamSpec],
        generation: int,
        now: float,
        limits: TransferLimits | None = None,
    ) -> None:
        """`chunk_counts[s]` chunks in segment s; `held` maps segments to bitmaps of what is verified already.

        Segments that `segment_order` leaves out follow in the manifest's order. Nothing happens before the
        first event (`Ticked` will do). ValueError: the order names a segment twice or one that is not there.
        """
        order = [*segment_order, *(s for s in range(len(chunk_counts)) if s not in set(segment_order))]
        if sorted(order) != list(range(len(chunk_counts))):
            raise ValueError(f"segment order {list(segment_order)} does not fit {len(chunk_counts)} segments")
        self._chunks = [Chunk(segment=s, chunk=c) for s in order for c in range(chunk_counts[s])]
        self._positions = {chunk: position for position, chunk in enumerate(self._chunks)}
        self._masks: dict[int, tuple[int, int]] = {}  # segment -> (first position, all its bits)
        base = 0
        for segment in order:
            self._masks[segment] = (base, ((1 << chunk_counts[segment]) - 1) << base)
            base += chunk_counts[segment]
        self._missing = ((1 << base) - 1) & ~self._bits(held or {})
        self._limits = limits or TransferLimits()
        self._now = now
        self._progress_at = now  # last byte, or last news of something that is missing
        self._alive_at = now  # last time that some upstream was open or had not been tried
        self._requests: dict[int, _Request] = {}  # in flight, by position
        self._leaving: list[Upstream] = []  # not in the list any more, but not over yet
        self._active: Upstream | None = None
        self._last_link = 0
        self._out: list[ev.Instruction] = []
        self._stop_reason = ""
        self.phase = Phase.RUNNING
        self.generation = generation
        self._upstreams = [self._listed(spec) for spec in self._best(upstreams)]

    @property
    def upstream(self) -> str:
        """Peer id of the active upstream; empty when there is none."""
        return active.spec.peer_id if (active := self._active) is not None else ""

    @property
    def in_flight(self) -> int:
        """Chunks asked for and not answered."""
        return len(self._requests)

    @property
    def finished(self) -> bool:
        """Complete, cancelled or failed, and every link is over."""
        over = self.phase in (Phase.COMPLETE, Phase.FAILED)
        return over and not any(u.state in OPEN for u in self._everyone())

    # --- events -------------------------------------------------------------------------------

    def receive(self, event: ev.Event, now: float) -> list[ev.Instruction]:
        """Take one event; `now` never goes back. Returns instructions to be carried out in order."""
        self._now = now
        self._out = []
        match event:
            case ev.UpstreamsReplaced():
                self._on_replaced(event)
            case ev.UpstreamConnected() | ev.ChunksAnnounced() | ev.BytesReceived():
                self._on_news(event)
            case ev.ChunkArrived() | ev.ChunkCorrupt() | ev.FetchRefused():
                self._on_answer(event)
            case ev.UpstreamEnded():
                self._on_ended(event)
            case ev.TransferCancelled():
                self._stop("cancelled")
            case ev.LocalFault():
                self._stop(event.reason)
            case ev.Ticked():
                pass
            case _:
                assert_never(event)
        self._advance()
        return self._out

    def _on_replaced(self, event: ev.UpstreamsReplaced) -> None:
        if event.generation <= self.generation or self.phase in (Phase.COMPLETE, Phase.FAILED):
            return
        self.generation = event.generation
        known = {u.spec: u for u in self._upstreams}
        specs = self._best(event.upstreams)
        self._upstreams = [known.get(spec) or self._listed(spec) for spec in specs]
        for upstream in self._upstreams:
            self._forgive(upstream)
        for spec, upstream in known.items():
            if spec not in specs:
                self._leave(upstream)

    def _forgive(self, upstream: Upstream) -> None:
        upstream.attempts = 0
        upstream.rest_until = self._now
        upstream.since = self._now
        upstream.owed = 0
        if upstream.state is Link.SPENT:
            self._move(upstream, Cue.REVIVE)

    def _leave(self, upstream: Upstream) -> None:
        self._close(upstream, "not in the operator's list any more")
        if upstream.state is Link.CLOSING:
            self._leaving.append(upstream)
        if self._active is upstream:
            self._active = None

    def _on_news(self, event: ev.UpstreamConnected | ev.ChunksAnnounced | ev.BytesReceived) -> None:
        upstream = self._find(event.link)
        if upstream is None or upstream.state is Link.CLOSING:
            return
        match event:
            case ev.UpstreamConnected():
                self._move(upstream, Cue.CONNECTED)
                upstream.since = self._now
            case ev.ChunksAnnounced():
                self._hear(upstream, event.segments)
            case ev.BytesReceived():
                upstream.moved_at = self._progress_at = self._now

    def _hear(self, upstream: Upstream, segments: Mapping[int, bytes]) -> None:
        told = sum(self._masks.get(segment, (0, 0))[1] for segment in segments)
        bits = self._bits(segments)
        news = bits & ~upstream.announced
        upstream.announced = upstream.announced & ~told | bits
        upstream.owed = max(0, upstream.owed - news.bit_count())
        if news:
            upstream.since = self._now
        if news & self._missing:
            self._progress_at = self._now

    def _on_answer(self, event: ev.ChunkArrived | ev.ChunkCorrupt | ev.FetchRefused) -> None:
        position = self._positions[event.chunk]
        request = self._requests.get(position)
        if request is None or request.upstream.link != event.link:
            return
        del self._requests[position]
        upstream = request.upstream
        match event:
            case ev.ChunkArrived():
                upstream.attempts = 0
                upstream.moved_at = self._progress_at = self._now
                self._take(position, whole=event.whole_segment)
            case ev.ChunkCorrupt():
                upstream.corrupt += 1
                upstream.moved_at = self._now
                if upstream.corrupt >= self._limits.corrupt_max:
                    self._fail(upstream, f"{upstream.corrupt} corrupt chunks, the last was {event.chunk}")
            case ev.FetchRefused():
                self._fail(upstream, f"refused chunk {event.chunk}: {event.reason}")

    def _take(self, position: int, *, whole: bool) -> None:
        if self.phase is Phase.FAILED:
            return  # nobody wants to hear of it any more
        segment = self._chunks[position].segment
        base, mask = self._masks[segment]
        for place in range(base, mask.bit_length()) if whole else (position,):
            if self._missing >> place & 1:
                self._missing ^= 1 << place
                self._requests.pop(place, None)  # another link's answer will not be waited for
                self._out.append(ev.ChunkVerified(chunk=self._chunks[place]))
        if not self._missing & mask:
            self._out.append(ev.SegmentComplete(segment=segment))

    def _on_ended(self, event: ev.UpstreamEnded) -> None:
        upstream = self._find(event.link)
        if upstream is None:
            return
        for position in [p for p, r in self._requests.items() if r.upstream is upstream]:
            del self._requests[position]
        if upstream.state is not Link.CLOSING:
            upstream.reason = event.reason
            self._out.append(ev.UpstreamFailed(upstream=upstream.spec, reason=event.reason))
        self._move(upstream, Cue.ENDED)
        upstream.announced = upstream.corrupt = 0
        if self._active is upstream:
            self._active = None
        if upstream in self._leaving:
            self._leaving.remove(upstream)
            return
        upstream.attempts += 1
        rest_s = self._limits.backoff_s * 2 ** min(upstream.attempts - 1, 16)
        upstream.rest_until = self._now + min(rest_s, self._limits.backoff_s_max)
        if upstream.attempts >= self._limits.attempts_max:
            self._move(upstream, Cue.GIVE_UP)

    def _stop(self, reason: str) -> None:
        if self.phase in (Phase.COMPLETE, Phase.FAILED):
            return
        self._cue(Cue.STOP)
        self._stop_reason = reason
        self._close_all(reason)

    # --- after every event: look at everything, do what is next -------------------------------

    def _advance(self) -> None:
        if self.phase is Phase.FAILED and self._stop_reason and self.finished:
            self._out.append(ev.TransferFailed(reason=self._stop_reason))
            self._stop_reason = ""
        if self.phase in (Phase.COMPLETE, Phase.FAILED):
            return
        if not self._missing:
            self._cue(Cue.LAST_CHUNK)
            self._out.append(ev.TransferComplete())
            self._close_all("complete")
            return
        self._end_overdue()
        self._open_rested()
        chosen = self._choose()
        if chosen is not None:
            self._active = chosen
            self._fill_window(chosen)
        self._judge_stall()

    def _end_overdue(self) -> None:
        limits, now = self._limits, self._now
        oldest: dict[int, float] = {}
        for request in self._requests.values():
            link = request.upstream.link
            oldest[link] = min(request.asked_at, oldest.get(link, request.asked_at))
        for upstream in self._upstreams:
            if upstream.state is Link.OPENING and now - upstream.since >= limits.open_deadline_s:
                self._fail(upstream, f"did not answer within {limits.open_deadline_s:g} s")
            if upstream.state is not Link.LIVE or upstream.link not in oldest:
                continue
            if now - upstream.moved_at >= limits.progress_deadline_s:
                self._fail(upstream, f"sent nothing for {limits.progress_deadline_s:g} s")
            elif now - oldest[upstream.link] >= limits.chunk_deadline_s:
                self._fail(upstream, f"needed more than {limits.chunk_deadline_s:g} s for a chunk")

    def _open_rested(self) -> None:
        for upstream in self._upstreams:
            if upstream.state is Link.RESTING and upstream.rest_until <= self._now:
                self._last_link += 1
                self._move(upstream, Cue.OPEN)
                upstream.link = self._last_link
                upstream.since = self._now
                self._out.append(ev.OpenUpstream(link=upstream.link, upstream=upstream.spec))

    def _choose(self) -> Upstream | None:
        """The best upstream that has something to fetch, or None to wait for a better one."""
        wanted = self._wanted()
        better: list[Upstream] = []
        reserve: Upstream | None = None
        for upstream in self._upstreams:
            useful = upstream.state is Link.LIVE and upstream.announced & wanted
            if useful and not upstream.owed:
                for passed in better:
                    passed.owed = passed.owed or self._limits.window_chunks
                return upstream
            if useful and reserve is None:
                reserve = upstream
            if not useful and self._is_hopeful(upstream):
                break
            better.append(upstream)
        return reserve

    def _is_hopeful(self, upstream: Upstream) -> bool:
        """Whether to wait for it although it has nothing to fetch at the moment."""
        if upstream.owed or not (upstream.untried or upstream.state is Link.LIVE):
            return False
        return self._now - max(upstream.since, upstream.moved_at) < self._limits.stall_s

    def _fill_window(self, upstream: Upstream) -> None:
        usable = self._wanted() & upstream.announced
        while usable and len(self._requests) < self._limits.window_chunks:
            lowest = usable & -usable
            usable ^= lowest
            if not any(r.upstream is upstream for r in self._requests.values()):
                upstream.moved_at = self._now
            position = lowest.bit_length() - 1
            self._requests[position] = _Request(upstream, self._now)
            self._out.append(ev.FetchChunk(link=upstream.link, chunk=self._chunks[position]))

    def _judge_stall(self) -> None:
        reason = self._stall_reason()
        if reason and self.phase is Phase.RUNNING:
            self._cue(Cue.NO_UPSTREAM)
            self._out.append(ev.TransferStalled(reason=reason))
        elif not reason and self.phase is Phase.STALLED:
            self._cue(Cue.GOES_ON)
            self._out.append(ev.TransferResumed())

    def _stall_reason(self) -> str:
        """Why nobody can continue the transfer; empty while somebody can, or may be about to."""
        spent = all(u.state is Link.SPENT for u in self._upstreams)
        if any(
            u.state is Link.LIVE or (u.attempts == 0 and u.state is not Link.CLOSING) for u in self._upstreams
        ):
            self._alive_at = self._now
        elif self._now - self._alive_at >= self._limits.stall_s or spent:
            reasons = "; ".join(f"{u.spec.peer_id}: {u.reason}" for u in self._upstreams)
            return f"no upstream is left ({reasons or 'none was given'})"
        if self._now - self._progress_at >= self._limits.progress_deadline_s and not self._requests:
            return f"no upstream has any of the {self._missing.bit_count()} missing chunks"
        return ""

    def _best(self, specs: Sequence[UpstreamSpec]) -> list[UpstreamSpec]:
        return list(dict.fromkeys(specs))[: self._limits.upstreams_max]

    def _listed(self, spec: UpstreamSpec) -> Upstream:
        return Upstream(spec=spec, since=self._now, rest_until=self._now)

    def _everyone(self) -> Iterator[Upstream]:
        yield from self._upstreams
        yield from self._leaving

    def _find(self, link: int) -> Upstream | None:
        return next((u for u in self._everyone() if u.link == link and u.state in OPEN), None)

    def _bits(self, bitmaps: Mapping[int, bytes]) -> int:
        bits = 0
        for segment, bitmap in bitmaps.items():
            base, mask = self._masks.get(segment, (0, 0))
            bits |= (int.from_bytes(bitmap, "little") << base) & mask
        return bits

    def _wanted(self) -> int:
        wanted = self._missing
        for position in self._requests:
            wanted &= ~(1 << position)
        return wanted

    def _fail(self, upstream: Upstream, reason: str) -> None:
        if upstream.state in (Link.OPENING, Link.LIVE):
            upstream.reason = reason
            self._out.append(ev.UpstreamFailed(upstream=upstream.spec, reason=reason))
            self._close(upstream, reason)

    def _close(self, upstream: Upstream, reason: str) -> None:
        if upstream.state in (Link.OPENING, Link.LIVE):
            self._move(upstream, Cue.CLOSE)
            self._out.append(ev.CloseUpstream(link=upstream.link, reason=reason))

    def _close_all(self, reason: str) -> None:
        for upstream in self._upstreams:
            self._close(upstream, reason)

    def _move(self, upstream: Upstream, cue: Cue) -> None:
        upstream.state = LINK_TRANSITIONS[upstream.state][cue]

    def _cue(self, cue: Cue) -> None:
        self.phase = PHASE_TRANSITIONS[self.phase][cue]
