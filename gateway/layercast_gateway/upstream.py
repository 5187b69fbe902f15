"""The one stream of this gateway to one worker: opened, used, and opened again when it breaks.

A worker knows a gateway by one stream, whichever replicas it carries over time, so streams belong to addresses.
What the events mean is decided elsewhere; this module only tells, always from the event loop, that the stream is
open, what came over it, and that it was lost. Whatever was sent over a lost stream may or may not have arrived.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, TypeAlias

import grpc
import grpc.aio
from layercast.engine.v1alpha1 import engine_pb2
from layercast.engine.v1alpha1.engine_pb2_grpc import EngineServiceStub

from layercast_gateway.backoff import Backoff
from layercast_gateway.tls import AGENT, Tls
from layercast_gateway.tls import channel as channel_to

if TYPE_CHECKING:
    from layercast.engine.v1alpha1.engine_pb2_grpc import EngineServiceAsyncStub

    GenerateCall: TypeAlias = grpc.aio.StreamStreamCall[
        engine_pb2.GenerateRequest, engine_pb2.GenerateResponse
    ]

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
FILES_TIMEOUT_S = 10.0
COMMANDS_MAX = 4096
"""Commands that may wait for the network; a worker that reads none of so many is as good as lost."""

# Tokenizers of large vocabularies have tens of megabytes. A pool of its own, because a shared one waits out gRPC's
# back-off, which starts at a second.
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 256 << 20),
    ("grpc.use_local_subchannel_pool", 1),
    # A worker that is stopped or cut off closes nothing: only an unanswered ping tells. Workers allow one a second.
    ("grpc.keepalive_time_ms", 4_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


class StreamEvents(Protocol):
    """Who is told what happens on a stream."""

    def on_connected(self, address: str) -> None:
        """The stream is open."""

    def on_events(self, address: str, events: Sequence[engine_pb2.Event]) -> None:
        """A worker said something."""

    def on_lost(self, address: str, reason: str) -> None:
        """The open stream broke."""


class WorkerStream:
    """Keeps a stream to the worker at `address` until `close`."""

    def __init__(
        self, *, address: str, gateway_id: str, events: StreamEvents, tls: Tls | None = None
    ) -> None:
        self._tls = tls
        self.address = address
        self.connected = False
        self.kv = engine_pb2.KvUse()
        """How much KV memory is used there, as it said last."""
        self._gateway_id = gateway_id
        self._events = events
        self._backoff = Backoff(first_s=0.05, most_s=2.0)
        self._commands: asyncio.Queue[engine_pb2.GenerateRequest] = asyncio.Queue(COMMANDS_MAX)
        self._call: GenerateCall | None = None
        self._task = asyncio.create_task(self._run(), name=f"stream to {address}")

    def send(self, command: engine_pb2.GenerateRequest) -> bool:
        """Sends a command in order; False when the stream is not open.

        True is no promise: a stream that breaks afterwards takes the command with it, and `on_lost` says so.
        """
        if not self.connected:
            return False
        try:
            self._commands.put_nowait(command)
        except asyncio.QueueFull:
            log.warning("a worker reads no commands", extra={"address": self.address})
            if self._call is not None:
                self._call.cancel()
        return True

    async def fetch_files(self, digest: str) -> dict[str, bytes] | None:
        """Small files of a checkpoint that the worker holds; None when it does not, or does not answer in time."""
        request = engine_pb2.GetModelFilesRequest(digest=digest)
        async with channel_to(self.address, self._tls, role=AGENT, options=CHANNEL_OPTIONS) as channel:
            stub: EngineServiceAsyncStub = EngineServiceStub(channel)
            try:
                response = await stub.GetModelFiles(request, timeout=FILES_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
                log.debug("no model files", extra={"address": self.address, "reason": reason})
                return None
        return dict(response.files)

    async def close(self) -> None:
        """Ends the stream. Nothing is told afterwards."""
        self.connected = False
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        while True:
            try:
                reason = await self._stream()
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                reason = "given up here"  # a call that we cancelled says so to its reader like this
            except TimeoutError:
                reason = f"no connection within {CONNECT_TIMEOUT_S} s"
            except Exception:  # a defect of ours: the stream goes on, and its requests are replayed
                log.exception("a stream failed", extra={"address": self.address})
                reason = "internal error"
            if self.connected:
                self.connected = False
                self._events.on_lost(self.address, reason)
            pause_s = self._backoff.next_s()
            log.debug("stream is not open", extra={"address": self.address, "reason": reason})
            await asyncio.sleep(pause_s)

    async def _stream(self) -> str:
        """One stream from its opening to its end; returns or raises why it ended."""
        async with channel_to(self.address, self._tls, role=AGENT, options=CHANNEL_OPTIONS) as channel:
            stub: EngineServiceAsyncStub = EngineServiceStub(channel)
            call: GenerateCall = stub.Generate()
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await call.wait_for_connection()
                    hello = engine_pb2.Hello(gateway_id=self._gateway_id)
                    await call.write(engine_pb2.GenerateRequest(hello=hello))
                return await self._use(call)
            finally:
                call.cancel()

    async def _use(self, call: GenerateCall) -> str:
        self._commands = asyncio.Queue(COMMANDS_MAX)  # what waited for the last stream is answered as lost
        self._call = call
        self.connected = True
        self._events.on_connected(self.address)
        writer = asyncio.create_task(self._write(call), name=f"commands to {self.address}")
        try:
            async for response in call:
                self._backoff.reset()
                if response.HasField("kv"):
                    self.kv = response.kv
                self._events.on_events(self.address, response.events)
            return f"{(await call.code()).name}: {await call.details()}"
        finally:
            self._call = None
            writer.cancel()
            with suppress(asyncio.CancelledError):
                await writer

    async def _write(self, call: GenerateCall) -> None:
        while True:
            command = await self._commands.get()
            try:
                await call.write(command)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                call.cancel()  # the reader sees the end and says why
                return
