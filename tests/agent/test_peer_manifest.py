"""A manifest from a peer: believed only when it is that of the digest that was asked for, files included."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from layercast.peer.v1alpha1 import peer_pb2, peer_pb2_grpc

from layercast_agent.errors import PeerError, PeerLostError, PeerRefusedError
from layercast_agent.layout import Manifest
from layercast_agent.peer_manifest import fetch_manifest
from layercast_agent.store import Store

WRONG = "f" * 64


class OnePeer(peer_pb2_grpc.PeerServiceServicer):
    """A peer that gives this answer to everybody, or NOT_FOUND."""

    def __init__(self, answer: peer_pb2.GetManifestResponse | None) -> None:
        self.answer = answer

    async def GetManifest(self, request: Any, context: Any) -> peer_pb2.GetManifestResponse:
        if self.answer is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "it is not held here")
            raise AssertionError("abort raises")
        return self.answer


@contextlib.asynccontextmanager
async def peer_that_gives(answer: peer_pb2.GetManifestResponse | None) -> AsyncIterator[peer_pb2.Peer]:
    server = grpc.aio.server()
    peer_pb2_grpc.add_PeerServiceServicer_to_server(OnePeer(answer), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield peer_pb2.Peer(peer_id="x", address=f"127.0.0.1:{port}")
    finally:
        await server.stop(0)


@pytest.fixture
def truth(packed: Path) -> peer_pb2.GetManifestResponse:
    store = Store(packed)
    ((digest, manifest),) = store.manifests().items()
    return peer_pb2.GetManifestResponse(manifest_json=manifest.to_json(), files=store.files(digest))


def digest_of(answer: peer_pb2.GetManifestResponse) -> str:
    return Manifest.from_json(answer.manifest_json).digest


async def test_the_truth_is_believed(truth: peer_pb2.GetManifestResponse) -> None:
    async with peer_that_gives(truth) as peer:
        manifest_json, files = await fetch_manifest(peer, digest=digest_of(truth), deadline_s=5)
    assert manifest_json == truth.manifest_json
    assert dict(files) == dict(truth.files)


def change_file(answer: peer_pb2.GetManifestResponse) -> None:
    answer.files["config.json"] = b"{}"


def drop_file(answer: peer_pb2.GetManifestResponse) -> None:
    del answer.files["config.json"]


def add_file(answer: peer_pb2.GetManifestResponse) -> None:
    answer.files["../../passwd"] = b""


def cut_manifest(answer: peer_pb2.GetManifestResponse) -> None:
    answer.manifest_json = answer.manifest_json[:-1]


def change_manifest(answer: peer_pb2.GetManifestResponse) -> None:
    answer.manifest_json = answer.manifest_json.replace(b'"chunk_crc32":[', b'"chunk_crc32":[1', 1)


@pytest.mark.parametrize(
    ("lie", "text"),
    [
        (change_file, "a small file does not match the manifest (file config.json)"),
        (drop_file, "not those that the manifest names"),
        (add_file, "not those that the manifest names"),
        (cut_manifest, "malformed"),
        (change_manifest, "does not match its digest"),
    ],
)
async def test_a_lie_is_refused(
    truth: peer_pb2.GetManifestResponse, lie: Callable[[peer_pb2.GetManifestResponse], None], text: str
) -> None:
    digest = digest_of(truth)
    lie(truth)
    async with peer_that_gives(truth) as peer:
        with pytest.raises(PeerRefusedError) as refused:
            await fetch_manifest(peer, digest=digest, deadline_s=5)
    assert text in str(refused.value)
    assert "peer x at 127.0.0.1:" in str(refused.value)


async def test_another_checkpoints_manifest_is_refused(truth: peer_pb2.GetManifestResponse) -> None:
    async with peer_that_gives(truth) as peer:
        with pytest.raises(PeerRefusedError, match=f"not of {WRONG}"):
            await fetch_manifest(peer, digest=WRONG, deadline_s=5)


@pytest.mark.parametrize(
    ("peer", "text"),
    [
        (peer_pb2.Peer(), "no manifest_peer is given"),
        (peer_pb2.Peer(peer_id="dead", address="127.0.0.1:1"), "peer dead at 127.0.0.1:1 gives no manifest"),
    ],
)
async def test_nobody_there(peer: peer_pb2.Peer, text: str) -> None:
    with pytest.raises(PeerLostError, match=text):
        await fetch_manifest(peer, digest=WRONG, deadline_s=2)


async def test_not_held_there() -> None:
    async with peer_that_gives(None) as peer:
        with pytest.raises(PeerError, match="it is not held here"):
            await fetch_manifest(peer, digest=WRONG, deadline_s=5)
