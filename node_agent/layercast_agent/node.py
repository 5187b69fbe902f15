"""All parts of an agent put together: what is bound and started in which order, and how it ends.

Ports and folders come first, because a wrong one should end the process before a worker has been started.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from layercast_agent.agent import DEFAULT_DEADLINES, Agent, CommandDeadlines
from layercast_agent.arena import Arena
from layercast_agent.checkpoints import Checkpoints, measure_disk
from layercast_agent.errors import AgentError, NoCapacityError
from layercast_agent.health import DEFAULT_LIMITS, WorkerLimits
from layercast_agent.holdings import Holdings
from layercast_agent.host_copies import HostCopies
from layercast_agent.metrics import MetricsServer, Observation
from layercast_agent.pool import HostPool
from layercast_agent.regions import RegionTable
from layercast_agent.server import wire_server
from layercast_agent.settings import AgentSettings, SettingsError, parse_address
from layercast_agent.store import Store
from layercast_agent.tls import Tls, TlsError, bind
from layercast_agent.transport.shm import ShmServer
from layercast_agent.transport.tcp import EgressLimiter, TcpServer

log = logging.getLogger(__name__)

CALLS_GRACE_S = 0.5
"""How long calls may go on once the agent ends; a status takes milliseconds, a watch is told to go elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningAgent:
    """An agent that serves."""

    agent: Agent
    metrics_port: int
    """Port of the metrics server; 0 when it is off."""

    runs: tuple[asyncio.Task[None], ...]
    """One task a worker; each ends only with the agent, or by a bug."""

    async def until(self, stop: asyncio.Event) -> None:
        """Returns when `stop` is set; raises what ended a worker's task before."""
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({stopped, *self.runs}, return_when=asyncio.FIRST_COMPLETED)
            for run in self.runs:
                if run.done():
                    run.result()
        finally:
            stopped.cancel()


@contextlib.asynccontextmanager
async def running(
    settings: AgentSettings,
    *,
    limits: WorkerLimits = DEFAULT_LIMITS,
    deadlines: CommandDeadlines = DEFAULT_DEADLINES,
) -> AsyncIterator[RunningAgent]:
    """Starts an agent; leaving the block ends its workers and frees its ports.

    SettingsError with one sentence for a wrong setting, an unreadable token, a folder that cannot be written or
    is another agent's, and a port that is in use.
    """
    settings.check()
    token = _read_token(settings.token_file)
    tls = _read_certificates(settings.tls_dir)
    _writable_folder(settings.store_dir, flag="--store-dir")
    _writable_folder(settings.run_dir, flag="--run-dir")
    regions, holdings = RegionTable(), Holdings()
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(_owned(settings.run_dir))
        checkpoints = await asyncio.to_thread(_checkpoints, settings, holdings, regions)
        pool = HostPool(
            arena=_host_memory(settings, stack), holdings=holdings, regions=regions, token=token, tls=tls
        )
        copies = HostCopies(
            node=settings.node, pool=pool, checkpoints=checkpoints, socket=settings.memory_socket, tls=tls
        )
        agent = Agent(
            settings=settings,
            checkpoints=checkpoints,
            host_copies=copies,
            tls=tls,
            limits=limits,
            deadlines=deadlines,
        )
        checkpoints.in_use = lambda: {*agent.digests(), *pool.digests()}
        if pool.arena.nbytes:
            _serve_memory(settings, regions, pool.arena, token, stack)
        agent.peer.data_address = _serve_data(settings, regions, token, tls, stack)
        wire = wire_server(agent, holdings, tls)
        agent.peer.address = _bind(wire, settings.listen, tls)
        metrics_port = _serve_metrics(settings, agent, tls, stack)

        await asyncio.to_thread(checkpoints.start)
        stack.callback(checkpoints.close)
        runs = tuple(asyncio.create_task(worker.run()) for worker in agent.workers)
        stack.push_async_callback(_end_workers, agent, runs)
        measured = await asyncio.to_thread(measure_disk, settings.store_dir)
        agent.disk_bytes_per_s = min(measured, settings.disk_bytes_per_s or measured)
        await wire.start()
        stack.push_async_callback(wire.stop, CALLS_GRACE_S)
        # Watches are told to go elsewhere before the server hangs up on them.
        stack.callback(checkpoints.close)
        stack.push_async_callback(asyncio.to_thread, pool.close)
        log.info("the agent serves", extra={"address": agent.peer.address, "data": agent.peer.data_address})
        yield RunningAgent(agent=agent, metrics_port=metrics_port, runs=runs)
        log.info("the agent ends")


def _checkpoints(settings: AgentSettings, holdings: Holdings, regions: RegionTable) -> Checkpoints:
    return Checkpoints(
        store=Store(settings.store_dir, pvc_root=settings.pvc_root),
        holdings=holdings,
        regions=regions,
        store_bytes_max=settings.store_bytes_max,
        disk_bytes_per_s=settings.disk_bytes_per_s,
    )


async def _end_workers(agent: Agent, runs: tuple[asyncio.Task[None], ...]) -> None:
    await asyncio.gather(*(worker.close() for worker in agent.workers))
    await asyncio.gather(*runs, return_exceptions=True)


def _serve_data(
    settings: AgentSettings,
    regions: RegionTable,
    token: bytes,
    tls: Tls | None,
    stack: contextlib.AsyncExitStack,
) -> str:
    """Starts the data plane; returns its host:port."""
    host, port = parse_address(settings.data_listen, flag="--data-listen")
    limiter = EgressLimiter(settings.egress_bytes_per_s or None)
    server = TcpServer(regions, token=token, host=host.strip("[]"), port=port, limiter=limiter, tls=tls)
    try:
        server.start()
    except AgentError as error:
        raise _cannot_listen("--data-listen", settings.data_listen, error.__cause__ or error) from error
    stack.push_async_callback(asyncio.to_thread, server.close)
    return server.address


def _host_memory(settings: AgentSettings, stack: contextlib.AsyncExitStack) -> Arena:
    """Takes the host pool's memory, in the background."""
    try:
        arena = Arena(settings.host_pool_bytes)
    except NoCapacityError as error:
        raise SettingsError(f"--host-pool-bytes {settings.host_pool_bytes}: {error}.") from error
    stack.callback(arena.close)
    arena.touch()
    return arena


def _serve_memory(
    settings: AgentSettings,
    regions: RegionTable,
    arena: Arena,
    token: bytes,
    stack: contextlib.AsyncExitStack,
) -> None:
    """Lets this node's workers read host copies where they lie."""
    server = ShmServer(regions, arena=arena, token=token, path=settings.memory_socket)
    try:
        server.start()
    except AgentError as error:
        raise SettingsError(f"--run-dir {settings.run_dir}: {error}.") from error
    stack.push_async_callback(asyncio.to_thread, server.close)


def _serve_metrics(
    settings: AgentSettings, agent: Agent, tls: Tls | None, stack: contextlib.AsyncExitStack
) -> int:
    """Starts the metrics server; returns its port, 0 when it is off."""
    if settings.metrics_address is None:
        return 0

    def observe() -> Observation:
        restarts = {worker.slot.device_id: worker.restarts for worker in agent.workers}
        expires_at = tls.expires_at if tls is not None else None
        return Observation(status=agent.status(), restarts=restarts, certificate_expires_at=expires_at)

    try:
        server = MetricsServer(
            address=settings.metrics_address, observe=observe, loop=asyncio.get_running_loop()
        )
    except OSError as error:
        raise _cannot_listen("--metrics-listen", settings.metrics_listen, error) from error
    server.start()
    stack.push_async_callback(asyncio.to_thread, server.close)
    return server.port


def _bind(wire: grpc.aio.Server, address: str, tls: Tls | None) -> str:
    """Binds the gRPC server; returns its host:port."""
    host, port = parse_address(address, flag="--listen")
    try:
        # gRPC says neither why it cannot bind nor keeps quiet about it, so the kernel is asked first.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host.strip("[]"), port))
        return f"{host}:{bind(wire, address, tls)}"
    except (OSError, RuntimeError) as error:
        raise _cannot_listen("--listen", address, error) from error


def _cannot_listen(flag: str, address: str, error: BaseException) -> SettingsError:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return SettingsError(f"{flag} {address}: the port is in use.")
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return SettingsError(f"{flag} {address}: cannot listen there: {why}.")


def _read_token(path: Path) -> bytes:
    """The shared secret, without the white space that editors add."""
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        raise SettingsError(f"--token-file {path}: cannot be read: {error.strerror}.") from error
    if not token:
        raise SettingsError(f"--token-file {path}: is empty.")
    return token


def _read_certificates(folder: Path | None) -> Tls | None:
    try:
        return None if folder is None else Tls(folder)
    except TlsError as error:
        raise SettingsError(f"--tls-dir {error}.") from error


def _writable_folder(path: Path, *, flag: str) -> None:
    """Makes the folder if need be, and proves that files can be made in it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise SettingsError(f"{flag} {path}: cannot be written: {error.strerror}.") from error


@contextlib.contextmanager
def _owned(run_dir: Path) -> Iterator[None]:
    """Holds the folder for this process: two agents would take each other's sockets away.

    The kernel gives the lock back at the process's end, however it ends.
    """
    with (run_dir / "agent.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(f"--run-dir {run_dir}: another agent uses it.") from None
        yield
