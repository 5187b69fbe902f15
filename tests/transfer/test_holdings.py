"""What peers are told of a checkpoint: everything first, then what changes, and when it goes."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import grpc
import pytest
from layercast.peer.v1alpha1 import peer_pb2, peer_pb2_grpc

from layercast_agent.layout import Manifest


@pytest.fixture
def stub_of() -> Iterator[Callable[[Any], peer_pb2_grpc.PeerServiceStub]]:
    """Stubs whose channels are closed after the test."""
    channels: list[grpc.Channel] = []

    def open_stub(holder: Any) -> peer_pb2_grpc.PeerServiceStub:
        channels.append(grpc.insecure_channel(f"127.0.0.1:{holder.port}"))
        return peer_pb2_grpc.PeerServiceStub(channels[-1])

    yield open_stub
    for channel in channels:
        channel.close()


def test_a_watch_starts_with_everything_and_goes_on_with_changes(
    synthetic: ModuleType, holder: Callable[..., Any], stub_of: Callable[[Any], Any]
) -> None:
    checkpoint = synthetic.make([35, 20, 10], chunk_bytes=10)
    peer = holder(checkpoint, complete=False)
    peer.residency.mark(0, 3)
    request = peer_pb2.WatchResidencyRequest(digest=checkpoint.manifest.digest)
    stream = stub_of(peer).WatchResidency(request, timeout=10)
    first = next(stream)
    assert [(s.segment, s.verified_chunks) for s in first.segments] == [
        (0, b"\x08"),
        (1, b"\x00"),
        (2, b"\x00"),
    ]
    assert [s.region.size_bytes for s in first.segments] == [35, 20, 10]
    regions = {s.region.region_id for s in first.segments}
    assert len(regions) == 3
    peer.residency.mark(1, 1)
    second = next(stream)
    assert [(s.segment, s.verified_chunks) for s in second.segments] == [(1, b"\x02")]
    assert second.segments[0].region == first.segments[1].region
    stream.cancel()


def test_bursts_are_told_in_few_messages(
    synthetic: ModuleType, holder: Callable[..., Any], stub_of: Callable[[Any], Any]
) -> None:
    checkpoint = synthetic.make([5000, 10, 10], chunk_bytes=10)
    peer = holder(checkpoint, complete=False)
    request = peer_pb2.WatchResidencyRequest(digest=checkpoint.manifest.digest)
    stream = stub_of(peer).WatchResidency(request, timeout=10)
    next(stream)
    for chunk in range(500):
        peer.residency.mark(0, chunk)
    messages = 0
    bitmap = b""
    while bitmap != peer.residency.bitmap(0):
        bitmap = next(stream).segments[0].verified_chunks
        messages += 1
    assert messages < 100
    stream.cancel()


def test_unknown_checkpoints_are_not_found(
    synthetic: ModuleType, holder: Callable[..., Any], stub_of: Callable[[Any], Any]
) -> None:
    stub = stub_of(holder(synthetic.make([35, 20, 10], chunk_bytes=10)))
    calls: list[Callable[[], Any]] = [
        functools.partial(stub.GetManifest, peer_pb2.GetManifestRequest(digest="other"), timeout=10),
        lambda: next(stub.WatchResidency(peer_pb2.WatchResidencyRequest(digest="other"), timeout=10)),
    ]
    for call in calls:
        with pytest.raises(grpc.RpcError) as error:
            call()
        assert error.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_watchers_are_sent_away_when_the_holding_goes(
    synthetic: ModuleType, holder: Callable[..., Any], stub_of: Callable[[Any], Any], how: str
) -> None:
    checkpoint = synthetic.make([35, 20, 10], chunk_bytes=10)
    peer = holder(checkpoint)
    digest = checkpoint.manifest.digest
    stream = stub_of(peer).WatchResidency(peer_pb2.WatchResidencyRequest(digest=digest), timeout=10)
    next(stream)
    held = peer.holdings.get(digest)
    if how == "removed":
        peer.holdings.remove(digest)
        assert peer.holdings.get(digest) is None
    else:
        peer.holdings.add(
            type(held)(manifest=held.manifest, files={}, residency=held.residency, regions=held.regions)
        )
    with pytest.raises(grpc.RpcError) as error:
        next(stream)
    assert error.value.code() is grpc.StatusCode.ABORTED
    peer.holdings.remove("never held")


def test_manifests_come_with_their_small_files(
    synthetic: ModuleType, holder: Callable[..., Any], stub_of: Callable[[Any], Any]
) -> None:
    checkpoint = synthetic.make([35, 20, 10], chunk_bytes=10)
    request = peer_pb2.GetManifestRequest(digest=checkpoint.manifest.digest)
    answer = stub_of(holder(checkpoint)).GetManifest(request, timeout=10)
    assert answer.manifest_json == checkpoint.manifest.to_json()
    assert isinstance(checkpoint.manifest, Manifest)
    assert dict(answer.files) == {"config.json": b"{}"}


def test_watchers_that_leave_are_forgotten(
    synthetic: ModuleType, holder: Callable[..., Any], stub_of: Callable[[Any], Any]
) -> None:
    checkpoint = synthetic.make([35, 20, 10], chunk_bytes=10)
    peer = holder(checkpoint)
    request = peer_pb2.WatchResidencyRequest(digest=checkpoint.manifest.digest)
    streams = [stub_of(peer).WatchResidency(request, timeout=10) for _ in range(3)]
    for stream in streams:
        next(stream)
    assert peer.holdings.watchers == 3
    for stream in streams:
        stream.cancel()
    changed = threading.Event()
    for _ in range(400):
        if not peer.holdings.watchers:
            return
        changed.wait(0.02)
    raise AssertionError(f"{peer.holdings.watchers} watchers are left")
