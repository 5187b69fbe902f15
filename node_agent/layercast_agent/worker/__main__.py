"""Starts a worker: warm first, then the wire, then wait for a model.

The agent starts this as `python -m layercast_agent.worker`. Heavy imports happen here, at the start, and never at a
scale-up.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import signal
import sys
from pathlib import Path

import torch
from grpc import aio
from layercast.engine.v1alpha1 import engine_pb2_grpc
from layercast.peer.v1alpha1 import peer_pb2_grpc
from layercast.worker.v1alpha1 import worker_pb2_grpc

from layercast_agent import logs, rdma, tls
from layercast_agent.device import register_host_memory
from layercast_agent.errors import PeerError
from layercast_agent.holdings import SERVER_OPTIONS, Holdings
from layercast_agent.host_memory import Reserve
from layercast_agent.read_bytes import ReadBytes
from layercast_agent.regions import RegionTable
from layercast_agent.transport import shm_link
from layercast_agent.transport.nixl import NixlPlane, NixlUnavailableError
from layercast_agent.transport.tcp import EgressLimiter, TcpServer
from layercast_agent.worker import settings, warm
from layercast_agent.worker.control import Assignment, WorkerServicer
from layercast_agent.worker.host import WorkerHost
from layercast_agent.worker.pacing import ComputeShare
from layercast_agent.worker.peers import PeerServicer
from layercast_agent.worker.settings import WorkerSettings
from layercast_agent.worker.streams import EngineServicer, GatewayStreams

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1

MAP_DEADLINE_S = 5.0
"""For the agent to hand its host pool out."""

MESSAGE_BYTES_MAX = 64 * 2**20
"""Manifests and tokenizers are megabytes; gRPC's default is four."""

SWITCH_INTERVAL_S = 0.0005
"""A layer gives the interpreter up at each of its operators and wants it back; threads that receive parameters would
keep it for Python's 5 ms each time, longer than an operator takes."""

GRPC_OPTIONS = [("grpc.max_receive_message_length", MESSAGE_BYTES_MAX), *SERVER_OPTIONS]


def main() -> None:
    """Entry point."""
    options = settings.parse(sys.argv[1:])
    logs.set_up(options.log_format)
    _bind_to_parent(options.parent_pid)
    if options.cpu_cores:
        os.sched_setaffinity(0, options.cpu_cores)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    device = torch.device("cpu") if options.device.startswith("cpu") else torch.device(options.device)
    torch.set_num_threads(max(1, len(options.cpu_cores)) if options.cpu_share >= 1 else 1)
    asyncio.run(_serve(options, device))
    # Threads of libraries must not keep a worker alive that its agent wants gone.
    os._exit(0)


def _bind_to_parent(parent_pid: int) -> None:
    """A worker never outlives its agent: nobody would know of it."""
    if parent_pid == 0:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit("the agent that started this worker is gone")


async def _serve(options: WorkerSettings, device: torch.device) -> None:
    table = RegionTable()
    limiter = EgressLimiter(options.egress_bytes_per_s or None)
    secure = None if options.tls_dir is None else tls.Tls(options.tls_dir)
    data_host, data_port = options.data_listen.rsplit(":", 1)
    data = TcpServer(
        table, token=options.token, host=data_host, port=int(data_port), limiter=limiter, tls=secure
    )
    data.start()
    streams, holdings = GatewayStreams(), Holdings()
    server = aio.server(interceptors=tls.interceptors(secure), options=GRPC_OPTIONS)
    host_name = options.listen.rsplit(":", 1)[0]
    port = tls.bind(server, options.listen, secure)
    plane, verdict = _one_sided(options, table, holdings)
    reserves = device.type == "cpu" and options.reserve_bytes > 0
    host = WorkerHost(
        settings=options,
        device=device,
        address=f"{host_name}:{port}",
        data_address=data.address,
        table=table,
        holdings=holdings,
        streams=streams,
        share=ComputeShare(options.cpu_share if device.type == "cpu" else 1.0),
        tls=secure,
        plane=plane,
        verdict=verdict,
        read_bytes=ReadBytes(),
        reserve=Reserve(options.reserve_bytes) if reserves else None,
    )
    assignment = Assignment(host)
    engine_pb2_grpc.add_EngineServiceServicer_to_server(
        EngineServicer(streams=streams, handler=assignment), server
    )
    peer_pb2_grpc.add_PeerServiceServicer_to_server(
        PeerServicer(holdings=holdings, replica=lambda: assignment.replica), server
    )
    control = aio.server(options=GRPC_OPTIONS)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(
        WorkerServicer(assignment=assignment, host=host), control
    )
    _make_way(options.control_socket)
    control.add_insecure_port(f"unix:{options.control_socket}")
    await server.start()
    await control.start()
    await asyncio.to_thread(warm.warm_up, device)
    if options.host_memory_socket is not None and device.type != "cpu":
        await asyncio.to_thread(_register_host_memory, options.host_memory_socket, options.token, device)
    gc.collect()
    gc.freeze()  # the libraries are here to stay; a collection after a replica's end looks at what came later
    assignment.warm = True
    log.info("the worker is warm", extra={"device": options.device, "address": host.address})
    await _until_asked_to_stop()
    if assignment.replica is not None:
        await assignment.unassign(assignment.replica.spec.replica_id)
    await asyncio.gather(server.stop(1.0), control.stop(1.0))
    data.close()


def _one_sided(
    options: WorkerSettings, table: RegionTable, holdings: Holdings
) -> tuple[NixlPlane | None, rdma.Verdict]:
    """RDMA where the node has it, and why not, loudly when it was demanded."""
    verdict = rdma.judge(rdma.look(), options.rdma)
    plane = None
    if verdict.use:
        try:
            plane = NixlPlane(table)
            holdings.describe = plane.describe
        except NixlUnavailableError as error:
            verdict = rdma.refused(str(error), options.rdma)
    log.log(
        logging.WARNING if verdict.loud else logging.INFO,
        "parameters are read by RDMA" if plane is not None else "parameters are read by tcp",
        extra={"reason": verdict.reason},
    )
    return plane, verdict


def _register_host_memory(path: Path, token: bytes, device: torch.device) -> None:
    """Pins the node's host pool for the device's copy engine, now: it takes seconds that no load should wait for."""
    shm_link.MAPS.register = lambda address, nbytes: register_host_memory(address, nbytes, device)
    try:
        mapped = shm_link.map_now(path, token=token, deadline_s=MAP_DEADLINE_S)
    except PeerError as error:
        log.warning("the host pool cannot be mapped now", extra={"reason": str(error)})
        return
    if mapped.problem:
        log.warning("host copies take a detour to the device", extra={"reason": mapped.problem})


def _make_way(path: Path) -> None:
    """Removes the socket of an earlier worker of this device."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)


async def _until_asked_to_stop() -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()


if __name__ == "__main__":
    main()
