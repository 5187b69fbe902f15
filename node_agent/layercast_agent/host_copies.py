"""The operator's commands about host copies, turned into calls of the pool: manifests fetched, upstreams named.

Blocking work happens on threads; a command that has begun is finished even when its caller hangs up.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
from layercast.agent.v1alpha1 import agent_pb2 as pb

from layercast_agent.checkpoints import Checkpoints
from layercast_agent.errors import PeerError
from layercast_agent.layout import Manifest
from layercast_agent.peer_manifest import fetch_manifest
from layercast_agent.pool import HostPool
from layercast_agent.runner import UpstreamSpec
from layercast_agent.tls import Tls
from layercast_agent.workers import CommandError

MANIFEST_S = 5.0
"""A peer's answer with manifest and small files."""


class HostCopies:
    """Commands of one node. Used on the asyncio thread only."""

    def __init__(
        self, *, node: str, pool: HostPool, checkpoints: Checkpoints, socket: Path, tls: Tls | None = None
    ) -> None:
        """`socket` is where workers of this node map the pool's memory."""
        self.pool = pool
        self._node = node
        self._checkpoints = checkpoints
        self._socket = socket
        self._tls = tls

    def socket_for(self, digest: str) -> str:
        """Where a worker maps this node's copy of a checkpoint; empty when there is none."""
        return str(self._socket) if self.pool.holds(digest) else ""

    async def start(self, request: pb.StartHostCopyRequest) -> None:
        """AgentService.StartHostCopy. CommandError with a code of its table."""
        if not request.digest:
            raise CommandError(grpc.StatusCode.INVALID_ARGUMENT, "digest is missing")
        upstreams = self._upstreams(request)
        if self.pool.improve(request.digest, upstreams, request.generation):
            return
        held = self._checkpoints.held(request.digest)
        if held is not None:
            manifest, files = held.manifest, held.files
        else:
            try:
                manifest_json, files = await fetch_manifest(
                    request.manifest_peer, digest=request.digest, deadline_s=MANIFEST_S, tls=self._tls
                )
            except PeerError as error:
                raise CommandError(grpc.StatusCode.UNAVAILABLE, str(error)) from error
            manifest = Manifest.from_json(manifest_json)
        # A copy that failed is dropped first, which waits for whoever still reads from it.
        begun = asyncio.to_thread(
            self.pool.start,
            manifest=manifest,
            files=files,
            upstreams=upstreams,
            generation=request.generation,
        )
        await asyncio.shield(begun)

    async def drop(self, digest: str) -> None:
        """AgentService.DropHostCopy. CommandError with a code of its table."""
        await asyncio.shield(asyncio.to_thread(self.pool.drop, digest))

    def _upstreams(self, request: pb.StartHostCopyRequest) -> list[UpstreamSpec]:
        """Without those that mean a copy on disk which is not there, and without this agent itself."""
        specs = []
        for upstream in request.upstreams:
            peer = upstream.peer
            if not upstream.local_disk and peer.peer_id != self._node:
                specs.append(
                    UpstreamSpec(peer_id=peer.peer_id, address=peer.address, data_address=peer.data_address)
                )
            elif self._checkpoints.held(request.digest) is not None:
                folder = self._checkpoints.folder(request.digest)
                rate = self._checkpoints.disk_bytes_per_s
                specs.append(UpstreamSpec(peer_id="disk", local_folder=folder, disk_bytes_per_s=rate))
        return list(dict.fromkeys(specs))
