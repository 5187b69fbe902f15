"""The agent's wire: AgentService for the operator and PeerService for peers.

Servicers translate and nothing more: a message in, a call, a message or a code out. What a command means is in
`agent`, what a peer may read in `holdings`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc
from grpc.aio import ServicerContext
from layercast.agent.v1alpha1 import agent_pb2 as pb
from layercast.agent.v1alpha1 import agent_pb2_grpc
from layercast.peer.v1alpha1 import peer_pb2, peer_pb2_grpc

from layercast_agent.agent import Agent
from layercast_agent.checkpoints import Wanted
from layercast_agent.holdings import SERVER_OPTIONS, Holdings
from layercast_agent.peer_manifest import MESSAGE_OPTIONS
from layercast_agent.tls import Tls, interceptors
from layercast_agent.workers import CommandError

GRPC_OPTIONS = (
    # Without it two agents could share a port and each get some of the calls.
    ("grpc.so_reuseport", 0),
    *MESSAGE_OPTIONS,
    *SERVER_OPTIONS,
)

CALLS_MAX = 4096
"""Calls at a time: a few of the operator, and one watch for each target in the cluster that might read here."""


class AgentServicer(agent_pb2_grpc.AgentServiceServicer):
    """AgentService; see agent.proto for what each call promises."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: ServicerContext[Any, Any]
    ) -> pb.GetStatusResponse:
        """Answers from memory."""
        return self._agent.status()

    async def PrepareCheckpoint(
        self, request: pb.PrepareCheckpointRequest, context: ServicerContext[Any, Any]
    ) -> pb.PrepareCheckpointResponse:
        """Orders it; the rest is in GetStatus."""
        wanted = Wanted(
            key=request.key,
            source=request.source,
            revision=request.revision,
            dtype=request.dtype,
            rank=request.rank,
            ranks=request.tensor_parallel or 1,
        )
        async with _codes(context):
            self._agent.checkpoints.prepare(wanted)
        return pb.PrepareCheckpointResponse()

    async def KeepCheckpoints(
        self, request: pb.KeepCheckpointsRequest, context: ServicerContext[Any, Any]
    ) -> pb.KeepCheckpointsResponse:
        """Remembers what must not make room for others."""
        self._agent.checkpoints.keep(request.keys)
        return pb.KeepCheckpointsResponse()

    async def StartReplica(
        self, request: pb.StartReplicaRequest, context: ServicerContext[Any, Any]
    ) -> pb.StartReplicaResponse:
        """Assigns a worker."""
        async with _codes(context):
            device_id = await self._agent.start_replica(request)
        return pb.StartReplicaResponse(device_id=device_id)

    async def StartTransfer(
        self, request: pb.StartTransferRequest, context: ServicerContext[Any, Any]
    ) -> pb.StartTransferResponse:
        """Feeds a replica."""
        async with _codes(context):
            await self._agent.start_transfer(request)
        return pb.StartTransferResponse()

    async def SetReplicaRole(
        self, request: pb.SetReplicaRoleRequest, context: ServicerContext[Any, Any]
    ) -> pb.SetReplicaRoleResponse:
        """Says what a replica does for requests."""
        async with _codes(context):
            await self._agent.set_replica_role(request)
        return pb.SetReplicaRoleResponse()

    async def DrainReplica(
        self, request: pb.DrainReplicaRequest, context: ServicerContext[Any, Any]
    ) -> pb.DrainReplicaResponse:
        """Stops new work."""
        async with _codes(context):
            await self._agent.drain_replica(request)
        return pb.DrainReplicaResponse()

    async def StopReplica(
        self, request: pb.StopReplicaRequest, context: ServicerContext[Any, Any]
    ) -> pb.StopReplicaResponse:
        """Frees the device."""
        async with _codes(context):
            await self._agent.stop_replica(request.replica_id)
        return pb.StopReplicaResponse()

    async def StartHostCopy(
        self, request: pb.StartHostCopyRequest, context: ServicerContext[Any, Any]
    ) -> pb.StartHostCopyResponse:
        """Begins, improves or rests a copy in host memory."""
        async with _codes(context):
            await self._agent.host_copies.start(request)
        return pb.StartHostCopyResponse()

    async def DropHostCopy(
        self, request: pb.DropHostCopyRequest, context: ServicerContext[Any, Any]
    ) -> pb.DropHostCopyResponse:
        """Gives its memory back."""
        async with _codes(context):
            await self._agent.host_copies.drop(request.digest)
        return pb.DropHostCopyResponse()


class PeerServicer(peer_pb2_grpc.PeerServiceServicer):
    """PeerService for the copies that the agent keeps; it executes nothing, so it takes no requests."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings

    async def GetManifest(
        self, request: peer_pb2.GetManifestRequest, context: ServicerContext[Any, Any]
    ) -> peer_pb2.GetManifestResponse:
        """What a checkpoint consists of."""
        return await self._holdings.get_manifest(request, context)

    async def WatchResidency(
        self, request: peer_pb2.WatchResidencyRequest, context: ServicerContext[Any, Any]
    ) -> AsyncIterator[peer_pb2.WatchResidencyResponse]:
        """Which chunks can be read here: all of them, and then silence until the copy goes."""
        async for message in self._holdings.watch_residency(request, context):
            yield message

    async def DescribeRegions(
        self, request: peer_pb2.DescribeRegionsRequest, context: ServicerContext[Any, Any]
    ) -> peer_pb2.DescribeRegionsResponse:
        """FAILED_PRECONDITION: an agent's copies are read through its data address."""
        return await self._holdings.describe_regions(request, context)

    async def StartCooperation(
        self, request: peer_pb2.StartCooperationRequest, context: ServicerContext[Any, Any]
    ) -> NoReturn:
        """UNIMPLEMENTED."""
        await _executes_nothing(context)

    async def OfferHandoffs(
        self, request: peer_pb2.OfferHandoffsRequest, context: ServicerContext[Any, Any]
    ) -> NoReturn:
        """UNIMPLEMENTED."""
        await _executes_nothing(context)

    async def TakeHandoff(
        self, request: peer_pb2.TakeHandoffRequest, context: ServicerContext[Any, Any]
    ) -> NoReturn:
        """UNIMPLEMENTED."""
        await _executes_nothing(context)

    async def ReleaseHandoff(
        self, request: peer_pb2.ReleaseHandoffRequest, context: ServicerContext[Any, Any]
    ) -> NoReturn:
        """UNIMPLEMENTED."""
        await _executes_nothing(context)

    async def RunStage(
        self, request: peer_pb2.RunStageRequest, context: ServicerContext[Any, Any]
    ) -> NoReturn:
        """UNIMPLEMENTED."""
        await _executes_nothing(context)

    async def ExtendSession(
        self, request: peer_pb2.ExtendSessionRequest, context: ServicerContext[Any, Any]
    ) -> NoReturn:
        """UNIMPLEMENTED."""
        await _executes_nothing(context)

    async def ReadStage(
        self, request: peer_pb2.ReadStageRequest, context: ServicerContext[Any, Any]
    ) -> NoReturn:
        """UNIMPLEMENTED."""
        await _executes_nothing(context)

    async def EndStage(
        self, request: peer_pb2.EndStageRequest, context: ServicerContext[Any, Any]
    ) -> NoReturn:
        """UNIMPLEMENTED."""
        await _executes_nothing(context)


def wire_server(agent: Agent, holdings: Holdings, tls: Tls | None = None) -> grpc.aio.Server:
    """A gRPC server with both services, not bound and not started."""
    server = grpc.aio.server(
        interceptors=interceptors(tls), options=GRPC_OPTIONS, maximum_concurrent_rpcs=CALLS_MAX
    )
    agent_pb2_grpc.add_AgentServiceServicer_to_server(AgentServicer(agent), server)
    peer_pb2_grpc.add_PeerServiceServicer_to_server(PeerServicer(holdings), server)
    return server


@contextlib.asynccontextmanager
async def _codes(context: ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Ends the call with the code of a refused command; anything else is a bug and ends as UNKNOWN."""
    try:
        yield
    except CommandError as error:
        await context.abort(error.code, str(error))


async def _executes_nothing(context: ServicerContext[Any, Any]) -> NoReturn:
    await context.abort(
        grpc.StatusCode.UNIMPLEMENTED, "an agent executes no requests; the workers of its node do"
    )
