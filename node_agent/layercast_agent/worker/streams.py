"""EngineService: the one stream of each gateway, and what is owed to gateways that went away.

Events are put into a gateway's outbox on the asyncio thread; everything that piled up since the last message leaves
in one message. An outbox is bounded: a gateway that does not read loses its stream and replays.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from typing import Protocol

import grpc
from layercast.engine.v1alpha1 import engine_pb2 as pb
from layercast.engine.v1alpha1 import engine_pb2_grpc

log = logging.getLogger(__name__)

EVENTS_WAITING_MAX = 50_000
"""Events that may wait for a slow gateway: minutes of tokens of a full batch."""

QUIET_S = 1.0
"""After so long without an event a gateway is told how much KV is used, if that has changed."""

ORPHAN_GRACE_S = 10.0
"""How long requests outlive the stream of their gateway, so that a reconnect costs nothing."""


class Outbox:
    """Events on their way to one gateway. Used on the asyncio thread only."""

    def __init__(self) -> None:
        self._events: list[pb.Event] = []
        self._filled = asyncio.Event()
        self.closed = False

    def put(self, events: Iterable[pb.Event]) -> None:
        self._events.extend(events)
        if len(self._events) > EVENTS_WAITING_MAX:
            self.close()
        self._filled.set()

    def close(self) -> None:
        self.closed = True
        self._filled.set()

    async def next_batch(self, *, quiet_s: float | None = None) -> list[pb.Event] | None:
        """All events that wait, at least one; an empty list once closed; None when there were none for `quiet_s`."""
        try:
            async with asyncio.timeout(quiet_s):
                await self._filled.wait()
        except TimeoutError:
            return None
        self._filled.clear()
        events, self._events = self._events, []
        return [] if self.closed else events


class GatewayStreams:
    """Which gateways are connected."""

    def __init__(self) -> None:
        self._outboxes: dict[str, Outbox] = {}

    def open(self, gateway_id: str) -> Outbox:
        """A new outbox; an older one of the same gateway is closed."""
        older = self._outboxes.pop(gateway_id, None)
        if older is not None:
            older.close()
        outbox = Outbox()
        self._outboxes[gateway_id] = outbox
        return outbox

    def forget(self, gateway_id: str, outbox: Outbox) -> None:
        outbox.close()
        if self._outboxes.get(gateway_id) is outbox:
            del self._outboxes[gateway_id]

    def connected(self, gateway_id: str) -> bool:
        outbox = self._outboxes.get(gateway_id)
        return outbox is not None and not outbox.closed

    def send(self, gateway_id: str, events: Iterable[pb.Event]) -> None:
        """Queues events; those for a gateway that is away are dropped: it resubmits or replays."""
        outbox = self._outboxes.get(gateway_id)
        if outbox is not None:
            outbox.put(events)

    def close(self) -> None:
        for outbox in self._outboxes.values():
            outbox.close()


class RequestHandler(Protocol):
    """What the stream does with a gateway's commands; the worker's assignment implements it."""

    def submit(self, request: pb.Request) -> None: ...
    def cancel(self, request_id: str, attempt: int) -> None: ...
    def cancel_gateway(self, gateway_id: str) -> None: ...
    def model_files(self, digest: str) -> dict[str, bytes] | None: ...
    def kv_use(self) -> pb.KvUse: ...


class EngineServicer(engine_pb2_grpc.EngineServiceServicer):
    """The gRPC face of the worker towards gateways."""

    def __init__(self, *, streams: GatewayStreams, handler: RequestHandler) -> None:
        self._streams = streams
        self._handler = handler
        self._orphans: dict[str, asyncio.Task[None]] = {}

    async def Generate(
        self,
        request_iterator: AsyncIterator[pb.GenerateRequest],
        context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse],
    ) -> AsyncIterator[pb.GenerateResponse]:
        """See engine.proto."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("command") != "hello" or not first.hello.gateway_id:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "the first message must be Hello with a gateway id"
            )
            return
        gateway_id = first.hello.gateway_id
        outbox = self._streams.open(gateway_id)
        orphan = self._orphans.pop(gateway_id, None)
        if orphan is not None:
            orphan.cancel()
        log.info("a gateway connected", extra={"gateway": gateway_id})
        reader = asyncio.create_task(self._read(request_iterator, outbox))
        try:
            told: pb.KvUse | None = None
            while (events := await outbox.next_batch(quiet_s=QUIET_S)) != []:
                kv = self._handler.kv_use()
                if events or kv != told:
                    yield pb.GenerateResponse(events=events or (), kv=kv)
                    told = kv
            await context.abort(grpc.StatusCode.ABORTED, "replaced by a newer stream, or too slow")
        finally:
            reader.cancel()
            self._streams.forget(gateway_id, outbox)
            if not self._streams.connected(gateway_id):
                self._orphans[gateway_id] = asyncio.create_task(self._cancel_orphans(gateway_id))

    async def _read(self, requests: AsyncIterator[pb.GenerateRequest], outbox: Outbox) -> None:
        async for message in requests:
            match message.WhichOneof("command"):
                case "submit":
                    self._handler.submit(message.submit.request)
                case "cancel":
                    self._handler.cancel(message.cancel.request_id, message.cancel.attempt)
                case _:
                    log.warning("a gateway sent a command that is not known here")
        outbox.close()

    async def _cancel_orphans(self, gateway_id: str) -> None:
        await asyncio.sleep(ORPHAN_GRACE_S)
        self._orphans.pop(gateway_id, None)
        if not self._streams.connected(gateway_id):
            log.info("requests of a gateway that went away are cancelled", extra={"gateway": gateway_id})
            self._handler.cancel_gateway(gateway_id)

    async def GetModelFiles(
        self,
        request: pb.GetModelFilesRequest,
        context: grpc.aio.ServicerContext[pb.GetModelFilesRequest, pb.GetModelFilesResponse],
    ) -> pb.GetModelFilesResponse:
        """See engine.proto."""
        files = self._handler.model_files(request.digest)
        if files is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"checkpoint {request.digest!r} is not held here")
        return pb.GetModelFilesResponse(files=files)
