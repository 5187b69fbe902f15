"""The agent's wire: AgentService for the operator, PeerService for peers, and the parts behind them put together.

Servicers translate and nothing more: a message in, a call, a message or a code out.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, NoReturn

import grpc
from layercast.agent.v1alpha1 import agent_pb2 as pb
from layercast.agent.v1alpha1 import agent_pb2_grpc
from layercast.peer.v1alpha1 import peer_pb2, peer_pb2_grpc

from layercast_agent.agent import Agent
from layercast_agent.checkpoints import Checkpoints, Wanted, measure_disk
from layercast_agent.health import WorkerLimits
from layercast_agent.holdings import SERVER_OPTIONS, Holdings
from layercast_agent.metrics import MetricsServer, Observation
from layercast_agent.peer_manifest import MESSAGE_OPTIONS
from layercast_agent.regions import RegionTable
from layercast_agent.settings import AgentSettings, SettingsError, device_slots, parse_address
from layercast_agent.store import Store
from layercast_agent.transport.tcp import EgressLimiter, TcpServer
from layercast_agent.workers import CommandError, Worker

log = logging.getLogger(__name__)

GRPC_OPTIONS = (
    # Without it two agents could share a port and each get some of the calls.
    ("grpc.so_reuseport", 0),
    *MESSAGE_OPTIONS,
    *SERVER_OPTIONS,
)

CALLS_GRACE_S = 0.5
"""How long calls may go on once the agent ends; status calls take milliseconds, watches end with their holder."""


class AgentServicer(agent_pb2_grpc.AgentServiceServicer):
    """AgentService."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def GetStatus(  # type: ignore[override]
        self, request: pb.GetStatusRequest, context: grpc.aio.ServicerContext[pb.GetStatusRequest, pb.GetStatusResponse]
    ) -> pb.GetStatusResponse:
        return self._agent.status()
