"""Asks a peer for the manifest of a checkpoint that this node's disk does not hold, and believes nothing unchecked.

A wrong manifest would lead bytes to wrong places, so everything is compared with the digest that was asked for:
the manifest names itself by it, and names the content of its small files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import grpc
from layercast.peer.v1alpha1 import peer_pb2, peer_pb2_grpc

from layercast_agent.errors import CheckpointError, PeerLostError, PeerRefusedError
from layercast_agent.layout import Manifest
from layercast_agent.tls import Tls, aio_channel

MESSAGE_BYTES_MAX = 64 * 1024 * 1024
"""A manifest and its small files in one message: tokenizers of 30 MB exist."""

MESSAGE_OPTIONS = (
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
)


async def fetch_manifest(
    peer: peer_pb2.Peer, *, digest: str, deadline_s: float, tls: Tls | None = None
) -> tuple[bytes, Mapping[str, bytes]]:
    """PeerService.GetManifest of `peer`: the manifest as JSON, and the small files by name.

    PeerLostError when it cannot be reached in time or none is given; PeerRefusedError when it does not hold the
    checkpoint or what it gives is not that checkpoint.
    """
    if not peer.address:
        raise PeerLostError(f"checkpoint {digest} is not on this node's disk, and no manifest_peer is given")
    request = peer_pb2.GetManifestRequest(digest=digest)
    try:
        async with aio_channel(peer.address, tls, options=MESSAGE_OPTIONS) as channel:
            answer = await peer_pb2_grpc.PeerServiceStub(channel).GetManifest(request, timeout=deadline_s)
    except grpc.aio.AioRpcError as error:
        kind = PeerRefusedError if error.code() is grpc.StatusCode.NOT_FOUND else PeerLostError
        why = error.details() or error.code().name
        raise kind(f"peer {peer.peer_id} at {peer.address} gives no manifest: {why}") from None
    try:
        _check(answer, digest)
    except CheckpointError as error:
        raise PeerRefusedError(f"peer {peer.peer_id} at {peer.address} gives a wrong one: {error}") from error
    return answer.manifest_json, answer.files


def _check(answer: peer_pb2.GetManifestResponse, digest: str) -> None:
    manifest = Manifest.from_json(answer.manifest_json)
    if manifest.digest != digest:
        raise CheckpointError(f"the manifest is that of {manifest.digest}, not of {digest}")
    if set(answer.files) != set(manifest.file_names):
        raise CheckpointError("the small files are not those that the manifest names")
    for name, sha256 in zip(manifest.file_names, manifest.file_sha256, strict=True):
        if hashlib.sha256(answer.files[name]).hexdigest() != sha256:
            raise CheckpointError("a small file does not match the manifest", file=name)
