"""The target's end of one link as a process of its own, for the conformance suite: does one case, says what happened.

A process, because a library that carries bytes may crash its process or end badly, and because a peer's death is
only real between processes. Settings come as JSON in argv[1]; the one JSON line on stdout is the result. It ends with
`os._exit`, as workers do.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import queue
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from layercast_agent import transfer_events as ev
from layercast_agent.regions import HostMemory, RegionTable
from layercast_agent.residency import Residency
from layercast_agent.tls import Tls
from layercast_agent.transfer_events import Chunk, UpstreamSpec
from layercast_agent.transport import ChunkLink, LinkRequest
from layercast_agent.transport.landing import Landing
from layercast_agent.transport.memory import Faults, MemoryLink, MemoryNetwork, MemoryNode
from layercast_agent.transport.tcp_link import open_link

WINDOW = 4
DEADLINE_S = 30.0


class Ended(Exception):
    """The link said that it is over."""


class Target:
    """Memory, links into it, and what they said."""

    def __init__(self, settings: dict[str, Any]) -> None:
        path = Path(__file__).parent / "synthetic.py"
        spec = importlib.util.spec_from_file_location("layercast_test_synthetic", path)
        assert spec is not None and spec.loader is not None
        synthetic = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = synthetic
        spec.loader.exec_module(synthetic)
        self.settings = settings
        self.checkpoint = synthetic.make(settings["sizes"], chunk_bytes=settings["chunk_bytes"])
        self.memories: list[HostMemory] = self.checkpoint.empty_memories()
        self.events: queue.Queue[ev.Event] = queue.Queue()
        plane = None
        if settings["nixl"]:
            from layercast_agent.transport.nixl import NixlPlane

            plane = NixlPlane(RegionTable())
        self._open = functools.partial(
            open_link,
            manifest=self.checkpoint.manifest,
            landing=Landing(manifest=self.checkpoint.manifest, memories=self.memories),
            token=settings["token"].encode(),
            connect_deadline_s=5.0,
            tls=Tls(Path(settings["tls_dir"])) if settings["tls_dir"] else None,
            plane=plane,
        )

    def open(self, upstream: dict[str, Any], *, number: int = 1) -> ChunkLink:
        """A link whose chunks are announced."""
        link = self.link(LinkRequest(link=number, upstream=_spec(upstream), post=self.events.put))
        self.wait(ev.ChunksAnnounced)
        return link

    def link(self, request: LinkRequest) -> ChunkLink:
        return self._open(request)

    def now(self) -> float:
        return time.monotonic()

    def take(self, timeout_s: float) -> ev.Event:
        """The next event; queue.Empty when there is none in time."""
        return self.events.get(timeout=timeout_s)

    def strike(self) -> None:
        """The fault of the case."""
        subprocess.run(self.settings["fault"], check=True, timeout=DEADLINE_S)

    def wait(self, kind: type, *, deadline_s: float = DEADLINE_S) -> Any:
        """The next event of a kind; `Ended` with its reason when the link is over before, queue.Empty in time."""
        end = self.now() + deadline_s
        while True:
            event = self.take(max(0.0, end - self.now()))
            if isinstance(event, kind):
                return event
            if isinstance(event, ev.UpstreamEnded):
                raise Ended(event.reason)
            if isinstance(event, ev.FetchRefused | ev.LocalFault | ev.ChunkCorrupt):
                raise Ended(str(event))

    def load(self, link: ChunkLink, chunks: list[Chunk]) -> None:
        """Fetch chunks, a window at a time."""
        for index, chunk in enumerate(chunks):
            link.fetch(chunk)
            if index >= WINDOW:
                self.wait(ev.ChunkArrived)
        for _ in chunks[-WINDOW:]:
            self.wait(ev.ChunkArrived)

    def end(self, link: ChunkLink) -> float:
        """Close; returns how long it took until the memory was quiet."""
        begun_at = self.now()
        link.close("the test is over")
        try:
            while True:
                self.wait(ev.UpstreamEnded)
                break
        except Ended:
            pass
        return self.now() - begun_at

    @property
    def chunks(self) -> list[Chunk]:
        manifest = self.checkpoint.manifest
        return [
            Chunk(segment=s.index, chunk=c)
            for s in manifest.segments
            for c in range(manifest.chunk_count(s.index))
        ]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(b"".join(bytes(m.view(0, m.nbytes)) for m in self.memories)).hexdigest()


class VirtualTarget(Target):
    """The same by `memory`: its peers are in this process, and its seconds are virtual ones."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__({**settings, "nixl": False})
        manifest = self.checkpoint.manifest
        self.network = MemoryNetwork(rng=random.Random(settings["seed"]), faults=Faults())
        for upstream in settings["upstreams"]:
            name = upstream["peer_id"]
            self.network.nodes[name] = MemoryNode(
                name,
                manifest=manifest,
                memories=self.checkpoint.memories(),
                residency=Residency(manifest, complete=True),
            )
            self.network.nodes[name].fenced = name in settings["fenced"]
        self.node = MemoryNode(
            "target", manifest=manifest, memories=self.memories, residency=Residency(manifest)
        )
        self.network.nodes["target"] = self.node

    def link(self, request: LinkRequest) -> ChunkLink:
        return MemoryLink(request, network=self.network, target=self.node)

    def now(self) -> float:
        return self.network.now

    def take(self, timeout_s: float) -> ev.Event:
        end = self.network.now + timeout_s
        while self.events.empty() and self.network.next_at <= end:
            self.network.step()
        if self.events.empty():
            self.network.now = end
        return self.events.get_nowait()

    def strike(self) -> None:
        match self.settings["fault"]:
            case ["SIGKILL", name]:
                self.network.kill(name)
            case ["SIGSTOP", name]:
                self.network.stop(name)
            case [_, name]:
                self.network.cut("target", name)


def _spec(upstream: dict[str, Any]) -> UpstreamSpec:
    socket = upstream.get("memory_socket")
    return UpstreamSpec(**{**upstream, "memory_socket": Path(socket) if socket else None})


def deliver(target: Target) -> dict[str, Any]:
    """Everything, last chunk first."""
    link = target.open(target.settings["upstreams"][0])
    target.load(link, target.chunks[::-1])
    target.end(link)
    return {"sha256": target.sha256}


def refuse(target: Target) -> dict[str, Any]:
    """The first chunk, from somebody who should say no."""
    try:
        link = target.open(target.settings["upstreams"][0])
        target.load(link, target.chunks[:1])
    except Ended as ended:
        return {"reason": str(ended), "touched": any(any(m.view(0, m.nbytes)) for m in target.memories)}
    return {"reason": ""}


def survive(target: Target) -> dict[str, Any]:
    """One good chunk; then the fault, and chunks that cannot come; then everything from another peer."""
    first, second = target.settings["upstreams"]
    link = target.open(first)
    target.load(link, target.chunks[:1])
    target.strike()
    begun_at = target.now()
    for chunk in target.chunks[1:3]:
        link.fetch(chunk)
    ended = ""
    try:
        target.wait(ev.ChunkArrived, deadline_s=target.settings["deadline_s"])
    except queue.Empty:
        target.end(link)
        ended = "closed at our deadline"
    except Ended as error:
        ended = str(error)
    gone_s = target.now() - begun_at
    other = target.open(second, number=2)
    target.load(other, target.chunks[1:])
    target.end(other)
    return {"ended": ended, "gone_s": gone_s, "sha256": target.sha256}


def abort(target: Target) -> dict[str, Any]:
    """Close with chunks in flight; then the same memory again."""
    upstream = target.settings["upstreams"][0]
    link = target.open(upstream)
    for chunk in target.chunks[:WINDOW]:
        link.fetch(chunk)
    quiet_s = target.end(link)
    for memory in target.memories:
        memory.view(0, memory.nbytes)[:] = bytes(memory.nbytes)
    while not target.events.empty():
        target.events.get()
    again = target.open(upstream, number=2)
    target.load(again, target.chunks)
    target.end(again)
    return {"quiet_s": quiet_s, "sha256": target.sha256}


if __name__ == "__main__":
    case = {"deliver": deliver, "refuse": refuse, "survive": survive, "abort": abort}
    wanted = json.loads(sys.argv[1])
    kind = VirtualTarget if wanted["virtual"] else Target
    said = case[wanted["case"]](kind(wanted))
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()
    os._exit(0)
