"""kopf as a doorbell: it watches, and rings with what it saw. Nothing is decided in its handlers.

kopf runs in a thread with a loop of its own, so that its workers and pauses never delay ours, and only with event
handlers: those write nothing (no annotation, no finalizer, no Kubernetes event) and so never enter its wait for
consistency. Peering is off; who leads is decided by the Lease (`lease`). What kopf cannot tell - an object that
was deleted while its watch was broken - is found by the mirror's own lists.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import kopf

_LOG = logging.getLogger(__name__)

AGAIN_AFTER_S = 1.0
END_DEADLINE_S = 3.0
# A watch over TLS that is closed says goodbye and waits for the answer, which nobody can be asked about: aiohttp's
# own documentation tells to leave the loop so long.
GOODBYE_S = 0.25
WATCH_S = 240

Ring = Callable[[str, str, Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """One kind of object."""

    kind: str
    """What the ring calls it."""
    group: str
    version: str
    plural: str


class _Forever:
    """Seconds between attempts of kopf's calls: an API server may be away for as long as it likes."""

    def __iter__(self) -> Any:
        return itertools.chain((0.2, 0.5), itertools.repeat(1.0))


class Doorbell:
    """One kopf in one thread. `ring(kind, event type, object)` is called in `loop`."""

    def __init__(
        self,
        *,
        watched: Iterable[Watched],
        namespaces: tuple[str, ...],
        login: kopf.ConnectionInfo,
        ring: Ring,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._watched = tuple(watched)
        self._namespaces = namespaces
        self._login = login
        self._ring = ring
        self._loop = loop
        self._stop = threading.Event()
        name = f"kopf {' '.join(w.plural for w in self._watched)}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    async def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        await asyncio.to_thread(self._thread.join, END_DEADLINE_S)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                asyncio.run(self._watch())
            except Exception:
                _LOG.exception("kopf ended; it is started again", extra={"watch": self._thread.name})
            self._stop.wait(AGAIN_AFTER_S)

    async def _watch(self) -> None:
        await kopf.operator(
            registry=self._registry(),
            settings=_settings(),
            standalone=True,
            clusterwide=not self._namespaces,
            namespaces=self._namespaces,
            stop_flag=self._stop,
        )
        await asyncio.sleep(GOODBYE_S)

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry, id="login")(self._log_in)
        for watched in self._watched:
            told = self._teller(watched.kind)
            kopf.on.event(watched.group, watched.version, watched.plural, registry=registry, id="ring")(told)
        return registry

    async def _log_in(self, **_: object) -> kopf.ConnectionInfo:
        return fresh_login(self._login)

    def _teller(self, kind: str) -> Callable[..., Any]:
        async def tell(event: Mapping[str, Any], **_: object) -> None:
            self._loop.call_soon_threadsafe(self._ring, kind, event["type"] or "LISTED", event["object"])

        return tell


def fresh_login(info: kopf.ConnectionInfo) -> kopf.ConnectionInfo:
    """The same way with the token of this moment: kopf asks again when the old one was refused."""
    if not info.token:
        return info
    found = kopf.login_with_service_account(settings=kopf.OperatorSettings())
    if found is None:
        return info
    return kopf.ConnectionInfo(
        server=info.server,
        ca_path=info.ca_path,
        ca_data=info.ca_data,
        insecure=info.insecure,
        token=found.token,
        default_namespace=info.default_namespace,
    )


def _settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.networking.error_backoffs = _Forever()
    settings.networking.connect_timeout = 3.0
    settings.watching.server_timeout = WATCH_S
    settings.watching.client_timeout = WATCH_S + 10
    settings.watching.connect_timeout = 3.0
    return settings


def quiet_kopf() -> None:
    """kopf tells a line for every event it handles; ours tell what matters."""
    logging.getLogger("kopf").setLevel(logging.WARNING)
    # It warns that it leaves signals to us, which is meant.
    logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)
