"""A peer that serves one packed checkpoint as an agent does: `python -m bench.holder FOLDER TOKEN`.

Says on one line how it is reached, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any, cast

import grpc
from bench.chain_node import PeerServicer
from layercast.peer.v1alpha1 import peer_pb2_grpc

from layercast_agent.checkpoint_files import PackedCheckpoint
from layercast_agent.holdings import SERVER_OPTIONS, Holding, Holdings
from layercast_agent.regions import RegionTable
from layercast_agent.residency import Residency
from layercast_agent.transport.tcp import EgressLimiter, TcpServer

HOST = "127.0.0.1"


async def serve(folder: Path, token: bytes) -> None:
    """Serve until standard input ends."""
    packed = PackedCheckpoint(folder)
    manifest = packed.manifest
    table, holdings = RegionTable(), Holdings()
    regions = tuple(table.add(packed.segment(segment.index)) for segment in manifest.segments)
    holdings.add(
        Holding(manifest=manifest, files={}, residency=Residency(manifest, complete=True), regions=regions)
    )
    data = TcpServer(table, token=token, host=HOST, port=0, limiter=EgressLimiter(None))
    data.start()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    peer_pb2_grpc.add_PeerServiceServicer_to_server(cast(Any, PeerServicer)(holdings), server)
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    reach = {"peer_id": "holder", "address": f"{HOST}:{port}", "data_address": data.address}
    print(json.dumps(reach), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)
    data.close()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2].encode()))
