"""`layercast up`: a local cluster in the foreground, shown while it runs, ended by Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from rich.console import Console
from rich.live import Live

from layercast_cli.display import service_words, up_panel
from layercast_cli.errors import ClusterError
from layercast_cli.local import LocalCluster
from layercast_cli.modelfile import load_services
from layercast_cli.programs import ClusterSettings
from layercast_cli.settings import UpSettings
from layercast_cli.status import ServiceStatus

LOOK_INTERVAL_S = 0.5
BITS_PER_BYTE = 8
Statuses = list[tuple[str, ServiceStatus | None]]


def up(settings: UpSettings) -> int:
    """Runs until Ctrl-C or SIGTERM; 0 when stopped so. Raises CliError."""
    services = load_services(settings.file)
    names = [str(service["metadata"]["name"]) for service in services]
    cluster = LocalCluster(
        ClusterSettings(
            state_dir=settings.state.root,
            services=services,
            agents=settings.agents,
            policy=settings.policy,
            host=settings.host,
            port=settings.port,
            link_bytes_per_s=int(settings.link_mbit_per_s * 1e6 / BITS_PER_BYTE),
            cpu_share=settings.cpu_share,
            host_pool_bytes=None if settings.host_pool_mib is None else settings.host_pool_mib << 20,
            devices=settings.devices,
            tls=settings.tls,
        )
    )
    console = Console(highlight=False)
    with stop_signals() as stop, cluster:
        watch(cluster, names, stop=stop, console=console)
        console.print("stopping")
    return 0


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT, SIGTERM and SIGHUP set, instead of ending the program on the spot."""
    stop = threading.Event()

    def ask(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def watch(cluster: LocalCluster, names: Sequence[str], *, stop: threading.Event, console: Console) -> None:
    """Shows the cluster until `stop`; ClusterError when a process does not stay up."""
    footer = hints(cluster, names[0])
    if not console.is_terminal:
        for line in footer:
            console.print(line, soft_wrap=True)
        _look_until(stop, cluster, names, _print_changes(console))
        return
    with Live(console=console, refresh_per_second=4) as live:
        _look_until(stop, cluster, names, lambda statuses: live.update(up_panel(statuses, footer)))


def hints(cluster: LocalCluster, name: str) -> list[str]:
    """What to do now: a request, the logs, how to end."""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    url = f"{cluster.gateway_url}/v1/chat/completions"
    return [
        f"ask it:  curl {url} -H 'Content-Type: application/json' -d '{body}'",
        f"watch:   layercast get -o wide --state-dir {cluster.state.root}",
        f"logs:    {cluster.state.logs}",
        "Ctrl-C ends everything.",
    ]


def _look_until(
    stop: threading.Event, cluster: LocalCluster, names: Sequence[str], show: Callable[[Statuses], None]
) -> None:
    while True:
        show([(name, cluster.status(name)) for name in names])
        problem = cluster.broken()
        if problem:
            raise ClusterError(problem)
        if stop.wait(LOOK_INTERVAL_S):
            return


def _print_changes(console: Console) -> Callable[[Statuses], None]:
    """Prints the line of a ModelService whenever it differs from the one before."""
    last: dict[str, str] = {}

    def show(statuses: Statuses) -> None:
        for name, status in statuses:
            line = service_words(name, status)
            if last.get(name) != line:
                console.print(line, soft_wrap=True)
            last[name] = line

    return show
