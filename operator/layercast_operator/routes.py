"""RouteService: tells gateways which replica serves which model, at once and after each change.

A watcher that is slow skips tables; it is only ever owed the newest. No table is sent before the first complete
one: an empty table from an operator that has just started would take all routes away from a working gateway.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import grpc
from layercast.route.v1alpha1 import route_pb2 as pb
from layercast.route.v1alpha1 import route_pb2_grpc

from layercast_operator.errors import SettingsError
from layercast_operator.modelservice import ModelService
from layercast_operator.planner import context_length
from layercast_operator.snapshot import Replica, ReplicaState, Role
from layercast_operator.state import Resolved
from layercast_operator.tls import GATEWAY, Callers, Tls

_STATES = {
    ReplicaState.LOADING: pb.ENDPOINT_STATE_LOADING,
    ReplicaState.LIVE: pb.ENDPOINT_STATE_LIVE,
    # It has nobody to share a queue with: requests go to it, and it sees to them with its pipeline.
    ReplicaState.LEADING: pb.ENDPOINT_STATE_SERVING,
    ReplicaState.SERVING: pb.ENDPOINT_STATE_SERVING,
    ReplicaState.DRAINING: pb.ENDPOINT_STATE_DRAINING,
    ReplicaState.DRAINED: pb.ENDPOINT_STATE_DRAINING,
}


_ROLES = {
    Role.BOTH: pb.ENDPOINT_ROLE_UNSPECIFIED,
    Role.PREFILL: pb.ENDPOINT_ROLE_PREFILL,
    Role.DECODE: pb.ENDPOINT_ROLE_DECODE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteInput:
    """What a route is made of."""

    model: ModelService
    resolved: Resolved | None
    replicas: Sequence[Replica]
    message: str


def route_of(given: RouteInput) -> pb.ModelRoute:
    """The route of one model. Replicas that failed or have no address yet are left out."""
    resolved = given.resolved
    return pb.ModelRoute(
        model=given.model.name,
        digest=resolved.digest if resolved is not None else "",
        context_length_max=context_length(given.model, resolved) if resolved is not None else 0,
        endpoints=[
            pb.Endpoint(
                replica_id=r.replica_id,
                address=r.peer.address,
                state=_STATES[r.state],
                role=_ROLES[r.role],
            )
            for r in given.replicas
            if r.state in _STATES and r.peer.address
        ],
        message=given.message,
        created_unix_s=given.model.created_unix_s,
    )


def route_of_orphans(name: str, replicas: Sequence[Replica]) -> pb.ModelRoute:
    """The route of a deleted ModelService while its replicas finish what they have: nothing new goes there."""
    return pb.ModelRoute(
        model=name,
        endpoints=[
            pb.Endpoint(replica_id=r.replica_id, address=r.peer.address, state=pb.ENDPOINT_STATE_DRAINING)
            for r in replicas
            if r.state in _STATES and r.peer.address
        ],
        message=f"ModelService {name} was deleted",
    )


class RouteTable(route_pb2_grpc.RouteServiceServicer):
    """The newest table and those who watch it."""

    def __init__(self) -> None:
        self._table: pb.WatchRoutesResponse | None = None
        self._changed = asyncio.Condition()
        self._version = 0
        self._closed = False

    async def publish(self, routes: Sequence[pb.ModelRoute]) -> None:
        """Replace the table; watchers hear of it when it differs."""
        table = pb.WatchRoutesResponse(models=sorted(routes, key=lambda route: route.model))
        if table == self._table:
            return
        async with self._changed:
            self._table = table
            self._version += 1
            self._changed.notify_all()

    async def close(self) -> None:
        """End all watches; gateways keep their tables and reconnect."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def WatchRoutes(  # noqa: N802, RUF100 - the name is the wire's
        self, request: pb.WatchRoutesRequest, context: object
    ) -> AsyncIterator[pb.WatchRoutesResponse]:
        """The table now and after each change, until the watcher leaves."""
        seen = 0
        while True:
            table, seen = await self._newer_than(seen)
            if table is None:
                return
            yield table

    async def _newer_than(self, seen: int) -> tuple[pb.WatchRoutesResponse | None, int]:
        """The first table after version `seen`; None when the service closes."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or self._version != seen)
            return (None if self._closed else self._table), self._version


async def serve_routes(
    table: RouteTable, *, host: str, port: int, tls: Tls | None = None
) -> tuple[grpc.aio.Server, int]:
    """Serve the table; returns the server and its port. Raises SettingsError when the port is taken."""
    # Without this option two operators would share the port, and each gateway would get one of them by chance.
    guards = [Callers(GATEWAY)] if tls is not None else []
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),), interceptors=guards)
    route_pb2_grpc.add_RouteServiceServicer_to_server(table, server)
    try:
        if tls is None:
            bound = server.add_insecure_port(f"{host}:{port}")
        else:
            bound = server.add_secure_port(f"{host}:{port}", tls.server_credentials())
    except RuntimeError as error:
        await server.stop(None)
        raise SettingsError(
            f"--listen {host}:{port} cannot be used: the port is taken or not ours"
        ) from error
    if bound == 0:
        await server.stop(None)
        raise SettingsError(f"--listen {host}:{port} cannot be used: the port is taken or not ours")
    await server.start()
    return server, bound
