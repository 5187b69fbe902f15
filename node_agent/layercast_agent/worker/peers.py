"""PeerService of a worker: its residency, and requests that move between replicas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc
from grpc import aio
from layercast.agent.v1alpha1 import agent_pb2
from layercast.peer.v1alpha1 import peer_pb2 as pb
from layercast.peer.v1alpha1 import peer_pb2_grpc

from layercast_agent.errors import AgentError
from layercast_agent.holdings import Holdings
from layercast_agent.worker.replica import Replica
from layercast_agent.worker.stage_host import status_of


class PeerServicer(peer_pb2_grpc.PeerServiceServicer):
    """The gRPC face of the worker towards other workers and agents; contracts in peer.proto."""

    def __init__(self, *, holdings: Holdings, replica: Callable[[], Replica | None]) -> None:
        self._holdings = holdings
        self._replica = replica

    async def GetManifest(
        self,
        request: pb.GetManifestRequest,
        context: aio.ServicerContext[pb.GetManifestRequest, pb.GetManifestResponse],
    ) -> pb.GetManifestResponse:
        return await self._holdings.get_manifest(request, context)

    async def WatchResidency(
        self,
        request: pb.WatchResidencyRequest,
        context: aio.ServicerContext[pb.WatchResidencyRequest, pb.WatchResidencyResponse],
    ) -> AsyncIterator[pb.WatchResidencyResponse]:
        async for message in self._holdings.watch_residency(request, context):
            yield message

    async def DescribeRegions(
        self,
        request: pb.DescribeRegionsRequest,
        context: aio.ServicerContext[pb.DescribeRegionsRequest, pb.DescribeRegionsResponse],
    ) -> pb.DescribeRegionsResponse:
        return await self._holdings.describe_regions(request, context)

    async def StartCooperation(
        self,
        request: pb.StartCooperationRequest,
        context: aio.ServicerContext[pb.StartCooperationRequest, pb.StartCooperationResponse],
    ) -> pb.StartCooperationResponse:
        replica = self._replica()
        if replica is None or replica.spec.digest != request.digest:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another checkpoint is served here")
        elif replica.state == agent_pb2.REPLICA_STATE_SERVING:
            replica.cooperation.add_target(request.target)
        elif replica.state == agent_pb2.REPLICA_STATE_LEADING and replica.pipeline is not None:
            replica.pipeline.admit(request.target)
        else:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this replica is not serving")
        return pb.StartCooperationResponse()

    async def OfferHandoffs(
        self,
        request: pb.OfferHandoffsRequest,
        context: aio.ServicerContext[pb.OfferHandoffsRequest, pb.OfferHandoffsResponse],
    ) -> pb.OfferHandoffsResponse:
        replica = self._replica()
        if replica is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no replica is here any more")
            return pb.OfferHandoffsResponse()
        # A caller that dies cancels the call: what was begun is finished, or a request would be owned and run nowhere.
        return await asyncio.shield(replica.accept_offers(request))

    async def TakeHandoff(
        self,
        request: pb.TakeHandoffRequest,
        context: aio.ServicerContext[pb.TakeHandoffRequest, pb.TakeHandoffResponse],
    ) -> pb.TakeHandoffResponse:
        replica = self._replica()
        try:
            if replica is not None:
                return await asyncio.shield(replica.give(request))
        except AgentError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        await context.abort(grpc.StatusCode.UNAVAILABLE, "no replica is here any more")
        return pb.TakeHandoffResponse()

    async def ReleaseHandoff(
        self,
        request: pb.ReleaseHandoffRequest,
        context: aio.ServicerContext[pb.ReleaseHandoffRequest, pb.ReleaseHandoffResponse],
    ) -> pb.ReleaseHandoffResponse:
        replica = self._replica()
        if replica is not None:
            await asyncio.shield(replica.release(request))
        return pb.ReleaseHandoffResponse()

    async def RunStage(
        self,
        request: pb.RunStageRequest,
        context: aio.ServicerContext[pb.RunStageRequest, pb.RunStageResponse],
    ) -> pb.RunStageResponse:
        replica = self._replica()
        if replica is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no replica is here any more")
            return pb.RunStageResponse()
        try:
            await replica.stages.run(request)
        except AgentError as error:
            await context.abort(status_of(error), str(error))
        return pb.RunStageResponse()

    async def ExtendSession(
        self,
        request: pb.ExtendSessionRequest,
        context: aio.ServicerContext[pb.ExtendSessionRequest, pb.ExtendSessionResponse],
    ) -> pb.ExtendSessionResponse:
        replica = self._replica()
        if replica is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no replica is here any more")
            return pb.ExtendSessionResponse()
        try:
            await replica.stages.extend(request)
        except AgentError as error:
            await context.abort(status_of(error), str(error))
        return pb.ExtendSessionResponse()

    async def ReadStage(
        self,
        request: pb.ReadStageRequest,
        context: aio.ServicerContext[pb.ReadStageRequest, pb.ReadStageResponse],
    ) -> pb.ReadStageResponse:
        replica = self._replica()
        if replica is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no replica is here any more")
            return pb.ReadStageResponse()
        try:
            return await replica.stages.read(request)
        except AgentError as error:
            await context.abort(status_of(error), str(error))
        return pb.ReadStageResponse()

    async def EndStage(
        self,
        request: pb.EndStageRequest,
        context: aio.ServicerContext[pb.EndStageRequest, pb.EndStageResponse],
    ) -> pb.EndStageResponse:
        replica = self._replica()
        if replica is not None:
            await replica.stages.end(request.session)
        return pb.EndStageResponse()
