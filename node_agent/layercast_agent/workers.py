"""Workers: one process a device, started warm, watched, and started again when it dies.

A `Worker` is the agent's side of one device. Its task runs one life of the process after another; during a
life it asks for the worker's status every `poll_interval_s` and keeps the answer, so that nobody who observes
the node ever waits for a worker.

A worker never outlives its agent: it asks the kernel for SIGKILL at its parent's death (`--parent-pid`). The
kernel means the parent *thread*, so workers are started from the asyncio thread, which ends with the agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import grpc
from layercast.agent.v1alpha1 import agent_pb2
from layercast.worker.v1alpha1 import worker_pb2 as pb
from layercast.worker.v1alpha1 import worker_pb2_grpc

from layercast_agent.errors import AgentError
from layercast_agent.health import Verdict, WorkerLimits, describe_exit, judge, restart_delay_s
from layercast_agent.peer_manifest import MESSAGE_OPTIONS
from layercast_agent.rdma import Rdma
from layercast_agent.settings import AgentSettings, DeviceSlot

log = logging.getLogger(__name__)

CHANNEL_OPTIONS = (
    *MESSAGE_OPTIONS,
    # A worker's socket appears seconds after its start: look for it often.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class CommandError(AgentError):
    """A command cannot be done; `code` is the one that the tables of agent.proto give for it."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class WorkerLostError(AgentError):
    """The worker died or does not answer, so the outcome of the command is known: nothing of it is left."""


def command_line(settings: AgentSettings, slot: DeviceSlot) -> list[str]:
    """Program and flags of a device's worker."""
    host, data_host = settings.listen.rpartition(":")[0], settings.data_listen.rpartition(":")[0]
    flags = {
        "--node": settings.node,
        "--device": slot.worker_device,
        "--control-socket": settings.socket_path(slot),
        "--listen": f"{host}:0",
        "--data-listen": f"{data_host}:0",
        "--token-file": settings.token_file,
        "--host-memory-socket": settings.memory_socket if settings.host_pool_bytes else "",
        "--device-memory-bytes": settings.device_memory_bytes,
        "--reserve-bytes": settings.reserve_bytes,
        "--cpu-share": settings.cpu_share,
        "--cpu-cores": ",".join(str(core) for core in slot.cpu_cores),
        "--engine": settings.engine,
        "--egress-bytes-per-s": settings.egress_bytes_per_s,
        "--disk-bytes-per-s": settings.disk_bytes_per_s,
        "--parent-pid": os.getpid(),
        "--log-format": settings.log_format,
    }
    if settings.rdma is not Rdma.AUTO:
        flags["--rdma"] = settings.rdma.value
    if settings.tls_dir is not None:
        flags["--tls-dir"] = settings.tls_dir
    return [*settings.worker_command, *(f"{flag}={value}" for flag, value in flags.items())]


@dataclass(slots=True, kw_only=True)
class _Life:
    """One process of a worker, from start to end."""

    process: Process
    channel: grpc.aio.Channel
    stub: worker_pb2_grpc.WorkerServiceAsyncStub
    started_at: float
    status: pb.GetWorkerStatusResponse = field(default_factory=pb.GetWorkerStatusResponse)
    warm: bool = False
    silent_s: float = 0.0
    killed_because: str = ""


class Worker:
    """The agent's side of one device. Used on the asyncio thread only."""

    def __init__(
        self,
        *,
        slot: DeviceSlot,
        settings: AgentSettings,
        limits: WorkerLimits,
        on_death: Callable[[str, str, agent_pb2.Replica | None], None],
    ) -> None:
        """`on_death(device id, reason, last known replica)` is called once a life that ended unasked."""
        self.slot = slot
        self.restarts = 0
        self.error = ""
        self._settings = settings
        self._limits = limits
        self._on_death = on_death
        self._life: _Life | None = None
        self._verdict = Verdict(state=agent_pb2.WORKER_STATE_WARMING)
        self._deaths = 0
        self._closing = asyncio.Event()
        self._busy = asyncio.Event()  # it warms up or has a replica
        self._polling = asyncio.Lock()  # answers are kept in the order of their questions
        self._log_path = settings.run_dir / f"worker-{slot.device_id}.log"
        self._pid_path = settings.run_dir / f"worker-{slot.device_id}.pid"

    @property
    def state(self) -> agent_pb2.WorkerState.ValueType:
        """What its process does."""
        return self._verdict.state

    @property
    def pid(self) -> int:
        """Process id; 0 between two lives."""
        return self._life.process.pid if self._life else 0

    @property
    def replica(self) -> agent_pb2.Replica | None:
        """Its replica as last told; None when it had none."""
        status = self._life.status if self._life else None
        return status.replica if status is not None and status.HasField("replica") else None

    @property
    def memory_bytes(self) -> int:
        """Memory that a replica may use: as the worker tells it, and what it was given until then."""
        told = self._life.status.memory_bytes if self._life else 0
        return told or self._settings.device_memory_bytes

    @property
    def reads(self) -> agent_pb2.ParameterReads | None:
        """How it reads parameters, as last told."""
        status = self._life.status if self._life else None
        return status.reads if status is not None and status.HasField("reads") else None

    async def run(self) -> None:
        """Keeps a process alive until `close`."""
        while not self._closing.is_set():
            began = asyncio.get_running_loop().time()
            reason, replica = await self._live()
            if self._closing.is_set():
                break
            lived = asyncio.get_running_loop().time() - began
            self._deaths = 1 if lived > self._limits.healthy_s else self._deaths + 1
            delay = restart_delay_s(self._deaths, self._limits)
            self._verdict = Verdict(state=agent_pb2.WORKER_STATE_DEAD)
            self.error = reason
            self.restarts += 1
            log.warning(
                "a worker ended; it is started again",
                extra={"device": self.slot.device_id, "reason": reason, "delay_s": delay},
            )
            self._on_death(self.slot.device_id, reason, replica)
            await _wait(self._closing.wait(), delay)

    async def close(self) -> None:
        """Ends the process: SIGTERM, and SIGKILL after the grace. `run` returns afterwards."""
        self._closing.set()
        life = self._life
        if life is None or life.process.returncode is not None:
            return
        life.process.terminate()
        if (
            not await _wait(life.process.wait(), self._settings.stop_grace_s)
            and life.process.returncode is None
        ):
            log.warning("a worker ignored SIGTERM; it is killed", extra={"device": self.slot.device_id})
            life.process.kill()
            await life.process.wait()

    def kill(self, reason: str) -> None:
        """Kills the process, which frees the device whatever state it is in; it is started again."""
        life = self._life
        if life is not None and life.process.returncode is None:
            life.killed_because = life.killed_because or reason
            with contextlib.suppress(ProcessLookupError):
                life.process.kill()

    async def refresh(self) -> bool:
        """Asks for the status now; returns whether there was an answer within the deadline."""
        async with self._polling:
            life = self._life
            if life is None:
                return False
            try:
                with _ended_with_its_worker():
                    status = await life.stub.GetWorkerStatus(
                        pb.GetWorkerStatusRequest(), timeout=self._limits.poll_deadline_s
                    )
            except (grpc.aio.AioRpcError, WorkerLostError):
                return False
            life.status, life.silent_s, life.warm = status, 0.0, life.warm or status.warm
            if status.HasField("replica") or not life.warm:
                self._busy.set()
            else:
                self._busy.clear()
            self._look(life)
            return True

    async def assign(self, request: pb.AssignReplicaRequest, *, deadline_s: float) -> None:
        """WorkerService.AssignReplica; a worker that misses the deadline is killed."""
        await self._command(
            "AssignReplica", lambda stub: stub.AssignReplica(request, timeout=deadline_s), True
        )

    async def begin_transfer(self, request: pb.BeginTransferRequest, *, deadline_s: float) -> None:
        """WorkerService.BeginTransfer."""
        await self._command(
            "BeginTransfer", lambda stub: stub.BeginTransfer(request, timeout=deadline_s), False
        )

    async def set_role(self, request: pb.SetRoleRequest, *, deadline_s: float) -> None:
        """WorkerService.SetRole."""
        await self._command("SetRole", lambda stub: stub.SetRole(request, timeout=deadline_s), False)

    async def begin_drain(self, request: pb.BeginDrainRequest, *, deadline_s: float) -> None:
        """WorkerService.BeginDrain."""
        await self._command("BeginDrain", lambda stub: stub.BeginDrain(request, timeout=deadline_s), False)

    async def unassign(self, request: pb.UnassignReplicaRequest, *, deadline_s: float) -> None:
        """WorkerService.UnassignReplica; a worker that misses the deadline is killed."""
        await self._command(
            "UnassignReplica", lambda stub: stub.UnassignReplica(request, timeout=deadline_s), True
        )

    async def _command(
        self,
        name: str,
        call: Callable[[worker_pb2_grpc.WorkerServiceAsyncStub], Awaitable[object]],
        kill_when_late: bool,
    ) -> None:
        """WorkerLostError when the worker is gone, CommandError with the worker's own code otherwise."""
        life = self._life
        if life is None:
            raise WorkerLostError(
                f"{self.slot.device_id} has no worker now: {self.error or 'it is being started'}"
            )
        try:
            with _ended_with_its_worker():
                await call(life.stub)
        except grpc.aio.AioRpcError as error:
            code, text = error.code(), error.details() or ""
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                reason = f"worker of {self.slot.device_id} did not answer {name} in time"
                if not kill_when_late:
                    raise CommandError(grpc.StatusCode.UNAVAILABLE, reason) from None
                if life is self._life:
                    self.kill(reason)
                raise WorkerLostError(reason) from None
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                raise WorkerLostError(f"worker of {self.slot.device_id} went away: {text}") from None
            raise CommandError(code, text) from None
        await self.refresh()

    async def _live(self) -> tuple[str, agent_pb2.Replica | None]:
        """One life: starts the process, watches it, returns why it ended and the replica it had."""
        self._verdict = Verdict(state=agent_pb2.WORKER_STATE_WARMING)
        try:
            life = await self._start()
        except OSError as error:
            return f"worker cannot be started: {error}", None
        self._life = life
        if self._closing.is_set():
            self.kill("the agent ends")
        ended = asyncio.create_task(life.process.wait())
        try:
            await self._watch(life, ended)
            reason = life.killed_because or describe_exit(await ended)
            return reason, self.replica
        finally:
            ended.cancel()
            self._life = None
            self._pid_path.unlink(missing_ok=True)
            await life.channel.close()

    async def _start(self) -> _Life:
        socket = self._settings.socket_path(self.slot)
        socket.unlink(missing_ok=True)
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": self.slot.visible_cuda,
            "OMP_NUM_THREADS": str(self.slot.threads),
        }
        with _open_log(self._log_path, self._limits.log_bytes_max) as output:
            process = await asyncio.create_subprocess_exec(
                *command_line(self._settings, self.slot),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                # Ctrl-C in a terminal reaches the agent only, which ends its workers in order.
                start_new_session=True,
            )
        _write_whole(self._pid_path, f"{process.pid}\n")
        channel = grpc.aio.insecure_channel(f"unix:{socket}", options=CHANNEL_OPTIONS)
        log.info("a worker was started", extra={"device": self.slot.device_id, "pid": process.pid})
        return _Life(
            process=process,
            channel=channel,
            stub=worker_pb2_grpc.WorkerServiceStub(channel),
            started_at=asyncio.get_running_loop().time(),
        )

    async def _watch(self, life: _Life, ended: asyncio.Task[int]) -> None:
        """Polls until the process has ended."""
        clock = asyncio.get_running_loop().time
        limits = self._limits
        began = clock()
        while not ended.done():
            answered = await self.refresh()
            turn_s_max = limits.poll_deadline_s + limits.idle_interval_s
            if self._busy.is_set() or not answered:
                turn_s_max = limits.poll_deadline_s + limits.poll_interval_s
                await asyncio.wait({ended}, timeout=limits.poll_interval_s)
            else:
                busy = asyncio.ensure_future(self._busy.wait())
                await asyncio.wait(
                    {ended, busy}, timeout=limits.idle_interval_s, return_when=asyncio.FIRST_COMPLETED
                )
                busy.cancel()
            now = clock()
            if not answered:
                life.silent_s += min(now - began, turn_s_max)
                self._look(life)
            began = now

    def _look(self, life: _Life) -> None:
        """Judges the process by what is known now."""
        before = self._verdict
        self._verdict = judge(
            warm=life.warm,
            assigned=life.status.HasField("replica"),
            age_s=asyncio.get_running_loop().time() - life.started_at,
            silent_s=life.silent_s,
            limits=self._limits,
        )
        if self._verdict.error or life.warm:
            self.error = self._verdict.error  # until it is warm again, the last death stays visible
        if self._verdict.state != before.state:
            name = agent_pb2.WorkerState.Name(self._verdict.state).removeprefix("WORKER_STATE_")
            log.info("a worker changed its state", extra={"device": self.slot.device_id, "state": name})
        if self._verdict.kill:
            self.kill(f"{self._verdict.error}; it was killed")


@contextlib.contextmanager
def _ended_with_its_worker() -> Iterator[None]:
    """grpc.aio cancels the calls of a channel that is closed; that is not the cancellation of who made them."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise WorkerLostError("the worker ended during the call") from None


def _open_log(path: Path, bytes_max: int) -> IO[bytes]:
    """Opens a log to append to; one that has grown too large is moved aside first."""
    if path.exists() and path.stat().st_size > bytes_max:
        path.replace(path.with_name(path.name + ".1"))
    return path.open("ab")


def _write_whole(path: Path, text: str) -> None:
    """Writes so that a reader never sees half of it."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text)
    draft.replace(path)


async def _wait(what: Awaitable[object], timeout_s: float) -> bool:
    """Whether it happened within the time."""
    try:
        async with asyncio.timeout(timeout_s):
            await what
    except TimeoutError:
        return False
    return True
