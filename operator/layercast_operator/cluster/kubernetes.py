"""The cluster as a Kubernetes API server: ModelServices, our pods and the nodes in; statuses and events out.

Desired state is a mirror of three kinds of objects, kept by kopf's watches (`doorbell`) and mended by whole lists now
and then. Reading it never waits for the API server; when that is away, what was known stays in force.

The core knows ModelServices by name, as the gateways' clients do. Watching several namespaces, two may have one name:
the older keeps it, the other is told so in its status.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from layercast_operator.cluster import Desired, InvalidModel
from layercast_operator.cluster.api import KubeApi
from layercast_operator.cluster.doorbell import Doorbell, Watched
from layercast_operator.cluster.event_poster import EventPoster
from layercast_operator.cluster.mirror import Key, Mirror, Object, key_of
from layercast_operator.cluster.pods import Component, agent_addresses, gateway_addresses, node_facts
from layercast_operator.cluster.status_writer import API, StatusWriter
from layercast_operator.errors import KubernetesError, ModelServiceError
from layercast_operator.metrics import Metrics
from layercast_operator.modelservice import ModelService, modelservice_of

_LOG = logging.getLogger(__name__)

RELIST_S = 60.0
FIRST_LIST_AGAIN_S = 1.0
FLUSH_DEADLINE_S = 2.0
SERVICES, PODS, NODES = "ModelService", "Pod", "Node"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Where we look."""

    own: str
    """Our namespace: agents and gateways are in it."""
    namespaces: tuple[str, ...]
    """Where ModelServices are; empty means everywhere."""
    agents: Component
    gateways: Component


@dataclass(slots=True, kw_only=True)
class _Known:
    """One ModelService: the last usable specification, and what is wrong with the newest."""

    uid: str
    generation: int
    good: ModelService | None = None
    problem: str = ""


@dataclass(slots=True, kw_only=True)
class KubernetesCluster:
    """Implements `Cluster` on an API server. `start` before anything else."""

    api: KubeApi
    scope: Scope
    clock: Callable[[], float]
    wake: asyncio.Event
    metrics: Metrics
    _mirrors: dict[str, Mirror] = field(
        default_factory=lambda: {k: Mirror() for k in (SERVICES, PODS, NODES)}
    )
    _problems: dict[str, str] = field(default_factory=dict)
    _known: dict[Key, _Known] = field(default_factory=dict)
    _keys: dict[str, Key] = field(default_factory=dict)
    """Names of the core to the objects that they stand for."""
    _desired: Desired = field(
        default_factory=lambda: Desired(complete=False, problem="nothing was listed yet")
    )
    _built_from: tuple[object, ...] = ()
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _doorbells: list[Doorbell] = field(default_factory=list)
    _writer: StatusWriter = field(init=False)
    _poster: EventPoster = field(init=False)

    def __post_init__(self) -> None:
        failed = self.metrics.status_failures.inc
        self._writer = StatusWriter(api=self.api, clock=self.clock, failed=failed)
        self._poster = EventPoster(api=self.api, clock=self.clock)

    def start(self) -> None:
        """Begin to look, in the background."""
        jobs = [self._relist(kind) for kind in self._mirrors]
        jobs += [self._writer.run(), self._poster.run()]
        self._tasks = [asyncio.create_task(job) for job in jobs]
        loop = asyncio.get_running_loop()
        group, version = "layercast.dev", "v1alpha1"
        wide = [
            Watched(kind=SERVICES, group=group, version=version, plural="modelservices"),
            Watched(kind=NODES, group="", version="v1", plural="nodes"),
        ]
        own = [Watched(kind=PODS, group="", version="v1", plural="pods")]
        for watched, namespaces in ((wide, self.scope.namespaces), (own, (self.scope.own,))):
            bell = Doorbell(
                watched=watched,
                namespaces=namespaces,
                login=self.api.login.info,
                ring=self._ring,
                loop=loop,
            )
            self._doorbells.append(bell)
            bell.start()

    async def close(self) -> None:
        """Write what is left to write, then stop looking."""
        await self._writer.flush(FLUSH_DEADLINE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(bell.close() for bell in self._doorbells))
        self._doorbells.clear()

    def listed(self) -> bool:
        """Everything was seen once."""
        return all(mirror.listed for mirror in self._mirrors.values())

    async def desired(self) -> Desired:
        """What the mirror says now."""
        built_from = (*(m.version for m in self._mirrors.values()), *self._problems.values())
        if built_from != self._built_from:
            self._desired = self._build()
            self._built_from = built_from
        return self._desired

    async def last_status(self, name: str) -> Mapping[str, Any] | None:
        """The status in the object."""
        item = self._mirrors[SERVICES].objects.get(self._keys.get(name, ("", name)))
        status = (item or {}).get("status")
        return status if isinstance(status, dict) else None

    async def write_status(self, name: str, status: Mapping[str, Any]) -> None:
        """Hand over to the writer, and post what happened."""
        key = self._keys.get(name)
        item = self._mirrors[SERVICES].objects.get(key) if key is not None else None
        if key is None or item is None:
            return
        known = item.get("status")
        uid = str((item.get("metadata") or {}).get("uid") or "")
        self._writer.offer(key, uid=uid, status=status, known=known)
        self._poster.offer(key, uid=uid, status=status, known=known)

    async def forget(self, name: str) -> None:
        """The object is gone, and its status with it."""
        key = self._keys.pop(name, None)
        if key is not None:
            self._writer.forget(key)
            self._poster.forget(key)

    def _ring(self, kind: str, event_type: str, item: Object) -> None:
        if kind == PODS and not (self.scope.agents.covers(item) or self.scope.gateways.covers(item)):
            return
        before = self._mirrors[kind].objects.get(key_of(item))
        if self._mirrors[kind].take(event_type, item) and _asks_for_a_pass(kind, before, item, event_type):
            self.wake.set()

    async def _relist(self, kind: str) -> None:
        """List now and every minute; soon again while it fails."""
        while True:
            try:
                await self._list(kind)
                self._problems.pop(kind, None)
                pause_s = RELIST_S
            except KubernetesError as error:
                self._problems[kind] = str(error)
                self.metrics.list_failures.labels(kind).inc()
                _LOG.warning("a list failed", extra={"kind": kind, "problem": str(error)})
                pause_s = FIRST_LIST_AGAIN_S if not self._mirrors[kind].listed else RELIST_S / 6
            await asyncio.sleep(pause_s)

    async def _list(self, kind: str) -> None:
        items: list[Object] = []
        versions = []
        for path, query in self._lists(kind):
            answer = await self.api.list_all(path, query=query)
            items += answer.get("items") or ()
            versions.append(int((answer.get("metadata") or {}).get("resourceVersion") or 0))
        if self._mirrors[kind].replace(items, version=min(versions)):
            self.wake.set()

    def _lists(self, kind: str) -> list[tuple[str, dict[str, str]]]:
        if kind == NODES:
            return [("/api/v1/nodes", {})]
        if kind == PODS:
            path = f"/api/v1/namespaces/{self.scope.own}/pods"
            return [(path, {"labelSelector": c.selector}) for c in (self.scope.agents, self.scope.gateways)]
        if not self.scope.namespaces:
            return [(f"{API}/modelservices", {})]
        return [(f"{API}/namespaces/{each}/modelservices", {}) for each in self.scope.namespaces]

    def _build(self) -> Desired:
        services = self._mirrors[SERVICES].objects
        for key in [key for key in self._known if key not in services]:
            del self._known[key]
        models: dict[str, ModelService] = {}
        invalid: list[InvalidModel] = []
        complete = self.listed()
        for key, item in sorted(services.items(), key=lambda pair: (_created(pair[1]), pair[0])):
            namespace, name = key
            if (item.get("metadata") or {}).get("deletionTimestamp"):
                continue
            known = self._read(key, item)
            if name in models:
                problem = f"the name {name!r} is taken by the older {'/'.join(self._keys[name])}"
                invalid.append(InvalidModel(name=f"{namespace}/{name}", problem=problem))
                self._keys[f"{namespace}/{name}"] = key
            elif known.good is None:
                self._keys[name] = key
                invalid.append(InvalidModel(name=name, problem=known.problem))
            else:
                self._keys[name] = key
                models[name] = replace(known.good, problem=known.problem)
        pods, nodes = self._mirrors[PODS].objects.values(), self._mirrors[NODES].objects.values()
        return Desired(
            models=tuple(models.values()),
            invalid=tuple(entry for entry in invalid if entry.name not in models),
            agents=agent_addresses(pods, self.scope.agents),
            gateways=gateway_addresses(pods, self.scope.gateways),
            nodes=node_facts(nodes, pods, self.scope.agents),
            complete=complete,
            problem="; ".join(self._problems.values()),
        )

    def _read(self, key: Key, item: Object) -> _Known:
        """The specification of an object, read once for each generation."""
        metadata = item.get("metadata") or {}
        uid, generation = str(metadata.get("uid") or ""), int(metadata.get("generation") or 1)
        known = self._known.get(key)
        if known is not None and (known.uid, known.generation) == (uid, generation):
            return known
        good = known.good if known is not None and known.uid == uid else None
        fresh = _Known(uid=uid, generation=generation, good=good)
        document = {name: item.get(name) for name in ("apiVersion", "kind", "spec")}
        document["metadata"] = {"name": key[1]}
        try:
            service = modelservice_of(document, file="/".join(key))
            created = int(_created(item))
            fresh.good = replace(service, generation=generation, created_unix_s=created)
        except ModelServiceError as error:
            fresh.problem = str(error)
            _LOG.warning("a ModelService cannot be used", extra={"model": key[1], "problem": str(error)})
        self._known[key] = fresh
        return fresh


def _created(item: Object) -> float:
    text = str((item.get("metadata") or {}).get("creationTimestamp") or "")
    with contextlib.suppress(ValueError):
        return datetime.fromisoformat(text).timestamp()
    return 0.0


def _asks_for_a_pass(kind: str, before: Object | None, item: Object, event_type: str) -> bool:
    """Our own status writes come back as events; those need no pass."""
    if kind != SERVICES or before is None or event_type == "DELETED":
        return True
    old, new = before.get("metadata") or {}, item.get("metadata") or {}
    return (old.get("generation"), old.get("deletionTimestamp")) != (
        new.get("generation"),
        new.get("deletionTimestamp"),
    )
