"""What every assignment of a worker shares: its device, its data plane, its gateways."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from layercast.peer.v1alpha1 import peer_pb2

from layercast_agent.holdings import Holdings
from layercast_agent.host_memory import Reserve
from layercast_agent.rdma import Verdict
from layercast_agent.read_bytes import ReadBytes
from layercast_agent.regions import RegionTable
from layercast_agent.tls import Tls
from layercast_agent.transport.nixl import NixlPlane
from layercast_agent.worker.pacing import ComputeShare
from layercast_agent.worker.settings import WorkerSettings
from layercast_agent.worker.streams import GatewayStreams


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHost:
    """Made once at the worker's start."""

    settings: WorkerSettings
    device: torch.device
    address: str
    data_address: str
    table: RegionTable
    holdings: Holdings
    streams: GatewayStreams
    share: ComputeShare
    tls: Tls | None
    plane: NixlPlane | None
    """One-sided reads; None where the node has no RDMA."""
    verdict: Verdict
    """Why they are used or not."""
    read_bytes: ReadBytes
    reserve: Reserve | None
    """Touched memory that the parameters of a CPU device land in when they fit."""

    def peer(self, replica_id: str) -> peer_pb2.Peer:
        """How others reach the replica on this worker."""
        return peer_pb2.Peer(peer_id=replica_id, address=self.address, data_address=self.data_address)
