"""A network inside one process and one thread, in virtual time, for simulations of whole chains.

It has what real ones have: latency that lets answers overtake each other, corruption, answers that come twice, nodes
that die, stop without dying or send rot, cuts between two nodes that nobody is told of, and links that still write for
a while after they were told to close. A seed reproduces everything. Memory, residency, landing and the transfer above
are the real ones.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from layercast_agent import transfer_events as ev
from layercast_agent.layout import Manifest
from layercast_agent.regions import WritableMemory
from layercast_agent.residency import Residency
from layercast_agent.transfer_events import Chunk
from layercast_agent.transport import LinkRequest
from layercast_agent.transport.landing import Landing

KEEPALIVE_S = 15.0  # as that of the residency watch


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How bad the network is; times in seconds of virtual time."""

    delay_s: tuple[float, float] = (0.001, 0.02)
    """Of every message, uniform; a wide range is a network that reorders."""

    corrupt: float = 0.0
    """Probability that a chunk arrives altered."""

    duplicate: float = 0.0
    """Probability that a message comes twice."""


class MemoryNode:
    """One holder: its checkpoint and what of it is there; `alive`, `stopped`, `rotten` and `fenced` are its faults."""

    def __init__(
        self, name: str, *, manifest: Manifest, memories: Sequence[WritableMemory], residency: Residency
    ) -> None:
        self.name = name
        self.manifest = manifest
        self.memories = memories
        self.residency = residency
        self.alive = True
        self.stopped = False
        self.rotten = False  # whatever it sends is altered
        self.fenced = False  # its memory means something else by now


class MemoryNetwork:
    """Nodes, virtual time and everything that is under way."""

    def __init__(self, *, rng: random.Random, faults: Faults) -> None:
        self.now = 0.0
        self.rng = rng
        self.faults = faults
        self.nodes: dict[str, MemoryNode] = {}
        self.links: list[MemoryLink] = []
        self.cuts: set[frozenset[str]] = set()
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def schedule(self, delay_s: float, action: Callable[[], None]) -> None:
        """Do something later."""
        heapq.heappush(self._agenda, (self.now + delay_s, next(self._order), action))

    @property
    def pending(self) -> bool:
        """Whether anything will still happen."""
        return bool(self._agenda)

    @property
    def next_at(self) -> float:
        """When the next thing happens; never, when nothing is pending."""
        return self._agenda[0][0] if self._agenda else math.inf

    def step(self) -> None:
        """Go to the next moment at which something happens, and let it happen."""
        self.now, _, action = heapq.heappop(self._agenda)
        action()

    def latency(self) -> float:
        """How long the next message takes."""
        return self.rng.uniform(*self.faults.delay_s)

    def cut(self, one: str, other: str) -> None:
        """No message between the two arrives any more; keepalive ends their links if it lasts."""
        self.cuts.add(frozenset((one, other)))
        for link in self._between(one, other):
            self.schedule(KEEPALIVE_S, link.break_off_if_silent)

    def heal(self, one: str, other: str) -> None:
        """Messages arrive again, and what waited for an acknowledgement is sent again."""
        self.cuts.discard(frozenset((one, other)))
        for link in self._between(one, other):
            self.schedule(self.latency(), link.announce)

    def stop(self, name: str) -> None:
        """The node does nothing any more, and is not gone."""
        self.nodes[name].stopped = True

    def go_on(self, name: str) -> None:
        """A stopped node does again what it did."""
        self.nodes[name].stopped = False
        for link in [link for link in self.links if link.source.name == name]:
            self.schedule(self.latency(), link.announce)

    def _between(self, one: str, other: str) -> list[MemoryLink]:
        return [link for link in self.links if {link.source.name, link.target.name} == {one, other}]

    def reaches(self, one: str, other: str) -> bool:
        """Whether messages between two nodes arrive."""
        return frozenset((one, other)) not in self.cuts

    def kill(self, name: str) -> None:
        """The node is gone; both ends of its links notice after a while."""
        self.nodes[name].alive = False
        for link in list(self.links):
            ends = (link.source.name, link.target.name)
            if name in ends and self.reaches(*ends):
                self.schedule(self.latency(), link.break_off)


class MemoryLink:
    """One opening of a node by another; see `ChunkLink`."""

    transport = "memory"

    def __init__(self, request: LinkRequest, *, network: MemoryNetwork, target: MemoryNode) -> None:
        """Connects after some latency, or is refused when the node does not live."""
        self.source = network.nodes[request.upstream.peer_id]
        self.target = target
        self.received_bytes = 0
        self._request = request
        self._network = network
        self._landing = Landing(manifest=target.manifest, memories=target.memories)
        self._over = False
        self._asked: set[Chunk] = set()
        self._forget: Callable[[], None] = lambda: None
        network.links.append(self)
        network.schedule(network.latency(), self._connect)

    def fetch(self, chunk: Chunk) -> None:
        """The answer needs the request's latency and its own."""
        self._asked.add(chunk)
        for _ in range(self._copies()):
            delay_s = self._network.latency() + self._network.latency()
            self._network.schedule(delay_s, lambda: self._deliver(chunk))

    def close(self, reason: str) -> None:
        """What is under way may still land until the end, as on a real network."""
        self._network.schedule(self._network.latency(), lambda: self._end(reason))

    def break_off(self) -> None:
        """One end died."""
        self._end("connection reset")

    def break_off_if_silent(self) -> None:
        """Keepalive: nothing came for a while."""
        if self._silent():
            self._end("keepalive failed")

    def _connect(self) -> None:
        if not self.source.alive:
            self._end("connection refused")
        elif not self._silent():
            self._request.post(ev.UpstreamConnected(link=self._request.link))
            self._forget = self.source.residency.subscribe(self._announce_later)
            self.announce()

    def _announce_later(self) -> None:
        for _ in range(self._copies()):
            self._network.schedule(self._network.latency(), self.announce)

    def announce(self) -> None:
        """Tell all that the source has."""
        if self._silent():
            return
        _, segments = self.source.residency.snapshot()
        self._request.post(ev.ChunksAnnounced(link=self._request.link, segments=segments))

    def _deliver(self, chunk: Chunk) -> None:
        if self._silent() or not self.target.alive:
            return
        if chunk not in self._asked:  # as the tcp link: an answer too many is not written anywhere
            self._end("the peer answered something that was not asked")
            return
        self._asked.remove(chunk)
        if self.source.fenced:
            reason = f"segment {chunk.segment} is not readable any more"
            self._request.post(ev.FetchRefused(link=self._request.link, chunk=chunk, reason=reason))
            return
        memory = self.source.memories[chunk.segment]
        data = bytearray(memory.view(*self._landing.range_of(chunk)))
        if self.source.rotten or self._network.rng.random() < self._network.faults.corrupt:
            data[self._network.rng.randrange(len(data))] ^= 1 << self._network.rng.randrange(8)
        self.received_bytes += len(data)
        staged = self._landing.staging(chunk)
        staged[:] = data  # corrupt bytes reach the memory, as they do when a socket writes into it
        if self._landing.settle(chunk, staged):
            self._request.post(ev.ChunkArrived(link=self._request.link, chunk=chunk))
        else:
            self._request.post(ev.ChunkCorrupt(link=self._request.link, chunk=chunk))

    def _silent(self) -> bool:
        reached = self._network.reaches(self.source.name, self.target.name)
        return self._over or self.source.stopped or not self.source.alive or not reached

    def _copies(self) -> int:
        return 2 if self._network.rng.random() < self._network.faults.duplicate else 1

    def _end(self, reason: str) -> None:
        if self._over:
            return
        self._over = True
        self._forget()
        self._network.links.remove(self)
        self._request.post(ev.UpstreamEnded(link=self._request.link, reason=reason))
