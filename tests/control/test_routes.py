"""Routes: what gateways are told, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from layercast.route.v1alpha1 import route_pb2 as pb
from layercast.route.v1alpha1 import route_pb2_grpc

from layercast_operator.routes import (
    RouteInput,
    RouteTable,
    route_of,
    route_of_orphans,
    serve_routes,
)
from layercast_operator.snapshot import ReplicaState
from layercast_operator.state import Resolved

Eventually = Callable[..., Awaitable[None]]


def route(model: str, message: str = "") -> pb.ModelRoute:
    return pb.ModelRoute(model=model, message=message)


async def watch(address: str, into: list[pb.WatchRoutesResponse]) -> None:
    """Collect tables until the stream ends."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: route_pb2_grpc.RouteServiceAsyncStub = route_pb2_grpc.RouteServiceStub(channel)
        async for table in stub.WatchRoutes(pb.WatchRoutesRequest(gateway_id="g")):
            into.append(table)


async def test_the_first_table_is_sent_at_once_and_then_each_change(eventually: Eventually) -> None:
    table = RouteTable()
    server, port = await serve_routes(table, host="127.0.0.1", port=0)
    seen: list[pb.WatchRoutesResponse] = []
    await table.publish([route("b"), route("a")])
    watching = asyncio.create_task(watch(f"127.0.0.1:{port}", seen))
    await eventually(lambda: len(seen) == 1)
    assert [m.model for m in seen[0].models] == ["a", "b"], "sorted"
    await table.publish([route("a"), route("b")])  # no change: nobody is woken for it
    await table.publish([route("a", message="changed")])
    await eventually(lambda: len(seen) == 2)
    assert [m.message for m in seen[1].models] == ["changed"]
    await table.close()
    await asyncio.wait_for(watching, 5)
    await server.stop(0.1)


async def test_an_operator_that_knows_nothing_yet_sends_nothing(eventually: Eventually) -> None:
    table = RouteTable()
    server, port = await serve_routes(table, host="127.0.0.1", port=0)
    seen: list[pb.WatchRoutesResponse] = []
    watching = asyncio.create_task(watch(f"127.0.0.1:{port}", seen))
    await asyncio.wait([watching], timeout=0.3)
    assert seen == []
    await table.publish([])
    await eventually(lambda: len(seen) == 1)
    assert list(seen[0].models) == []
    await table.close()
    await asyncio.wait_for(watching, 5)
    await server.stop(0.1)


def test_states_of_replicas_as_gateways_see_them(worlds: Any) -> None:
    world = worlds.World(nodes=len(ReplicaState))
    for index, state in enumerate(ReplicaState):
        replica = worlds.SimReplica(f"m-00000{index}", "m", "d", "cpu:0", 1000.0, state)
        world.nodes[f"node-{index}"].replicas[replica.replica_id] = replica
    resolved = Resolved(key="k", digest="d", segment_bytes=(1, 2, 3), context_length_max=512)
    replicas = world.snapshot().replicas("m")
    given = RouteInput(model=worlds.service(), resolved=resolved, replicas=replicas, message="why")
    got = route_of(given)
    assert [pb.EndpointState.Name(e.state).removeprefix("ENDPOINT_STATE_") for e in got.endpoints] == [
        "LOADING",
        "LIVE",
        "SERVING",
        "SERVING",
        "DRAINING",
        "DRAINING",
    ], "whoever leads a pipeline serves as a whole replica; a failed one has no route"
    assert (got.model, got.digest, got.context_length_max, got.message) == ("m", "d", 512, "why")
    assert got.endpoints[0].address == "m-000000:1"
    orphans = route_of_orphans("m", replicas)
    assert {e.state for e in orphans.endpoints} == {pb.ENDPOINT_STATE_DRAINING}
    assert "deleted" in orphans.message
