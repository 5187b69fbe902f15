"""Settings of an agent: checked once at start, never changed afterwards.

`__main__` fills them from flags and environment; nothing else reads either. A wrong value ends the process
with one sentence that names the flag, before anything is started.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from layercast_agent.errors import AgentError
from layercast_agent.rdma import Rdma

SOCKET_PATH_BYTES_MAX = 107
"""Linux's limit for the path of a Unix socket (sockaddr_un, less the final zero)."""

WILDCARDS = frozenset({"", "0.0.0.0", "::", "[::]"})


class SettingsError(AgentError):
    """A setting is wrong; the text names its flag and says what would be right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSlot:
    """One device of this node, and what its worker's process is given."""

    device_id: str
    """Its name on the node, e.g. `cuda:1`; this is what operators see."""

    worker_device: str
    """What the worker calls it: a CUDA worker sees one device only, which is its `cuda:0`."""

    visible_cuda: str
    """Value of CUDA_VISIBLE_DEVICES; empty hides all accelerators from a CPU worker."""

    cpu_cores: tuple[int, ...]
    """Cores that the worker is pinned to; empty leaves it unpinned."""

    threads: int
    """OMP_NUM_THREADS: more threads than cores make every device of the node slower."""


ENGINES = ("auto", "generic", "fast")


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """What an agent is told at its start. `check` says what is wrong with it."""

    node: str
    """Name of the node; the agent's peer id."""

    listen: str
    """host:port of AgentService and PeerService. The host is announced to peers: never a wildcard."""

    data_listen: str
    """host:port of the data plane that serves this node's disk copies; the host is announced too."""

    store_dir: Path
    """Folder of the packed checkpoints; created when missing. Survives the agent."""

    run_dir: Path
    """Folder of sockets, pid files and logs of the workers; created when missing. One agent at a time."""

    devices: str
    """`cpu:N` (N processor shares), `cuda` (every visible device) or `cuda:0,1` (some of them)."""

    device_memory_bytes: int
    """What parameters and KV cache of one device may use together."""

    token_file: Path
    """File with the shared secret of the data plane; the workers read the same one."""

    rdma: Rdma = Rdma.AUTO
    """Whether workers read from each other by RDMA: `auto` where it is possible, `require`, `off`."""

    tls_dir: Path | None = None
    """Folder with `ca.crt`, `tls.crt`, `tls.key` of the role agent; None leaves everything in plain text."""

    reserve_bytes: int = 0
    """Host memory that each CPU worker touches while it warms up, so that loads need no page faults; 0: none."""

    cpu_share: float = 1.0
    """Share of one core that a CPU device may use, in (0, 1]; lets small machines imitate several devices."""

    cpu_cores: tuple[int, ...] = ()
    """Cores of this node's workers, dealt out evenly among them; empty leaves them unpinned."""

    host_pool_bytes: int = 0
    """Host memory for copies of checkpoints, taken at the start and never exceeded; 0 keeps none."""

    store_bytes_max: int = 0
    """What packed checkpoints may take on disk; the least recently used that nobody wants make room. 0: no limit."""

    engine: str = "auto"
    """Block implementation of models that ask for none: one of ENGINES."""

    egress_bytes_per_s: int = 0
    """Most parameter bytes per second that each process of this node sends (the agent, and every worker);
    0 is unlimited."""

    disk_bytes_per_s: int = 0
    """Most bytes per second that each process of this node reads from packed checkpoints; 0 is as fast as the disk.
    For benchmarks: a machine whose files are cached then loads like one whose disk is slow."""

    leaf: str = ""
    """Name of the leaf switch; nodes with equal names reach each other fastest."""

    metrics_listen: str = ""
    """host:port of /metrics, /healthz and /readyz; empty or `0` turns them off."""

    pvc_root: Path = Path("/var/lib/layercast/pvc")
    """Folder below which volume claims are mounted, for pvc:// sources."""

    log_format: str = "text"
    """`text` or `json`."""

    stop_grace_s: float = 10.0
    """How long a worker may take to end after SIGTERM before it is killed."""

    leave_grace_s: float = 0.0
    """How long an agent that is to end waits until its replicas and host copies are elsewhere; 0: not at all."""

    worker_command: tuple[str, ...] = field(default=(sys.executable, "-m", "layercast_agent.worker"))
    """Program and first arguments of a worker; the agent appends the flags. For tests and debugging."""

    def check(self) -> None:
        """Raises SettingsError with the first thing that is wrong. Touches no file."""
        for name, good, wanted in (
            ("--node", bool(self.node), "a name"),
            ("--device-memory-bytes", self.device_memory_bytes > 0, "a number of bytes above 0"),
            ("--reserve-bytes", self.reserve_bytes >= 0, "0 (none) or a number of bytes"),
            ("--cpu-share", 0 < self.cpu_share <= 1, "above 0 and at most 1"),
            (
                "--host-pool-bytes",
                self.host_pool_bytes >= 0,
                "0 (no copies in host memory) or a number of bytes",
            ),
            ("--store-bytes-max", self.store_bytes_max >= 0, "0 (no limit) or a number of bytes"),
            ("--engine", self.engine in ENGINES, f"one of {', '.join(ENGINES)}"),
            ("--egress-bytes-per-s", self.egress_bytes_per_s >= 0, "0 (unlimited) or a number of bytes"),
            ("--leave-grace-s", self.leave_grace_s >= 0, "0 or more seconds"),
            ("--disk-bytes-per-s", self.disk_bytes_per_s >= 0, "0 (unlimited) or a number of bytes"),
            ("--stop-grace-s", self.stop_grace_s >= 0, "0 or more seconds"),
            ("--log-format", self.log_format in ("text", "json"), "text or json"),
            ("--worker-command", bool(self.worker_command), "a program"),
        ):
            if not good:
                raise SettingsError(f"{name} must be {wanted}.")
        for name, address in (("--listen", self.listen), ("--data-listen", self.data_listen)):
            host, _ = parse_address(address, flag=name)
            if host in WILDCARDS:
                raise SettingsError(
                    f"{name} {address}: peers are told this host, so it must be an address of this node, "
                    "not a wildcard."
                )
        if self.metrics_address is not None:
            parse_address(self.metrics_listen, flag="--metrics-listen")
        for slot in device_slots(self):
            path = os.fsencode(self.socket_path(slot))
            if len(path) > SOCKET_PATH_BYTES_MAX:
                raise SettingsError(
                    f"--run-dir {self.run_dir}: a worker's socket would have a path of {len(path)} bytes; "
                    f"Unix sockets allow {SOCKET_PATH_BYTES_MAX}."
                )

    @property
    def metrics_address(self) -> tuple[str, int] | None:
        """Host and port of the metrics server; None when it is off."""
        if self.metrics_listen in ("", "0"):
            return None
        return parse_address(self.metrics_listen, flag="--metrics-listen")

    @property
    def memory_socket(self) -> Path:
        """The Unix socket on which workers are handed the host pool's memory."""
        return self.run_dir / "host-memory.sock"

    def socket_path(self, slot: DeviceSlot) -> Path:
        """The Unix socket of a device's worker."""
        return self.run_dir / f"worker-{slot.device_id}.sock"


def parse_address(address: str, *, flag: str) -> tuple[str, int]:
    """Host and port of `host:port`. SettingsError names `flag`."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise SettingsError(f"{flag} must be host:port, not {address!r}.")
    return host, int(port)


def device_slots(settings: AgentSettings) -> tuple[DeviceSlot, ...]:
    """The devices that `settings.devices` names, each with its share of the cores.

    SettingsError when the text is wrong or names a device that is not there.
    """
    kind, _, rest = settings.devices.partition(":")
    if kind == "cpu" and rest.isdigit() and int(rest) > 0:
        names = [(f"cpu:{index}", f"cpu:{index}", "") for index in range(int(rest))]
    elif kind == "cuda":
        names = _cuda_names(rest, visible_cuda_devices())
    else:
        raise SettingsError(f"--devices must be cpu:N, cuda or cuda:0,1, not {settings.devices!r}.")
    slots = []
    for index, (device_id, worker_device, visible) in enumerate(names):
        cores = _cores_of(settings.cpu_cores, index=index, devices=len(names))
        available = len(cores) or len(os.sched_getaffinity(0)) // len(names)
        slots.append(
            DeviceSlot(
                device_id=device_id,
                worker_device=worker_device,
                visible_cuda=visible,
                cpu_cores=cores,
                threads=max(1, available),
            )
        )
    return tuple(slots)


def visible_cuda_devices() -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES may name in this process.

    The driver's device files are counted: asking CUDA would need torch, and this process owns no device.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return tuple(part.strip() for part in chosen.split(",") if part.strip())
    files = [path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    return tuple(str(index) for index in range(len(files)))


def _cuda_names(rest: str, visible: tuple[str, ...]) -> list[tuple[str, str, str]]:
    try:
        indices = [int(part) for part in rest.split(",")] if rest else list(range(len(visible)))
    except ValueError:
        raise SettingsError(f"--devices cuda:{rest} must list numbers, as in cuda:0,1.") from None
    if not visible or not indices:
        raise SettingsError("--devices cuda: no CUDA device is visible on this node.")
    beyond = [index for index in indices if not 0 <= index < len(visible)]
    if beyond or len(set(indices)) != len(indices):
        raise SettingsError(
            f"--devices cuda:{rest}: this node has cuda:0 to cuda:{len(visible) - 1}, each once."
        )
    return [(f"cuda:{index}", "cuda:0", visible[index]) for index in indices]


def _cores_of(cores: tuple[int, ...], *, index: int, devices: int) -> tuple[int, ...]:
    """Contiguous and even; when there are fewer cores than devices, all share all."""
    if len(cores) < devices:
        return cores
    return cores[index * len(cores) // devices : (index + 1) * len(cores) // devices]
