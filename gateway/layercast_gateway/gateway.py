"""One gateway process put together: started, ended in order, or ended by the failure of a part."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import uuid
from pathlib import Path

from aiohttp import web

from layercast_gateway.app import Api
from layercast_gateway.dispatcher import Dispatcher
from layercast_gateway.errors import SettingsError
from layercast_gateway.key_ring import KeyRing
from layercast_gateway.metrics import Metrics
from layercast_gateway.route_watch import RouteWatch
from layercast_gateway.routes import RouteTable
from layercast_gateway.settings import Settings, split_address
from layercast_gateway.texts import Texts
from layercast_gateway.tls import Tls

log = logging.getLogger(__name__)

ERROR_GRACE_S = 2.0
"""Time for the last answers to be written after requests were ended by force."""


class Gateway:
    """Everything that a gateway runs. Build it inside the event loop. `dispatcher` tells what it knows."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Unique for the life of this process: a worker tells its gateways apart by it.
        self._gateway_id = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        metrics = Metrics()
        tls = self._tls = Tls(Path(settings.tls_dir)) if settings.tls_dir else None
        if tls is not None:
            metrics.watch_certificate(lambda: tls.expires_at)
        self.dispatcher = Dispatcher(
            settings=settings, gateway_id=self._gateway_id, metrics=metrics, tls=self._tls
        )
        self._texts = Texts(self.dispatcher)
        ring = KeyRing(Path(settings.api_keys_file) if settings.api_keys_file else None, metrics=metrics)
        self._api = Api(
            settings=settings, dispatcher=self.dispatcher, texts=self._texts, metrics=metrics, ring=ring
        )
        # Without cancellation a client that leaves would go unnoticed until its answer is written.
        self._runner = web.AppRunner(
            self._api.application(),
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=ERROR_GRACE_S,
        )
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def address(self) -> str:
        """host:port of the HTTP server, once started."""
        host, port = self._runner.addresses[0][:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def start(self) -> None:
        """Listens and follows the routes; SettingsError when the port is taken."""
        host, port = split_address(self._settings.listen, flag="--listen")
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host or None, port).start()
        except OSError as error:
            await self._runner.cleanup()
            raise SettingsError(_listen_problem(self._settings.listen, error)) from error
        watch = RouteWatch(
            operator=self._settings.operator,
            gateway_id=self._gateway_id,
            on_table=self._on_table,
            tls=self._tls,
        )
        self._tasks = [
            asyncio.create_task(watch.run(), name="routes"),
            asyncio.create_task(self.dispatcher.run(), name="dispatcher"),
        ]
        fields = {"address": self.address, "operator": self._settings.operator, "gateway": self._gateway_id}
        log.info("gateway listens", extra=fields)

    async def until_broken(self) -> None:
        """Returns never; raises what ended a part that must not end."""
        await asyncio.gather(*self._tasks)

    async def stop(self) -> None:
        """Denies readiness, then refuses new requests, lets those in flight end within the grace, closes all."""
        self._api.leaving = True
        settings = self._settings
        log.info(
            "gateway is shutting down",
            extra={"lame_duck_s": settings.lame_duck_s, "grace_s": settings.drain_grace_s},
        )
        await asyncio.sleep(settings.lame_duck_s)
        self._api.closing = True
        try:
            async with asyncio.timeout(settings.drain_grace_s):
                await self._api.until_idle()
        except TimeoutError:
            log.warning("the grace is over, requests in flight are ended")
            self.dispatcher.fail_all()
        await self._runner.cleanup()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._texts.close()
        await self.dispatcher.replicas.close()

    def _on_table(self, table: RouteTable) -> None:
        self.dispatcher.on_table(table)
        self._texts.follow()


def _listen_problem(listen: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"--listen {listen}: the port is in use."
    return f"--listen {listen}: {error.strerror or error}."
