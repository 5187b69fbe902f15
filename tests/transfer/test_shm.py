"""Host copies read where they lie: leases hold the memory, and a lease that is over leaves no chunk behind."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.transfer.conftest import TOKEN

from layercast_agent import transfer_events as ev
from layercast_agent.arena import Arena
from layercast_agent.errors import NoCapacityError, PeerLostError, PeerRefusedError
from layercast_agent.holdings import MEMORY_RANK, Holding
from layercast_agent.residency import Residency
from layercast_agent.transfer_events import Chunk, UpstreamSpec
from layercast_agent.transport import LinkRequest, shm
from layercast_agent.transport.landing import Landing
from layercast_agent.transport.shm import Kind, LeaseAnswer, LeaseRequest, ShmServer
from layercast_agent.transport.shm_link import ArenaMaps, ShmLink, map_now
from layercast_agent.transport.wire import Deadline, Status

CHUNK = 10_000
SIZES = [35_000, 20_001, 1, 0, 12_288]


@dataclass
class Node:
    """An agent's end: a checkpoint in an arena, offered to peers."""

    checkpoint: Any
    holder: Any
    arena: Arena
    server: ShmServer
    spec: UpstreamSpec


@pytest.fixture
def node(synthetic: ModuleType, holder: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Starts agents' ends."""
    started: list[Node] = []

    def start(*, complete: bool = True, **options: Any) -> Node:
        checkpoint = synthetic.make(SIZES, chunk_bytes=CHUNK)
        peer = holder(checkpoint)
        arena = Arena(1 << 20)
        memories = [arena.allocate(segment.nbytes, unit=CHUNK) for segment in checkpoint.manifest.segments]
        if complete:
            for memory, data in zip(memories, checkpoint.data, strict=True):
                for extent in memory.extents:
                    arena.data[extent.offset : extent.offset + extent.nbytes] = data
        peer.residency = Residency(checkpoint.manifest, complete=complete)
        peer.holdings.add(
            Holding(
                manifest=checkpoint.manifest,
                files={},
                residency=peer.residency,
                regions=tuple(peer.table.add(memory) for memory in memories),
                rank=MEMORY_RANK,
            )
        )
        path = tmp_path / f"memory-{len(started)}.sock"
        server = ShmServer(peer.table, arena=arena, token=TOKEN, path=path, **options)
        server.start()
        spec = replace(peer.spec("node"), memory_socket=path)
        started.append(Node(checkpoint, peer, arena, server, spec))
        return started[-1]

    yield start
    for one in started:
        one.server.close()
        one.arena.close()


class Target:
    """A worker's end: what came of a link, event by event."""

    def __init__(self, node: Node, *, token: bytes = TOKEN) -> None:
        self.memories = node.checkpoint.empty_memories()
        self.events: queue.Queue[ev.Event] = queue.Queue()
        manifest = node.checkpoint.manifest
        self.link = ShmLink(
            LinkRequest(link=1, upstream=node.spec, post=self.events.put),
            manifest=manifest,
            landing=Landing(manifest=manifest, memories=self.memories),
            path=node.server.path,
            token=token,
            connect_deadline_s=2.0,
            maps=ArenaMaps(),
        )

    def wait(self, kind: type[Any]) -> Any:
        """The next event of a kind."""
        while True:
            event = self.events.get(timeout=10)
            assert not isinstance(event, ev.LocalFault), event
            if isinstance(event, kind):
                return event
            assert not isinstance(event, ev.UpstreamEnded), event


def test_every_chunk_arrives_and_no_lease_is_left(node: Callable[..., Node]) -> None:
    source = node()
    target = Target(source)
    target.wait(ev.ChunksAnnounced)
    chunks = [
        Chunk(segment=s.index, chunk=c)
        for s in source.checkpoint.manifest.segments
        for c in range(len(s.chunk_crc32))
    ]
    for chunk in chunks:
        target.link.fetch(chunk)
    arrived = [target.wait(ev.ChunkArrived).chunk for _ in chunks]
    assert Counter(arrived) == Counter(chunks)
    assert source.checkpoint.held_by(target.memories)
    assert target.link.received_bytes == sum(SIZES)
    target.link.close("done")
    assert target.wait(ev.UpstreamEnded).reason == "done"
    holding = source.holder.holdings.get(source.checkpoint.manifest.digest)
    for region in holding.regions:
        source.holder.table.remove(region.region_id, deadline_s=5)


def test_a_whole_transfer_follows_a_copy_that_is_still_filling(
    synthetic: ModuleType, node: Callable[..., Node]
) -> None:
    from layercast_agent.runner import TransferRunner

    source = node(complete=False)
    memories, done = source.checkpoint.empty_memories(), threading.Event()
    runner = TransferRunner(
        transfer_id="t",
        manifest=source.checkpoint.manifest,
        memories=memories,
        residency=Residency(source.checkpoint.manifest),
        upstreams=[source.spec],
        generation=1,
        segment_order=(),
        token=TOKEN,
        on_segment=lambda segment: None,
        on_end=lambda outcome: done.set(),
    )
    runner.start()
    filling = source.holder.holdings.get(source.checkpoint.manifest.digest, rank=MEMORY_RANK)
    for segment in source.checkpoint.manifest.segments:
        memory = source.holder.table.enter(
            filling.regions[segment.index].region_id, filling.regions[0].epoch, 0, 0
        )
        for chunk in range(len(segment.chunk_crc32)):
            offset, nbytes = source.checkpoint.manifest.chunk_range(segment.index, chunk)
            memory.staging(offset, nbytes)[:] = source.checkpoint.data[segment.index][
                offset : offset + nbytes
            ]
            source.holder.residency.mark(segment.index, chunk)
        source.holder.table.leave(filling.regions[segment.index].region_id)
    assert done.wait(10)
    assert source.checkpoint.held_by(memories) and runner.status().failures == ()


def test_rotten_bytes_are_not_a_chunk(node: Callable[..., Node]) -> None:
    source = node()
    source.arena.data[5] ^= 1
    target = Target(source)
    target.wait(ev.ChunksAnnounced)
    target.link.fetch(Chunk(segment=0, chunk=0))
    assert target.wait(ev.ChunkCorrupt).chunk == Chunk(segment=0, chunk=0)
    target.link.close("done")
    target.wait(ev.UpstreamEnded)


def test_a_fenced_region_is_refused(node: Callable[..., Node]) -> None:
    source = node()
    target = Target(source)
    target.wait(ev.ChunksAnnounced)
    region = source.holder.holdings.get(source.checkpoint.manifest.digest).regions[1]
    source.holder.table.remove(region.region_id, deadline_s=1)
    target.link.fetch(Chunk(segment=1, chunk=0))
    assert "not readable" in target.wait(ev.FetchRefused).reason
    target.link.close("done")
    target.wait(ev.UpstreamEnded)


def test_strangers_get_no_memory(node: Callable[..., Node]) -> None:
    source = node()
    ended = Target(source, token=b"another token").wait(ev.UpstreamEnded)
    assert "token" in ended.reason
    with pytest.raises(PeerLostError, match="cannot reach"):
        map_now(source.server.path.with_name("nobody.sock"), token=TOKEN, deadline_s=1, maps=ArenaMaps())


def connected(node: Node) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    *_, descriptor = shm.connect(sock, node.server.path, token=TOKEN, deadline=Deadline(2))
    os.close(descriptor)
    sock.settimeout(10)
    return sock


def lease(sock: socket.socket, node: Node, **changes: Any) -> LeaseAnswer:
    region = node.holder.holdings.get(node.checkpoint.manifest.digest).regions[0]
    asked = LeaseRequest(
        kind=Kind.LEASE,
        lease_id=7,
        region_id=region.region_id,
        epoch=region.epoch,
        offset=0,
        nbytes=CHUNK,
    )
    sock.sendall(replace(asked, **changes).pack())
    return LeaseAnswer.unpack(sock.recv(shm.ANSWER_BYTES, socket.MSG_WAITALL))


@pytest.mark.parametrize(
    "changes", [{"epoch": 1}, {"region_id": 999}, {"offset": 30_000}, {"nbytes": 2**40}], ids=str
)
def test_wrong_names_and_ranges_are_refused(node: Callable[..., Node], changes: dict[str, int]) -> None:
    source = node()
    with connected(source) as sock:
        assert lease(sock, source, **changes).status is Status.FENCED


def test_memory_outside_the_arena_is_not_leased(node: Callable[..., Node], synthetic: ModuleType) -> None:
    source = node()
    elsewhere = source.holder.table.add(source.checkpoint.memories()[0])
    with connected(source) as sock:
        answer = lease(sock, source, region_id=elsewhere.region_id)
        assert answer.status is Status.REFUSED


def test_memory_is_not_freed_while_it_is_leased(node: Callable[..., Node]) -> None:
    source = node()
    region = source.holder.holdings.get(source.checkpoint.manifest.digest).regions[0]
    with connected(source) as sock:
        assert lease(sock, source).status is Status.OK
        with pytest.raises(NoCapacityError, match="still being read"):
            source.holder.table.remove(region.region_id, deadline_s=0.05)
        sock.sendall(LeaseRequest(kind=Kind.RETURN, lease_id=7).pack())
        source.holder.table.remove(region.region_id, deadline_s=5)


def test_a_client_that_dies_gives_its_leases_back(node: Callable[..., Node]) -> None:
    source = node()
    region = source.holder.holdings.get(source.checkpoint.manifest.digest).regions[0]
    sock = connected(source)
    assert lease(sock, source).status is Status.OK
    sock.close()
    source.holder.table.remove(region.region_id, deadline_s=5)


def test_a_lease_that_is_kept_too_long_ends_before_the_memory_is_free(node: Callable[..., Node]) -> None:
    source = node(lease_s=0.1)
    region = source.holder.holdings.get(source.checkpoint.manifest.digest).regions[0]
    with connected(source) as sock:
        assert lease(sock, source).status is Status.OK
        source.holder.table.remove(region.region_id, deadline_s=5)
        # The memory may be used again from here on, and the late reader is told at once.
        with pytest.raises(BrokenPipeError):
            sock.sendall(LeaseRequest(kind=Kind.RETURN, lease_id=7).pack())


def test_what_was_copied_under_a_lost_lease_is_not_a_chunk(node: Callable[..., Node]) -> None:
    source = node(lease_s=0.1)
    target = Target(source)
    target.wait(ev.ChunksAnnounced)
    copying, go_on = threading.Event(), threading.Event()
    copy_in = target.link._landing.copy_in

    def slow(*arguments: Any, **options: Any) -> bool:
        copying.set()
        assert go_on.wait(10)
        return copy_in(*arguments, **options)

    target.link._landing.copy_in = slow  # type: ignore[method-assign]
    target.link.fetch(Chunk(segment=0, chunk=0))
    assert copying.wait(10)
    region = source.holder.holdings.get(source.checkpoint.manifest.digest).regions[0]
    source.holder.table.remove(region.region_id, deadline_s=5)  # waits for the lease's end
    go_on.set()
    # Whichever of the copying threads finds out first; none of them believes the chunk.
    came = [target.events.get(timeout=10)]
    while not isinstance(came[-1], ev.UpstreamEnded):
        came.append(target.events.get(timeout=10))
    assert not any(isinstance(event, ev.ChunkArrived | ev.ChunkCorrupt) for event in came)
    assert came[-1].reason in ("the peer closed the connection", "connection lost: Broken pipe")


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_an_agent_that_dies_or_stops_ends_the_transfer_s_hope_in_time(
    synthetic: ModuleType, tmp_path: Path, number: signal.Signals
) -> None:
    """The serving process is gone: its memory is still mapped here, and nothing is believed of it any more."""
    path = tmp_path / "m.sock"
    script = (
        "import sys,time;from pathlib import Path;from layercast_agent.arena import Arena;"
        "from layercast_agent.regions import RegionTable;from layercast_agent.transport.shm import ShmServer;"
        "a=Arena(1<<20);t=RegionTable(epoch=5);r=t.add(a.allocate(1000,unit=1000));"
        "s=ShmServer(t,arena=a,token=b'x',path=Path(sys.argv[1]));s.start();print(r.region_id,flush=True);"
        "sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdin is not None
        region_id = int(process.stdout.readline())
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            *_, descriptor = shm.connect(sock, path, token=b"x", deadline=Deadline(5))
            os.close(descriptor)
            process.send_signal(number)
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)  # it takes effect
            sock.settimeout(0.5)
            asked = LeaseRequest(kind=Kind.LEASE, lease_id=1, region_id=region_id, epoch=5, nbytes=10)
            with pytest.raises(OSError):  # a broken socket, or silence
                sock.sendall(asked.pack())
                if not sock.recv(1):
                    raise ConnectionResetError
    finally:
        process.kill()
        process.wait(10)
        for pipe in (process.stdout, process.stdin):
            assert pipe is not None
            pipe.close()


def test_a_peer_that_gives_no_descriptor_is_refused(tmp_path: Path) -> None:
    from layercast_agent.transport import wire

    path = tmp_path / "odd.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fspath(path))
        listener.listen(1)

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                wire.greet_as_server(sock, token=TOKEN, deadline=Deadline(5))
                sock.sendall(bytes(16))

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(PeerRefusedError, match="no memory"):
            map_now(path, token=TOKEN, deadline_s=5, maps=ArenaMaps())
        thread.join(10)
