"""Follows the operator's routing table for the life of the process.

When the operator is away the last table stays: traffic never needs a living operator.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc
import grpc.aio
from layercast.route.v1alpha1.route_pb2 import WatchRoutesRequest
from layercast.route.v1alpha1.route_pb2_grpc import RouteServiceStub

from layercast_gateway.backoff import Backoff
from layercast_gateway.routes import ModelRoute, table_of
from layercast_gateway.tls import OPERATOR, Tls
from layercast_gateway.tls import channel as channel_to

if TYPE_CHECKING:
    from layercast.route.v1alpha1.route_pb2_grpc import RouteServiceAsyncStub

log = logging.getLogger(__name__)

# A channel of our own for every attempt: a shared one waits out gRPC's back-off, which starts at a second.
CHANNEL_OPTIONS = [("grpc.use_local_subchannel_pool", 1)]


class RouteWatch:
    """`on_table` gets each new table."""

    def __init__(
        self,
        *,
        operator: str,
        gateway_id: str,
        on_table: Callable[[dict[str, ModelRoute]], None],
        tls: Tls | None = None,
    ) -> None:
        self._tls = tls
        self._operator = operator
        self._gateway_id = gateway_id
        self._on_table = on_table
        self._backoff = Backoff(first_s=0.05, most_s=2.0)

    async def run(self) -> None:
        """Watches until cancelled; a broken stream is opened again after a growing pause."""
        while True:
            try:
                await self._follow()
                reason = "the operator ended the stream"
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            pause_s = self._backoff.next_s()
            log.info("routes are not watched", extra={"reason": reason, "again_in_s": round(pause_s, 2)})
            await asyncio.sleep(pause_s)

    async def _follow(self) -> None:
        opened = channel_to(self._operator, self._tls, role=OPERATOR, options=CHANNEL_OPTIONS)
        async with opened as channel:
            stub: RouteServiceAsyncStub = RouteServiceStub(channel)
            async for response in stub.WatchRoutes(WatchRoutesRequest(gateway_id=self._gateway_id)):
                self._backoff.reset()
                self._on_table(table_of(response))
