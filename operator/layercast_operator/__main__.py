"""The operator's process in local mode: settings, servers, the loop, and a clean end on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

from layercast_operator import logs
from layercast_operator.agents import AgentCalls
from layercast_operator.cluster.local import LocalCluster
from layercast_operator.errors import SettingsError
from layercast_operator.executor import Executor
from layercast_operator.metrics import Metrics, serve_metrics
from layercast_operator.observer import Observer, ObserverLimits
from layercast_operator.reconciler import Clock, Reconciler
from layercast_operator.routes import RouteTable, serve_routes
from layercast_operator.settings import Settings, parse_settings

_LOG = logging.getLogger(__name__)

EXIT_SETTINGS = 2


def build(settings: Settings) -> tuple[Reconciler, AgentCalls]:
    """The parts of an operator on a local folder, joined."""
    clock, metrics, wake, calls = Clock(), Metrics(), asyncio.Event(), AgentCalls()
    limits = ObserverLimits(
        poll_s=settings.tick_s,
        deadline_s=settings.agent_deadline_s,
        lost_after_s=settings.agent_lost_after_s,
        demand_age_max_s=settings.demand_age_max_s,
    )
    observer = Observer(calls=calls, metrics=metrics, clock=clock, wake=wake, limits=limits)
    executor = Executor(calls=calls, metrics=metrics, clock=clock, wake=wake, poll_soon=observer.poll_soon)
    reconciler = Reconciler(
        cluster=LocalCluster(settings.local_dir, clock=clock),
        observer=observer,
        executor=executor,
        routes=RouteTable(),
        metrics=metrics,
        clock=clock,
        wake=wake,
        tick_s=settings.tick_s,
        policy=settings.policy,
    )
    return reconciler, calls


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Run until `stop` is set. Raises SettingsError when a port is taken."""
    reconciler, calls = build(settings)
    async with contextlib.AsyncExitStack() as stack:
        runner, metrics_port = await serve_metrics(
            reconciler.metrics,
            host=settings.metrics_listen.host,
            port=settings.metrics_listen.port,
            alive=reconciler.alive,
            ready=reconciler.ready,
        )
        stack.push_async_callback(runner.cleanup)
        server, port = await serve_routes(
            reconciler.routes, host=settings.listen.host, port=settings.listen.port
        )
        stack.push_async_callback(server.stop, 0.5)
        stack.push_async_callback(reconciler.routes.close)
        stack.push_async_callback(calls.close)
        stack.push_async_callback(reconciler.observer.close)
        stack.push_async_callback(reconciler.executor.close)
        _LOG.info(
            "the operator runs",
            extra={"folder": str(settings.local_dir), "routes": port, "metrics": metrics_port},
        )
        await reconciler.run(stop)
    _LOG.info("the operator ends")


async def _until_signal(settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(settings, stop)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `layercast-operator`; 2 and one sentence when it cannot start as asked."""
    try:
        settings = parse_settings(sys.argv[1:] if arguments is None else arguments, os.environ)
        logs.set_up(settings.log_format)
        asyncio.run(_until_signal(settings))
    except SettingsError as error:
        sys.stderr.write(f"layercast-operator: {error}\n")
        return EXIT_SETTINGS
    return 0


if __name__ == "__main__":
    sys.exit(main())
