"""`layercast-agent`: reads flags and environment, serves until SIGTERM, says in one sentence what is wrong."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from layercast_agent import logs
from layercast_agent.leaving import leave
from layercast_agent.node import running
from layercast_agent.rdma import Rdma
from layercast_agent.settings import AgentSettings, SettingsError

log = logging.getLogger(__name__)

EXIT_WRONG_SETTING = 2


def _cores(text: str) -> tuple[int, ...]:
    return tuple(int(core) for core in text.split(",") if core.strip())


def _folder(text: str) -> Path | None:
    return Path(text) if text else None


def _flags(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    """The flags; each has its default from LAYERCAST_<FLAG> when that is set."""
    parser = argparse.ArgumentParser(
        prog="layercast-agent",
        description="Owns a node: its checkpoints on disk, its devices and their workers.",
        epilog="Every flag can be given as environment variable too: --store-dir is LAYERCAST_STORE_DIR.",
        allow_abbrev=False,
    )

    def flag(
        name: str, text: str, *, default: str | None = None, kind: Callable[[str], object] = str
    ) -> None:
        value = environment.get("LAYERCAST_" + name.upper().replace("-", "_"), default)
        parser.add_argument(f"--{name}", help=text, default=value, required=value is None, type=kind)

    def size(name: str, text: str) -> None:
        flag(name, text, default="0", kind=int)

    flag("node", "name of this node")
    flag("listen", "host:port of AgentService and PeerService; an address that peers can reach")
    flag("data-listen", "host:port of the data plane; an address that peers can reach")
    flag("store-dir", "folder of packed checkpoints", kind=Path)
    flag("run-dir", "folder of sockets, pid files and logs of the workers", kind=Path)
    flag("devices", "cpu:N, cuda, or cuda:0,1", default="cuda")
    flag("device-memory-bytes", "memory that a replica may use on a device", kind=int)
    size("host-pool-bytes", "host memory for copies of checkpoints; 0: no copies")
    size("store-bytes-max", "what packed checkpoints may take on disk; 0: no limit")
    size("reserve-bytes", "host memory that a CPU worker touches before it loads")
    flag("token-file", "file with the shared secret of the data plane", kind=Path)
    flag("rdma", "auto, require or off: read from other workers by RDMA", default="auto", kind=Rdma)
    flag("tls-dir", "folder with ca.crt, tls.crt, tls.key; empty: no TLS", default="", kind=_folder)
    flag("cpu-share", "share of one core that a CPU device may use, in (0, 1]", default="1", kind=float)
    flag(
        "cpu-cores", "cores of the workers, such as 0,1; empty leaves them unpinned", default="", kind=_cores
    )
    flag("engine", "block of models that ask for none: auto, generic or fast", default="auto")
    size("egress-bytes-per-s", "most parameter bytes that each process sends a second; 0: no limit")
    size(
        "disk-bytes-per-s", "for benchmarks: most packed bytes that each process reads a second; 0: no limit"
    )
    flag("leaf", "name of the leaf switch", default="")
    flag("metrics-listen", "host:port of /metrics, /healthz, /readyz; 0 turns them off", default="0")
    flag(
        "pvc-root",
        "folder with the mounted claims of pvc:// sources",
        default="/var/lib/layercast/pvc",
        kind=Path,
    )
    flag(
        "stop-grace-s", "seconds that a worker may take to end before it is killed", default="10", kind=float
    )
    flag("leave-grace-s", "seconds to wait for replicas to move on SIGTERM; 0: none", default="0", kind=float)
    flag("log-format", "text or json", default="text")
    flag(
        "worker-command",
        "program of a worker, the flags are appended; for tests and debugging",
        default=f"{shlex.quote(sys.executable)} -m layercast_agent.worker",
        kind=lambda text: tuple(shlex.split(text)),
    )
    return parser


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> AgentSettings:
    """Settings from flags, else from the environment; unchecked. Exits with code 2 when a flag is malformed."""
    return AgentSettings(**vars(_flags(environment).parse_args(arguments)))


async def _serve(settings: AgentSettings) -> None:
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def end() -> None:
        (hurry if stop.is_set() else stop).set()  # who asks a second time does not want to wait

    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, end)
    async with running(settings) as node:
        await node.until(stop)
        await leave(node.agent, grace_s=settings.leave_grace_s, hurry=hurry)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs an agent; 0 after SIGTERM or SIGINT, 2 for a wrong setting."""
    settings = parse(sys.argv[1:] if arguments is None else arguments, os.environ)
    try:
        settings.check()
        logs.set_up(settings.log_format)
        asyncio.run(_serve(settings))
    except SettingsError as error:
        sys.stderr.write(f"layercast-agent: {error}\n")
        return EXIT_WRONG_SETTING
    return 0


if __name__ == "__main__":
    sys.exit(main())
