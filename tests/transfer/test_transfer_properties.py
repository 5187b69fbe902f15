"""The transfer machine against an adversary that may do anything which the events allow.

Whatever happens, the invariants of transfer.py hold; and when the adversary gives up, so that every chunk is
held by an upstream that lives and answers, the transfer completes in bounded time.
"""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from layercast_agent import transfer_events as ev
from layercast_agent.transfer import Transfer
from layercast_agent.transfer_events import Chunk, TransferLimits, UpstreamSpec
from layercast_agent.transfer_states import Phase

LIMITS = TransferLimits(window_chunks=3, attempts_max=3)
PEERS = tuple(UpstreamSpec(peer_id=name) for name in "ABC")


class OpenLink:
    """The adversary's side of one link."""

    def __init__(self, spec: UpstreamSpec) -> None:
        self.spec = spec
        self.connected = False
        self.closing = False
        self.announced: set[Chunk] = set()
        self.asked: list[Chunk] = []


class Adversary(RuleBasedStateMachine):
    """Upstreams with contents, and everything that can go wrong between them and the transfer."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.links: dict[int, OpenLink] = {}
        self.verified: list[Chunk] = []
        self.segments_done: list[int] = []
        self.ended: list[str] = []
        self.generation = 1

    @initialize(
        counts=st.lists(st.integers(1, 4), min_size=1, max_size=3),
        upstreams=st.lists(st.sampled_from(PEERS), max_size=3, unique=True),
        shuffler=st.randoms(use_true_random=False),
    )
    def begin(self, counts: list[int], upstreams: list[UpstreamSpec], shuffler: random.Random) -> None:
        order = list(range(len(counts)))
        shuffler.shuffle(order)
        self.counts = counts
        self.all = {Chunk(segment=s, chunk=c) for s, n in enumerate(counts) for c in range(n)}
        self.listed = tuple(upstreams)
        self.machine = Transfer(
            chunk_counts=counts,
            segment_order=order,
            upstreams=upstreams,
            generation=1,
            now=0.0,
            limits=LIMITS,
        )
        self.tell(ev.Ticked())

    def tell(self, event: ev.Event) -> None:
        for instruction in self.machine.receive(event, self.now):
            self.check(instruction)

    def check(self, instruction: ev.Instruction) -> None:
        match instruction:
            case ev.OpenUpstream(link=number, upstream=spec):
                assert number not in self.links
                assert not any(link.spec == spec and not link.closing for link in self.links.values())
                self.links[number] = OpenLink(spec)
            case ev.CloseUpstream(link=number):
                assert not self.links[number].closing
                self.links[number].closing = True
            case ev.FetchChunk(link=number, chunk=chunk):
                link = self.links[number]
                assert link.connected and not link.closing and chunk in link.announced
                assert chunk not in self.verified
                assert not any(chunk in other.asked for other in self.links.values())
                link.asked.append(chunk)
            case ev.ChunkVerified(chunk=chunk):
                assert chunk not in self.verified
                self.verified.append(chunk)
            case ev.SegmentComplete(segment=segment):
                assert segment not in self.segments_done
                of_segment = {chunk for chunk in self.all if chunk.segment == segment}
                assert of_segment <= set(self.verified)
                self.segments_done.append(segment)
            case ev.TransferComplete():
                self.ended.append("complete")
            case ev.TransferFailed():
                assert not self.links
                self.ended.append("failed")

    @invariant()
    def window_is_kept(self) -> None:
        assert sum(len(link.asked) for link in self.links.values()) <= LIMITS.window_chunks
        assert len(self.ended) <= 1

    def bitmaps(self, chunks: set[Chunk]) -> dict[int, bytes]:
        bits = dict.fromkeys(range(len(self.counts)), 0)
        for chunk in chunks:
            bits[chunk.segment] |= 1 << chunk.chunk
        return {segment: value.to_bytes(1, "little") for segment, value in bits.items()}

    @rule(seconds=st.sampled_from([0.1, 0.3, 1.1, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.tell(ev.Ticked())

    @precondition(lambda self: any(not link.connected for link in self.links.values()))
    @rule(data=st.data())
    def connect(self, data: st.DataObject) -> None:
        fresh = sorted(n for n, link in self.links.items() if not link.connected)
        number = data.draw(st.sampled_from(fresh))
        self.links[number].connected = True
        self.tell(ev.UpstreamConnected(link=number))

    @precondition(lambda self: any(link.connected for link in self.links.values()))
    @rule(data=st.data())
    def announce(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(n for n, link in self.links.items() if link.connected)))
        more = data.draw(st.sets(st.sampled_from(sorted(self.all, key=str))))
        self.links[number].announced |= more
        self.tell(ev.ChunksAnnounced(link=number, segments=self.bitmaps(self.links[number].announced)))

    @precondition(lambda self: any(link.asked for link in self.links.values()))
    @rule(data=st.data(), answer=st.sampled_from(["good", "good", "good", "corrupt", "refused", "bytes"]))
    def answer(self, data: st.DataObject, answer: str) -> None:
        number = data.draw(st.sampled_from(sorted(n for n, link in self.links.items() if link.asked)))
        link = self.links[number]
        chunk = data.draw(st.sampled_from(sorted(link.asked, key=str)))
        if answer == "bytes":
            self.tell(ev.BytesReceived(link=number))
            return
        link.asked.remove(chunk)
        match answer:
            case "good":
                self.tell(ev.ChunkArrived(link=number, chunk=chunk))
            case "corrupt":
                self.tell(ev.ChunkCorrupt(link=number, chunk=chunk))
            case "refused":
                self.tell(ev.FetchRefused(link=number, chunk=chunk, reason="fenced"))

    @precondition(lambda self: bool(self.links))
    @rule(data=st.data())
    def link_ends(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.links)))
        del self.links[number]
        self.tell(ev.UpstreamEnded(link=number, reason="gone"))
        # News of a link that is over change nothing.
        self.tell(ev.ChunkArrived(link=number, chunk=min(self.all, key=str)))
        self.tell(ev.UpstreamConnected(link=number))

    @rule(upstreams=st.lists(st.sampled_from(PEERS), max_size=3, unique=True), newer=st.booleans())
    def replace(self, upstreams: list[UpstreamSpec], newer: bool) -> None:
        if newer:
            self.generation += 1
            self.listed = tuple(upstreams)
        self.tell(ev.UpstreamsReplaced(upstreams=tuple(upstreams), generation=self.generation))

    def teardown(self) -> None:
        """The adversary gives up: upstreams live, answer, and hold everything among them."""
        if not hasattr(self, "machine"):
            return
        everything = sorted(self.all, key=str)
        shares = {spec: set(everything[index::3]) for index, spec in enumerate(PEERS)}
        self.generation += 1
        self.tell(ev.UpstreamsReplaced(upstreams=PEERS, generation=self.generation))
        for _ in range(2000):
            if self.machine.finished:
                break
            self.now += 0.1
            self.serve(shares)
            self.tell(ev.Ticked())
        assert self.machine.phase is Phase.COMPLETE and self.machine.finished
        assert set(self.verified) == self.all and len(self.verified) == len(self.all)
        assert sorted(self.segments_done) == list(range(len(self.counts)))
        assert self.ended == ["complete"]

    def serve(self, shares: dict[UpstreamSpec, set[Chunk]]) -> None:
        for number, link in list(self.links.items()):
            if link.closing:
                del self.links[number]
                self.tell(ev.UpstreamEnded(link=number, reason="closed"))
                continue
            if not link.connected:
                link.connected = True
                self.tell(ev.UpstreamConnected(link=number))
            link.announced |= shares[link.spec]
            self.tell(ev.ChunksAnnounced(link=number, segments=self.bitmaps(link.announced)))
            for chunk in list(link.asked):
                link.asked.remove(chunk)
                self.tell(ev.ChunkArrived(link=number, chunk=chunk))


Adversary.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestAdversary = Adversary.TestCase


def test_cancel_at_any_point_ends_after_the_links() -> None:
    machine = Transfer(chunk_counts=[2], upstreams=PEERS, generation=1, now=0.0, limits=LIMITS)
    machine.receive(ev.Ticked(), 0.0)
    machine.receive(ev.UpstreamConnected(link=1), 0.0)
    said = machine.receive(ev.TransferCancelled(), 0.0)
    assert [i.link for i in said if isinstance(i, ev.CloseUpstream)] == [1, 2, 3]
    for link in (1, 2):
        assert machine.receive(ev.UpstreamEnded(link=link, reason="closed"), 0.0) == []
        assert not machine.finished
    assert machine.receive(ev.UpstreamEnded(link=3, reason="closed"), 0.0) == [
        ev.TransferFailed(reason="cancelled")
    ]
    assert machine.finished
