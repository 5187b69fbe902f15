"""The operator's process: settings, servers, the loop, and a clean end on SIGTERM.

With a folder it acts at once. With an API server it looks at once and acts while it holds the Lease: then, and only
then, it serves routes and runs the loop, with a memory that begins empty as after a start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from layercast_operator import logs
from layercast_operator.agents import AgentCalls
from layercast_operator.cluster import Cluster
from layercast_operator.cluster.api import KubeApi, log_in, pause
from layercast_operator.cluster.doorbell import quiet_kopf
from layercast_operator.cluster.kubernetes import KubernetesCluster, Scope
from layercast_operator.cluster.leadership import Leadership
from layercast_operator.cluster.local import LocalCluster
from layercast_operator.errors import SettingsError
from layercast_operator.executor import Executor
from layercast_operator.metrics import Metrics, serve_metrics
from layercast_operator.observer import Observer, ObserverLimits
from layercast_operator.prometheus import Prometheus
from layercast_operator.reconciler import Clock, Reconciler
from layercast_operator.routes import RouteTable, serve_routes
from layercast_operator.settings import KubernetesSettings, Settings, parse_settings
from layercast_operator.tls import Tls

_LOG = logging.getLogger(__name__)

EXIT_SETTINGS = 2
ROUTES_GRACE_S = 0.5
# How late the end of a term may be noticed; the Lease leaves seconds.
TERM_CHECK_S = 0.2


def build(
    process: Process, cluster: Cluster, *, may_act: Callable[[], bool] = lambda: True
) -> tuple[Reconciler, AgentCalls]:
    """The parts that act, joined, with an empty memory."""
    settings, calls = process.settings, AgentCalls(process.tls)
    shared: dict[str, Any] = {"metrics": process.metrics, "clock": process.clock, "wake": process.wake}
    limits = ObserverLimits(
        poll_s=settings.tick_s,
        deadline_s=settings.agent_deadline_s,
        lost_after_s=settings.agent_lost_after_s,
        demand_age_max_s=settings.demand_age_max_s,
    )
    prometheus = None
    if settings.prometheus_url:
        prometheus = Prometheus(
            url=settings.prometheus_url,
            every_s=settings.prometheus_every_s,
            token_file=settings.prometheus_token_file,
            clock=process.clock,
            metrics=process.metrics,
        )
        prometheus.start()
    observer = Observer(calls=calls, limits=limits, prometheus=prometheus, **shared)
    executor = Executor(calls=calls, poll_soon=observer.poll_soon, may_act=may_act, **shared)
    reconciler = Reconciler(
        cluster=cluster,
        observer=observer,
        executor=executor,
        routes=RouteTable(),
        tick_s=settings.tick_s,
        policy=settings.policy,
        **shared,
    )
    return reconciler, calls


async def act(
    process: Process, cluster: Cluster, stop: asyncio.Event, *, may_act: Callable[[], bool] = lambda: True
) -> None:
    """Serve routes and run the loop until `stop`. Raises SettingsError when the port is taken."""
    reconciler, calls = build(process, cluster, may_act=may_act)
    async with contextlib.AsyncExitStack() as stack:
        # Registered first: whatever happens next, nothing of ours is in flight afterwards.
        stack.push_async_callback(calls.close)
        stack.push_async_callback(reconciler.observer.close)
        stack.push_async_callback(reconciler.executor.close)
        listen = process.settings.listen
        server, port = await serve_routes(
            reconciler.routes, host=listen.host, port=listen.port, tls=process.tls
        )
        stack.push_async_callback(server.stop, ROUTES_GRACE_S)
        stack.push_async_callback(reconciler.routes.close)
        _LOG.info("the operator acts", extra={"routes": port})
        process.acting = reconciler
        try:
            await reconciler.run(stop)
        finally:
            process.acting = None


@dataclass(slots=True)
class Process:
    """What all parts share, and what the probes ask."""

    settings: Settings
    stop: asyncio.Event
    metrics: Metrics = field(default_factory=Metrics)
    clock: Clock = field(default_factory=Clock)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    tls: Tls | None = None
    acting: Reconciler | None = None
    watching: KubernetesCluster | None = None

    def alive(self) -> bool:
        """Passes happen, or none are due."""
        return self.acting is None or self.acting.alive()

    def ready(self) -> bool:
        """It acts with a view of everything, or could begin to at once."""
        if self.acting is not None:
            return self.acting.ready()
        return self.watching is not None and self.watching.listed()


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Run until `stop` is set. Raises SettingsError when a port is taken or there is no cluster."""
    tls = Tls(settings.tls_dir) if settings.tls_dir is not None else None
    process = Process(settings=settings, stop=stop, tls=tls)
    if tls is not None:
        process.metrics.watch_certificate(lambda: tls.expires_at)
    listen = settings.metrics_listen
    async with contextlib.AsyncExitStack() as stack:
        runner, port = await serve_metrics(
            process.metrics, host=listen.host, port=listen.port, alive=process.alive, ready=process.ready
        )
        stack.push_async_callback(runner.cleanup)
        _LOG.info("the operator runs", extra={"folder": str(settings.local_dir or ""), "metrics": port})
        if settings.local_dir is not None:
            await act(process, LocalCluster(settings.local_dir, clock=process.clock), stop)
        elif settings.kubernetes is not None:
            await _serve_kubernetes(process, settings.kubernetes, stack)
    _LOG.info("the operator ends")


async def _serve_kubernetes(
    process: Process, given: KubernetesSettings, stack: contextlib.AsyncExitStack
) -> None:
    """Look at once; act in terms, each of which ends with the Lease."""
    quiet_kopf()
    api = KubeApi(log_in())
    stack.push_async_callback(api.close)
    own = given.namespace or api.login.namespace
    scope = Scope(own=own, namespaces=given.watch_namespaces, agents=given.agents, gateways=given.gateways)
    cluster = KubernetesCluster(
        api=api, scope=scope, clock=process.clock, wake=process.wake, metrics=process.metrics
    )
    process.watching = cluster
    cluster.start()
    stack.push_async_callback(cluster.close)
    leadership = Leadership(api=api, namespace=own, name=given.lease_name, me=given.identity)
    stack.push_async_callback(leadership.release)
    contending = asyncio.create_task(leadership.contend(process.stop))
    stack.push_async_callback(asyncio.wait, {contending})
    _LOG.info("waits for the Lease", extra={"lease": f"{own}/{given.lease_name}", "identity": given.identity})
    while not await pause(process.stop, TERM_CHECK_S):
        if leadership.may_act():
            over = asyncio.Event()
            watch = asyncio.create_task(_end_of_term(process, leadership, over))
            await act(process, cluster, over, may_act=leadership.may_act)
            watch.cancel()


async def _end_of_term(process: Process, leadership: Leadership, over: asyncio.Event) -> None:
    """Set `over` when the Lease may be another's soon, or when the process ends."""
    process.metrics.leader.set(1)
    while leadership.may_act() and not await pause(process.stop, TERM_CHECK_S):
        pass
    process.metrics.leader.set(0)
    over.set()


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
