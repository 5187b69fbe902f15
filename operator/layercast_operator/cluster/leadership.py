"""Holds the Lease: asks, renews, gives it up at the end, and knows at every moment whether this process may act."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from layercast_operator.cluster.api import KubeApi
from layercast_operator.cluster.lease import (
    CALL_DEADLINE_S,
    RENEW_EVERY_S,
    Seen,
    Step,
    lease_body,
    may_act,
    next_step,
    seen,
)
from layercast_operator.errors import KubernetesError

_LOG = logging.getLogger(__name__)

NOT_FOUND, CONFLICT = 404, 409


@dataclass(slots=True, kw_only=True)
class Leadership:
    """One contender. `leading` is set while it may act; it is watched, and `may_act` is asked before each act."""

    api: KubeApi
    namespace: str
    name: str
    me: str
    clock: Callable[[], float] = time.monotonic
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever leadership was won or lost."""
    _record: Seen | None = None
    _renewed_at: float | None = None
    _led: bool = False

    def may_act(self) -> bool:
        """Whether nobody else can act now."""
        return may_act(self._renewed_at, now=self.clock())

    async def contend(self, stop: asyncio.Event) -> None:
        """Try for the Lease and keep it, until `stop`; then give it up."""
        while not stop.is_set():
            await self._round()
            self._notice()
            try:
                async with asyncio.timeout(RENEW_EVERY_S):
                    await stop.wait()
            except TimeoutError:
                continue

    async def release(self) -> None:
        """Let the next one begin at once. What was acted must be over before."""
        held, self._renewed_at = self._renewed_at, None
        self._notice()
        if held is None or self._record is None or self._record.holder != self.me:
            return
        try:
            await self._write(release=True)
            _LOG.info("the Lease is given up", extra={"lease": self.name, "identity": self.me})
        except KubernetesError as error:
            _LOG.warning("the Lease cannot be given up", extra={"problem": str(error)})

    async def _round(self) -> None:
        """One look at the Lease and one step; a failure is followed by the next round."""
        asked_at = self.clock()
        try:
            await self._look()
            step = next_step(self._record, me=self.me, now=self.clock())
            if step is Step.WAIT:
                self._renewed_at = None
                return
            sent_at = self.clock()
            await self._write()
            self._renewed_at = sent_at
        except KubernetesError as error:
            if error.code == CONFLICT:
                self._renewed_at = None  # another was faster
            _LOG.log(
                logging.INFO if error.code == CONFLICT else logging.WARNING,
                "the Lease was not renewed",
                extra={"problem": str(error), "took_s": round(self.clock() - asked_at, 2)},
            )

    async def _look(self) -> None:
        path = f"{_path(self.namespace)}/{self.name}"
        try:
            lease = await self.api.call("GET", path, deadline_s=CALL_DEADLINE_S)
        except KubernetesError as error:
            if error.code != NOT_FOUND:
                raise
            self._record = None
            return
        self._record = seen(lease, self._record, now=self.clock())

    async def _write(self, *, release: bool = False) -> None:
        body = lease_body(
            self._record,
            me=self.me,
            name=self.name,
            namespace=self.namespace,
            wall=time.time(),
            release=release,
        )
        path = _path(self.namespace)
        method = "POST" if self._record is None else "PUT"
        path = path if self._record is None else f"{path}/{self.name}"
        lease = await self.api.call(method, path, body=body, deadline_s=CALL_DEADLINE_S)
        self._record = seen(lease, self._record, now=self.clock())

    def _notice(self) -> None:
        leads = self.may_act()
        if leads != self._led:
            self._led = leads
            text = "this operator leads" if leads else "this operator does not lead any more"
            _LOG.info(text, extra={"lease": self.name, "identity": self.me})
            self.changed.set()


def _path(namespace: str) -> str:
    return f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
