"""Posts Kubernetes events about ModelServices, one after the other, within the allowance of each object."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from layercast_operator.cluster.api import KubeApi
from layercast_operator.cluster.happenings import Allowance, Happening, happenings, spend
from layercast_operator.cluster.mirror import Key
from layercast_operator.errors import KubernetesError

_LOG = logging.getLogger(__name__)

WAITING_MAX = 256
MESSAGE_MAX = 1000


@dataclass(slots=True, kw_only=True)
class EventPoster:
    """Owns what is to be posted. What does not fit is left out: the status says it anyway."""

    api: KubeApi
    clock: Callable[[], float]
    _before: dict[Key, Mapping[str, Any]] = field(default_factory=dict)
    _allowances: dict[Key, Allowance] = field(default_factory=dict)
    _queue: asyncio.Queue[dict[str, Any]] = field(default_factory=lambda: asyncio.Queue(WAITING_MAX))

    def offer(
        self, key: Key, *, uid: str, status: Mapping[str, Any], known: Mapping[str, Any] | None
    ) -> None:
        """This is the status now; what changed since the last one is posted."""
        before = self._before.get(key, known)
        self._before[key] = status
        for happening in happenings(before, status):
            allowed, self._allowances[key] = spend(self._allowances.get(key, Allowance()), now=self.clock())
            if allowed and not self._queue.full():
                self._queue.put_nowait(_event(key, uid, happening, self.clock()))

    def forget(self, key: Key) -> None:
        """The object is gone."""
        self._before.pop(key, None)
        self._allowances.pop(key, None)

    async def run(self) -> None:
        """Post what waits, until cancelled."""
        while True:
            event = await self._queue.get()
            namespace = event["metadata"]["namespace"]
            try:
                await self.api.call("POST", f"/api/v1/namespaces/{namespace}/events", body=event)
            except KubernetesError as error:
                _LOG.warning(
                    "an event was not posted", extra={"reason": event["reason"], "problem": str(error)}
                )


def _event(key: Key, uid: str, happening: Happening, at: float) -> dict[str, Any]:
    namespace, name = key
    stamp = datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{name}.{secrets.token_hex(8)}", "namespace": namespace},
        "involvedObject": {
            "apiVersion": "layercast.dev/v1alpha1",
            "kind": "ModelService",
            "namespace": namespace,
            "name": name,
            "uid": uid,
        },
        "type": happening.type,
        "reason": happening.reason,
        "message": happening.message[:MESSAGE_MAX],
        "source": {"component": "layercast-operator"},
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "count": 1,
    }
