"""Runs stages of pipelines that other replicas lead, and passes the hidden states on.

Used on the asyncio thread only. A session that its leader has forgotten (it died) ends by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import grpc
import torch
from layercast.peer.v1alpha1 import peer_pb2 as pb
from layercast.peer.v1alpha1 import peer_pb2_grpc

from layercast_agent.engine.stages import Stages, UnknownSessionError
from layercast_agent.errors import AgentError, CorruptChunkError, NoCapacityError, PeerError
from layercast_agent.regions import RegionRef, RegionTable
from layercast_agent.tls import Tls, aio_channel
from layercast_agent.transport.tcp import read_region
from layercast_agent.worker.engine_loop import EngineLoop
from layercast_agent.worker.handoffs import REMOVE_DEADLINE_S, StateBytes, region_message

log = logging.getLogger(__name__)

T = TypeVar("T")

STAGE_DEADLINE_S = 30.0
"""For one stage and all that follow it: prefill of a long prompt on a slow device."""

IDLE_SESSION_S = 60.0
"""A leader that says nothing about a session for so long is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCall:
    """What a stage is to run, and where the result goes: `stages` begins with the stage itself."""

    session: str
    digest: str
    start: int
    positions_max: int
    stages: tuple[pb.StageRange, ...]


class StageFailedError(PeerError):
    """A stage, this one or a later one, could not do its part; the leader starts the session anew."""


class PartialReplicaError(AgentError):
    """Only a complete replica of the same checkpoint can do that."""


class StageHost:
    """Stages of one replica, its own pipelines' and those of others."""

    def __init__(
        self,
        *,
        me: pb.Peer,
        token: bytes,
        tls: Tls | None,
        digest: str,
        loop: EngineLoop,
        table: RegionTable,
        dtype: torch.dtype,
    ) -> None:
        self._me = me
        self._token = token
        self._tls = tls
        self._digest = digest
        self._loop = loop
        self._table = table
        self._dtype = dtype
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._heard_at: dict[str, float] = {}
        self._arrivals: dict[str, asyncio.Future[torch.Tensor]] = {}
        self._offered: dict[str, int] = {}
        self.run_count = 0

    # What other replicas ask

    async def run(self, request: pb.RunStageRequest) -> None:
        """PeerService.RunStage. Raises AgentError."""
        if request.digest != self._digest:
            raise UnknownSessionError("another checkpoint is here")
        data = await self._read(request.giver, request.hidden, request.crc32)
        hidden = torch.frombuffer(data, dtype=self._dtype).view(request.count, -1)
        call = StageCall(
            session=request.session,
            digest=request.digest,
            start=request.start,
            positions_max=request.positions_max,
            stages=tuple(request.stages),
        )
        here = call.stages[0]
        if here.first == here.last:
            self._arrived(call.session, hidden)
            return
        await self.step(call, hidden)

    async def read(self, request: pb.ReadStageRequest) -> pb.ReadStageResponse:
        """PeerService.ReadStage. Raises UnknownSessionError."""
        memory = StateBytes(await self._kv(request))
        self._withdraw(request.session)
        region = self._table.add(memory)
        self._offered[request.session] = region.region_id
        return pb.ReadStageResponse(state=region_message(region), crc32=memory.crc32)

    async def extend(self, request: pb.ExtendSessionRequest) -> None:
        """PeerService.ExtendSession. Raises AgentError."""
        if request.digest != self._digest or not self._loop.complete:
            raise PartialReplicaError("another checkpoint, or not all of it, is here")
        with self._hearing(request.session):
            await self._extend(request)

    async def _extend(self, request: pb.ExtendSessionRequest) -> None:
        name, start, longest = request.session, request.start, request.positions_max
        if not request.HasField("state"):
            tokens = list(request.token_ids)
            await asyncio.wrap_future(
                self._loop.execute(
                    lambda engine: engine.moves.extend(name, tokens, start=start, positions_max=longest)
                )
            )
            return
        data = await self._read(request.giver, request.state, request.crc32)
        kv = torch.frombuffer(data, dtype=torch.uint8)
        first, last = request.first_layer, request.last_layer
        await self._ask(
            lambda stages: stages.write(name, kv, first=first, last=last, start=start, positions_max=longest)
        )

    def settled(self, session: str) -> None:
        """The session became an ordinary request."""
        self._heard_at.pop(session, None)

    async def end(self, session: str) -> None:
        """PeerService.EndStage. Cancelled in the middle, the session is still known, and ends by itself."""
        self._withdraw(session)
        await self._ask(lambda stages: stages.end(session))
        self._heard_at.pop(session, None)

    async def expire(self) -> None:
        """Ends the sessions whose leaders are gone; to be called now and then."""
        now = time.monotonic()
        for session in [name for name, at in self._heard_at.items() if now - at > IDLE_SESSION_S]:
            log.warning("the leader of a session is gone", extra={"session": session})
            await self.end(session)

    # The way along a pipeline

    async def step(self, call: StageCall, hidden: torch.Tensor) -> None:
        """Runs the first stage of `call` here and sees the result through the others. Raises AgentError."""
        here = call.stages[0]
        with self._hearing(call.session):
            result = await asyncio.wrap_future(
                self._loop.execute(
                    lambda engine: engine.stages.run(
                        call.session,
                        hidden,
                        first=here.first,
                        last=here.last,
                        start=call.start,
                        positions_max=call.positions_max,
                    )
                )
            )
        self.run_count += 1
        await self.pass_on(call, result, call.stages[1:])

    @contextlib.contextmanager
    def _hearing(self, session: str) -> Iterator[None]:
        """Its leader spoke. Noted again afterwards: an end in between must not leave what is then opened for ever."""
        self._heard_at[session] = time.monotonic()
        try:
            yield
        finally:
            self._heard_at[session] = time.monotonic()

    async def pass_on(self, call: StageCall, hidden: torch.Tensor, stages: tuple[pb.StageRange, ...]) -> None:
        """Gives hidden states to the first of `stages`, and returns when the last one has them."""
        following = stages[0]
        if following.peer.peer_id == self._me.peer_id:
            await self._here(call, hidden, stages)
            return
        with self.lent(hidden.contiguous().flatten().view(torch.uint8)) as (region, crc32):
            request = pb.RunStageRequest(
                session=call.session,
                digest=call.digest,
                start=call.start,
                count=hidden.shape[0],
                positions_max=call.positions_max,
                giver=self._me,
                hidden=region,
                crc32=crc32,
                stages=stages,
            )
            with _told_as_failure(following.peer):
                await self.stub(following.peer).RunStage(request, timeout=STAGE_DEADLINE_S)

    async def _here(self, call: StageCall, hidden: torch.Tensor, stages: tuple[pb.StageRange, ...]) -> None:
        following = stages[0]
        if following.first == following.last:
            self._arrived(call.session, hidden)
            return
        again = StageCall(
            session=call.session,
            digest=call.digest,
            start=call.start,
            positions_max=call.positions_max,
            stages=stages,
        )
        await self.step(again, hidden)

    # The leader's end

    async def through(self, call: StageCall, hidden: torch.Tensor) -> torch.Tensor:
        """Sends hidden states through all stages and returns what comes out of the last one. Raises AgentError."""
        arrival: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()
        self._arrivals[call.session] = arrival
        self._heard_at[call.session] = time.monotonic()
        end = pb.StageRange(peer=self._me)
        try:
            await self.pass_on(call, hidden, (*call.stages, end))
            if not arrival.done():
                raise StageFailedError("the pipeline ended without its result")
            return arrival.result()
        finally:
            self._arrivals.pop(call.session, None)

    async def fetch(self, peer: pb.Peer, request: pb.ReadStageRequest) -> torch.Tensor:
        """KV of a session at a member, this one too: uint8 on the host. Raises PeerError."""
        if peer.peer_id == self._me.peer_id:
            return await self._kv(request)
        with _told_as_failure(peer):
            answer = await self.stub(peer).ReadStage(request, timeout=STAGE_DEADLINE_S)
        return torch.frombuffer(await self._read(peer, answer.state, answer.crc32), dtype=torch.uint8)

    async def extend_at(self, peer: pb.Peer, request: pb.ExtendSessionRequest) -> None:
        """Brings more of a request to another replica. Raises StageFailedError."""
        with _told_as_failure(peer):
            await self.stub(peer).ExtendSession(request, timeout=STAGE_DEADLINE_S)

    async def end_at(self, peer: pb.Peer, session: str) -> None:
        """Frees a session at a member; one that cannot be reached frees it by itself."""
        if peer.peer_id == self._me.peer_id:
            await self.end(session)
            return
        try:
            await self.stub(peer).EndStage(pb.EndStageRequest(session=session), timeout=STAGE_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            log.info("a session was not ended", extra={"peer": peer.peer_id, "reason": error.details()})

    def stub(self, peer: pb.Peer) -> peer_pb2_grpc.PeerServiceAsyncStub:
        """The peer's service, over one channel."""
        channel = self._channels.get(peer.address)
        if channel is None:
            channel = self._channels[peer.address] = aio_channel(peer.address, self._tls)
        return peer_pb2_grpc.PeerServiceStub(channel)

    async def close(self) -> None:
        """Closes the channels; the engine's thread has ended or ends now."""
        channels, self._channels = list(self._channels.values()), {}
        for channel in channels:
            await channel.close()

    # Small things

    @contextlib.contextmanager
    def lent(self, data: torch.Tensor) -> Iterator[tuple[pb.Region, int]]:
        """Bytes that a peer may read during the block: where they are, and their crc32."""
        memory = StateBytes(data)
        region = self._table.add(memory)
        try:
            yield region_message(region), memory.crc32
        finally:
            self._free(region.region_id)

    def _arrived(self, session: str, hidden: torch.Tensor) -> None:
        arrival = self._arrivals.get(session)
        if arrival is not None and not arrival.done():
            arrival.set_result(hidden)

    async def _kv(self, request: pb.ReadStageRequest) -> torch.Tensor:
        return await self._ask(
            lambda stages: stages.read(
                request.session, first=request.first, last=request.last, positions=request.positions
            )
        )

    async def _ask(self, function: Callable[[Stages], T]) -> T:
        return await asyncio.wrap_future(self._loop.call(lambda engine: function(engine.stages)))

    async def _read(self, giver: pb.Peer, region: pb.Region, crc32: int) -> bytearray:
        place = RegionRef(region_id=region.region_id, epoch=region.epoch, nbytes=region.size_bytes)
        data = await asyncio.to_thread(
            read_region,
            giver.data_address,
            token=self._token,
            tls=self._tls,
            region=place,
            deadline_s=STAGE_DEADLINE_S,
        )
        if zlib.crc32(data) != crc32:
            raise CorruptChunkError(f"a region of {giver.peer_id} does not match its checksum")
        return data

    def _withdraw(self, session: str) -> None:
        region_id = self._offered.pop(session, None)
        if region_id is not None:
            self._free(region_id)

    def _free(self, region_id: int) -> None:
        asyncio.get_running_loop().run_in_executor(
            None, lambda: self._table.remove(region_id, deadline_s=REMOVE_DEADLINE_S)
        )


@contextlib.contextmanager
def _told_as_failure(peer: pb.Peer) -> Iterator[None]:
    """No exception of gRPC leaves this file."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise StageFailedError(f"{peer.peer_id}: {error.code().name}: {error.details()}") from error


def status_of(error: AgentError) -> grpc.StatusCode:
    """The code of peer.proto's table for RunStage."""
    match error:
        case UnknownSessionError():
            return grpc.StatusCode.NOT_FOUND
        case NoCapacityError():
            return grpc.StatusCode.RESOURCE_EXHAUSTED
        case PeerError():
            return grpc.StatusCode.UNAVAILABLE
        case _:
            return grpc.StatusCode.FAILED_PRECONDITION
