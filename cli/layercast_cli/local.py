"""A whole Layercast on this machine: operator core, gateway and agents as local processes.

Used by `layercast up`, by `layercast demo` and by tests that need the real processes. The cluster is a
folder (see `state`) plus processes; whoever enters it as a context manager gets all processes ended on the
way out, and the kernel ends them when this process is killed."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import psutil

from layercast_cli.errors import ClusterError, UsageError
from layercast_cli.modelfile import read_service, write_service
from layercast_cli.ports import check_free, free_ports
from layercast_cli.programs import LOOPBACK, ClusterLayout, ClusterSettings, NodeLayout, layercast_programs
from layercast_cli.shares import (
    available_memory_bytes,
    device_memory_bytes,
    host_pool_bytes,
    plan_cpus,
    usable_cores,
)
from layercast_cli.state import StateDir, write_atomic
from layercast_cli.status import ServiceStatus, read_status
from layercast_cli.supervise import Backoff, Program, Supervisor

LOOK_INTERVAL_S = 0.1
# A Unix socket's path has at most 107 bytes; an agent's run folder needs room for the name of the socket.
RUN_PATH_BYTES_MAX = 80


class LocalCluster:
    """A local cluster; see the module. Not thread-safe, except that its files may be read by anybody."""

    def __init__(
        self,
        settings: ClusterSettings,
        *,
        programs: Callable[[ClusterLayout], Sequence[Program]] = layercast_programs,
        backoff: Backoff | None = None,
    ) -> None:
        """Starts nothing. Raises UsageError when the settings cannot work."""
        self.state = StateDir(root=settings.state_dir.expanduser().absolute())
        self._settings = settings
        self._programs = programs
        self._backoff = backoff
        self._held = contextlib.ExitStack()
        self._supervisor: Supervisor | None = None
        self.layout: ClusterLayout | None = None
        check_settings(settings, self.state)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Writes the files and starts the processes; does not wait for them.

        Raises UsageError when the wanted port is taken, ClusterError when another cluster uses the folder.
        """
        self.state.create()
        self._held.enter_context(self.state.hold())
        try:
            self.layout = self._lay_out()
            self._write_files(self.layout)
            self._supervisor = Supervisor(self._programs(self.layout), backoff=self._backoff)
            atexit.register(self.stop)
            self._supervisor.start()
        except BaseException:
            self.stop()
            raise

    def stop(self, *, grace_s: float = 10.0) -> None:
        """Ends every process, SIGTERM first, and lets go of the folder. May be called again."""
        atexit.unregister(self.stop)
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.stop(grace_s=grace_s)
        self._held.close()

    @property
    def gateway_url(self) -> str:
        """Where clients send their requests."""
        assert self.layout is not None, "start() comes first"
        return f"http://{self.layout.gateway_address}"

    @property
    def processes(self) -> dict[str, int]:
        """Process ids by name: `operator`, `gateway`, `node-0`, ..., and the agents' workers as
        `node-0/worker-cpu:0`."""
        if self._supervisor is None or self.layout is None:
            return {}
        found = self._supervisor.pids
        for node in self.layout.nodes:
            found |= self._workers(node.name, agent_pid=found.get(node.name))
        return found

    def kill(self, name: str, number: int) -> int:
        """Sends a signal to a process of this cluster and returns its process id; ClusterError when there
        is none."""
        pid = self.processes.get(name)
        if pid is None or self._supervisor is None:
            raise ClusterError(f"there is no process {name}; there are {', '.join(sorted(self.processes))}")
        if "/" in name:
            os.kill(pid, number)
        else:
            self._supervisor.send(name, number)
        return pid

    def restarts(self) -> dict[str, int]:
        """How often each process was started again."""
        if self._supervisor is None:
            return {}
        return {name: self._supervisor.restarts(name) for name in self._supervisor.names}

    def status(self, model: str) -> ServiceStatus | None:
        """What the operator last wrote about `model`; None when nothing yet."""
        return read_status(self.state.status, model)

    def edit(self, model: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Changes the wanted state of a ModelService: `change` alters its document in place."""
        document = read_service(self.state.services, model)
        change(document)
        write_service(self.state.services, document)

    def broken(self) -> str:
        """A sentence about a process that does not stay up; empty when all is well."""
        return self._supervisor.broken() if self._supervisor is not None else ""

    def wait(
        self,
        model: str,
        reached: Callable[[ServiceStatus], bool],
        *,
        deadline_s: float,
        what: str = "get there",
        seen: Callable[[ServiceStatus | None], None] = lambda _status: None,
    ) -> ServiceStatus:
        """Waits until `reached` holds of the status, showing each look to `seen`.

        Raises ClusterError when time is up or a process does not stay up.
        """
        deadline = time.monotonic() + deadline_s
        while True:
            status = self.status(model)
            seen(status)
            if status is not None and reached(status):
                return status
            problem = self.broken()
            if problem:
                raise ClusterError(problem)
            if time.monotonic() >= deadline:
                raise ClusterError(f"{model} did not {what} within {deadline_s:.0f} s: {_last_words(status)}")
            # Another process writes that file: there is nothing to be woken by.
            time.sleep(LOOK_INTERVAL_S)

    def wait_ready(
        self,
        model: str,
        *,
        deadline_s: float = 120.0,
        serving: int = 1,
        seen: Callable[[ServiceStatus | None], None] = lambda _status: None,
    ) -> ServiceStatus:
        """Waits until `serving` replicas serve and the gateway offers the model; raises as `wait` does."""
        deadline = time.monotonic() + deadline_s
        what = f"reach {serving} serving replicas"
        self.wait(
            model, lambda status: status.serving >= serving, deadline_s=deadline_s, what=what, seen=seen
        )
        left = max(1.0, deadline - time.monotonic())
        what = "appear at the gateway"
        return self.wait(
            model, lambda _: offers(self.gateway_url, model), deadline_s=left, what=what, seen=seen
        )

    def _lay_out(self) -> ClusterLayout:
        settings = self._settings
        if settings.port:
            check_free(settings.host, settings.port)
        plans = plan_cpus(usable_cores(), settings.agents, share=settings.cpu_share)
        with free_ports(LOOPBACK, 3 * settings.agents + 3) as ports:
            free = iter(ports)
            nodes = tuple(
                NodeLayout(
                    name=f"node-{index}",
                    address=f"{LOOPBACK}:{next(free)}",
                    data_address=f"{LOOPBACK}:{next(free)}",
                    metrics_address=f"{LOOPBACK}:{next(free)}",
                    cpus=plan,
                )
                for index, plan in enumerate(plans)
            )
            port = settings.port or next(free)
            near = LOOPBACK if settings.host in ("0.0.0.0", "") else settings.host
            return ClusterLayout(
                state=self.state,
                settings=settings,
                nodes=nodes,
                gateway_listen=f"{settings.host}:{port}",
                gateway_address=f"{near}:{port}",
                operator_address=f"{LOOPBACK}:{next(free)}",
                operator_metrics_address=f"{LOOPBACK}:{next(free)}",
                device_memory_bytes=settings.device_memory_bytes
                or device_memory_bytes(available_memory_bytes(), settings.agents),
                host_pool_bytes=host_pool_bytes(available_memory_bytes(), settings.agents)
                if settings.host_pool_bytes is None
                else settings.host_pool_bytes,
            )

    def _write_files(self, layout: ClusterLayout) -> None:
        """The wanted state anew; what an earlier cluster saw and said goes away, its packed checkpoints stay."""
        state = self.state
        for stale in (
            *state.services.glob("*.yaml"),
            *state.status.glob("*.json"),
            *state.logs.glob("*.log"),
        ):
            stale.unlink()
        for node in layout.nodes if layout.settings.fresh else ():
            shutil.rmtree(state.node(node.name) / "store", ignore_errors=True)
        if layout.settings.tls:
            # Imported at use: most clusters on one machine need no certificates.
            from layercast_cli.certificates import issue_all

            issue_all(state.certificates)
        write_atomic(self.state.token_file, secrets.token_hex(32) + "\n", mode=0o600)
        now = time.time()
        names = []
        for service in layout.settings.services:
            document = with_policy(service, layout.settings.policy)
            write_service(self.state.services, document)
            names.append(document["metadata"]["name"])
        agents = {node.name: node.address for node in layout.nodes}
        cluster = {"agents": agents, "gateways": [layout.gateway_address]}
        write_atomic(self.state.cluster_file, json.dumps(cluster, indent=2) + "\n")
        about = {"pid": os.getpid(), "startedAt": now, "gateway": f"http://{layout.gateway_address}"}
        about |= {"services": dict.fromkeys(names, now)}
        write_atomic(self.state.about_file, json.dumps(about, indent=2) + "\n")

    def _workers(self, node: str, *, agent_pid: int | None) -> dict[str, int]:
        """The workers of one agent: those of its pid files that are really its children."""
        found = {}
        for path in sorted((self.state.node(node) / "run").glob("worker-*.pid")):
            with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
                pid = int(path.read_text())
                if agent_pid is not None and psutil.Process(pid).ppid() == agent_pid:
                    found[f"{node}/{path.stem}"] = pid
        return found


def check_settings(settings: ClusterSettings, state: StateDir) -> None:
    """Raises UsageError for settings that cannot work."""
    if settings.agents < 1:
        raise UsageError(f"a cluster needs at least one agent; asked for {settings.agents}")
    if not settings.services:
        raise UsageError("a cluster needs at least one ModelService")
    if settings.cpu_share is not None and not 0 < settings.cpu_share <= 1:
        raise UsageError(f"a CPU share is above 0 and at most 1; asked for {settings.cpu_share}")
    longest = state.node(f"node-{settings.agents - 1}") / "run"
    if len(os.fsencode(longest)) > RUN_PATH_BYTES_MAX:
        raise UsageError(
            f"the path {state.root} is too long for the sockets in it; choose a shorter --state-dir"
        )


def with_policy(service: Mapping[str, Any], policy: str) -> dict[str, Any]:
    """The document with the scaling policy asked for on the command line, where the document scales at
    all."""
    document = {**service, "spec": {**service["spec"]}}
    scaling = document["spec"].get("scaling")
    if policy and isinstance(scaling, dict):
        document["spec"]["scaling"] = {**scaling, "policy": policy}
    return document


def offers(gateway_url: str, model: str, *, timeout_s: float = 2.0) -> bool:
    """Whether the gateway lists `model` now."""
    try:
        with urllib.request.urlopen(f"{gateway_url}/v1/models", timeout=timeout_s) as response:
            listed = json.load(response)
        return any(each.get("id") == model for each in listed.get("data", []))
    except (urllib.error.URLError, OSError, ValueError, AttributeError):
        return False


def _last_words(status: ServiceStatus | None) -> str:
    """What the operator said last, for the sentence of a failed wait."""
    if status is None:
        return "the operator has written no status yet"
    spoken = [each.message or each.reason for each in status.conditions if each.status != "True"]
    errors = [f"{each.replica_id}: {each.error}" for each in status.replicas if each.error]
    counts = f"{status.serving} of {status.desired} replicas serve"
    return "; ".join([counts, *(words for words in spoken if words), *errors])
