"""Publishes statuses to the API server: the newest of each ModelService, soon when it matters, never too often.

A pass may report several times a second; an API server and everybody who watches it should not hear each. What
matters (a condition, a count, a decision) is written within a quarter of a second; progress and rates follow every
few seconds, and all writes together stay below a rate. Written is by server-side apply under a name of our own, on the
status subresource only: `spec` is never touched, so nobody's `replicas` is fought over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from layercast_operator.cluster.api import MERGE, KubeApi
from layercast_operator.cluster.mirror import Key
from layercast_operator.errors import KubernetesError

_LOG = logging.getLogger(__name__)

OWNER = "layercast-operator"
API = "/apis/layercast.dev/v1alpha1"
SOON_S = 0.25
PROGRESS_S = 2.0
WRITES_PER_S = 40.0
WRITERS = 8
RETRY_S = 1.0
RETRY_MAX_S = 30.0
UNPROCESSABLE = 422
# Those that may be there and then not.
KEYS = (
    "ready", "counts", "observedGeneration", "observedReplicas", "selector", "conditions", "replicas", "lastScale",
    "scales", "decision", "recommendation", "latency", "endpoint",
)  # fmt: skip
GONE = (404, 409)
"""The object is not there, or it is another one of the same name."""


@dataclass(slots=True, kw_only=True)
class _Entry:
    """One ModelService: what should be told, and what was."""

    uid: str
    wanted: Mapping[str, Any]
    written: Mapping[str, Any] | None = None
    not_before: float = 0.0
    failures: int = 0
    busy: bool = False


def gist(status: Mapping[str, Any]) -> object:
    """What of a status is told at once when it changes."""
    return (
        status.get("counts"),
        status.get("observedGeneration"),
        [
            (c["type"], c["status"], c["reason"], c["observedGeneration"])
            for c in status.get("conditions", ())
        ],
        [(r["replicaId"], r["state"]) for r in status.get("replicas", ())],
        (status.get("lastScale") or {}).get("decidedAt"),
        (status.get("recommendation") or {}).get("replicas"),
    )


def published(status: Mapping[str, Any]) -> dict[str, Any]:
    """A status as the API server takes it: without what says nothing, and without the name, which the object has.

    What says nothing is null, an empty text or an empty list; Kubernetes 1.20 takes the latter two for null when
    they are applied, and then refuses the null.
    """
    told: dict[str, Any] = _told({key: value for key, value in status.items() if key != "name"})
    return told


def _told(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _told(each) for key, each in value.items() if each not in (None, "", [])}
    if isinstance(value, list):
        return [_told(each) for each in value]
    return value


@dataclass(slots=True, kw_only=True)
class StatusWriter:
    """Owns what is to be written. `offer` never waits; `run` writes."""

    api: KubeApi
    clock: Callable[[], float]
    failed: Callable[[], None] = lambda: None
    _entries: dict[Key, _Entry] = field(default_factory=dict)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def offer(
        self, key: Key, *, uid: str, status: Mapping[str, Any], known: Mapping[str, Any] | None
    ) -> None:
        """This is the status now. `known` is what the API server has, as far as we know."""
        status = published(status)
        entry = self._entries.get(key)
        if entry is None or entry.uid != uid:
            self._entries[key] = _Entry(uid=uid, wanted=status, written=known)
        else:
            entry.wanted = status
        self._wake.set()

    def forget(self, key: Key) -> None:
        """The object is gone."""
        self._entries.pop(key, None)

    async def run(self) -> None:
        """Write what is due, until cancelled."""
        tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                self._wake.clear()
                for key, entry in self._due()[: WRITERS - len(tasks)]:
                    entry.busy = True
                    task = asyncio.create_task(self._write(key, entry), name=f"status {key}")
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                # Between two rounds at most WRITERS begin: that is the rate.
                await asyncio.sleep(WRITERS / WRITES_PER_S)
                if not any(self._differs(entry) for entry in self._entries.values()):
                    await self._wake.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def flush(self, deadline_s: float) -> None:
        """Write all that differs, at the end of this process."""
        left = [(key, entry) for key, entry in self._entries.items() if self._differs(entry)]
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.gather(*(self._write(key, entry) for key, entry in left))
        except TimeoutError:
            _LOG.warning("some statuses were not written", extra={"count": len(left)})

    async def _send(self, path: str, body: dict[str, Any]) -> None:
        try:
            await self.api.apply(path, body, owner=OWNER)
        except KubernetesError as error:
            if error.code != UNPROCESSABLE:
                raise
            # Kubernetes 1.20 makes null of an object that is not applied any more, and refuses that itself.
            status = {key: body["status"].get(key) for key in KEYS}
            query = {"fieldManager": OWNER}
            await self.api.call("PATCH", path, body={"status": status}, query=query, content_type=MERGE)

    @staticmethod
    def _differs(entry: _Entry) -> bool:
        return entry.written != entry.wanted

    def _due(self) -> list[tuple[Key, _Entry]]:
        """What may be written now, most important first."""
        now = self.clock()
        due = []
        for key, entry in self._entries.items():
            if entry.busy or entry.not_before > now or not self._differs(entry):
                continue
            urgent = entry.written is None or gist(entry.written) != gist(entry.wanted)
            if urgent or now >= entry.not_before + PROGRESS_S - SOON_S:
                due.append((not urgent, entry.not_before, key, entry))
        due.sort(key=lambda each: each[:3])
        return [(key, entry) for *_, key, entry in due]

    async def _write(self, key: Key, entry: _Entry) -> None:
        namespace, name = key
        status = entry.wanted
        body = {
            "apiVersion": "layercast.dev/v1alpha1",
            "kind": "ModelService",
            "metadata": {"name": name, "namespace": namespace, "uid": entry.uid},
            "status": status,
        }
        path = f"{API}/namespaces/{namespace}/modelservices/{name}/status"
        pause_s = SOON_S
        try:
            await self._send(path, body)
            entry.written, entry.failures = status, 0
        except KubernetesError as error:
            pause_s = min(RETRY_S * 2.0**entry.failures, RETRY_MAX_S)
            entry.failures += 1
            if error.code in GONE:
                entry.written = status
            else:
                self.failed()
                _LOG.warning("a status was not written", extra={"model": name, "problem": str(error)})
        finally:
            entry.not_before = self.clock() + pause_s
            entry.busy = False
