"""Looks at everything, all the time: one loop per agent, one per gateway, each with its own deadline.

A node that does not answer is *silent* (unknown) at once and *lost* after a while; both begin with a question that
failed, never with the operator's own silence, so an operator that was stopped for a minute finds nobody lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import aiohttp

from layercast_operator.agents import AgentCalls
from layercast_operator.demand import NAMES, Reading, demand_of, parse_reading
from layercast_operator.errors import AgentCallError
from layercast_operator.metrics import Metrics
from layercast_operator.prometheus import Prometheus
from layercast_operator.prometheus_demand import joined
from layercast_operator.snapshot import Node, NodeFacts, NodeHealth, ReplicaState, Snapshot

_LOG = logging.getLogger(__name__)

SCRAPE_BYTES_MAX = 8 << 20
DEMAND_ONLY = [("name[]", name) for name in NAMES]
SOON_S = 0.02
PROBLEMS_MAX = 8  # different ones of one agent that are told until it answers again
# Calm nodes together are asked at most so often a second, and so are those where something moves.
POLLS_PER_S = 150.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserverLimits:
    """How often is looked, and how long is waited."""

    poll_s: float = 0.2
    deadline_s: float = 1.0
    lost_after_s: float = 5.0
    """A node that has not answered for so long counts as gone with its replicas."""
    demand_age_max_s: float = 2.0
    """What a gateway told longer ago is unknown."""


@dataclass(slots=True, kw_only=True)
class _Watch:
    """One agent."""

    task: asyncio.Task[None]
    soon: asyncio.Event
    node: Node | None = None
    failing_since: float | None = None
    told: set[str] = field(default_factory=set)
    """What was wrong since then, as far as it is in the log: the first problem often is not the one to mend."""


@dataclass(slots=True, kw_only=True)
class _Scrape:
    """One gateway."""

    task: asyncio.Task[None]
    reading: Reading | None = None


@dataclass(slots=True, kw_only=True)
class Observer:
    """Keeps the newest view of the cluster; `wake` is set when something worth a pass has changed."""

    calls: AgentCalls
    metrics: Metrics
    clock: Callable[[], float]
    wake: asyncio.Event
    limits: ObserverLimits = field(default_factory=ObserverLimits)
    prometheus: Prometheus | None = None
    _watches: dict[str, _Watch] = field(default_factory=dict)
    _scrapes: dict[str, _Scrape] = field(default_factory=dict)
    _session: aiohttp.ClientSession | None = None
    _moving: int = 0
    _facts: Mapping[str, NodeFacts] = field(default_factory=dict)

    async def set_cluster(
        self, agents: Mapping[str, str], gateways: Iterable[str], facts: Mapping[str, NodeFacts] | None = None
    ) -> None:
        """Who is looked at from now on, and what else is known of their nodes."""
        self._facts = facts or {}
        await self.calls.set_addresses(agents)
        gateways = set(gateways)
        nodes_gone = [node for node in self._watches if node not in agents]
        gateways_gone = [name for name in self._scrapes if name not in gateways]
        gone = [self._watches.pop(node).task for node in nodes_gone]
        gone += [self._scrapes.pop(name).task for name in gateways_gone]
        await _cancel(gone)
        self.metrics.forget_peers(nodes_gone, gateways_gone)
        for node in agents:
            if node not in self._watches:
                task = asyncio.create_task(self._watch(node), name=f"watch {node}")
                self._watches[node] = _Watch(task=task, soon=asyncio.Event())
        for gateway in gateways:
            if gateway not in self._scrapes:
                task = asyncio.create_task(self._scrape(gateway), name=f"scrape {gateway}")
                self._scrapes[gateway] = _Scrape(task=task)

    def poll_soon(self, node: str) -> None:
        """Ask this node again at once: something was done there."""
        if node in self._watches:
            self._watches[node].soon.set()

    def snapshot(self, models: Iterable[str]) -> Snapshot:
        """Everything that is known now."""
        now = self.clock()
        nodes, unseen = [], []
        for name, watch in sorted(self._watches.items()):
            health = self._health(watch, now)
            if watch.node is not None:
                facts = self._facts.get(name, NodeFacts())
                leaving = facts.leaving or watch.node.facts.leaving
                nodes.append(replace(watch.node, health=health, facts=replace(facts, leaving=leaving)))
            elif health is not NodeHealth.LOST:
                unseen.append(name)
        self._moving = sum(1 for node in nodes if _moves(node))
        readings = {gateway: scrape.reading for gateway, scrape in self._scrapes.items()}
        models = tuple(models)
        demand, problem = demand_of(readings, models=models, now=now, age_max_s=self.limits.demand_age_max_s)
        return self._with_prometheus(
            Snapshot(at=now, nodes=tuple(nodes), unseen=tuple(unseen), demand=demand, demand_problem=problem),
            models,
        )

    def _with_prometheus(self, snapshot: Snapshot, models: Iterable[str]) -> Snapshot:
        """The same with what Prometheus tells; unchanged where there is none."""
        if self.prometheus is None:
            return snapshot
        answers = self.prometheus.answers
        demand = {}
        for model in models:
            both = joined(
                snapshot.demand.get(model),
                answers,
                model=model,
                now=snapshot.at,
                age_max_s=self.prometheus.age_max_s,
                gateways=bool(self._scrapes),
            )
            if both is not None:
                demand[model] = both
        problem = "; ".join(filter(None, (snapshot.demand_problem, answers.problem)))
        latency = {m: t.ttft_p99_s for m, t in answers.by_model.items() if t.ttft_p99_s is not None}
        return replace(snapshot, demand=demand, demand_problem=problem, ttft_p99_s=latency)

    async def close(self) -> None:
        """Stop looking."""
        if self.prometheus is not None:
            await self.prometheus.close()
        tasks = [watch.task for watch in self._watches.values()]
        tasks += [scrape.task for scrape in self._scrapes.values()]
        self._watches.clear()
        self._scrapes.clear()
        await _cancel(tasks)
        if self._session is not None:
            await self._session.close()

    def _health(self, watch: _Watch, now: float) -> NodeHealth:
        if watch.failing_since is None:
            return NodeHealth.FRESH
        if now - watch.failing_since >= self.limits.lost_after_s:
            return NodeHealth.LOST
        return NodeHealth.SILENT

    async def _watch(self, name: str) -> None:
        while True:
            watch = self._watches[name]
            watch.soon.clear()
            try:
                await self._poll(name, watch)
            except Exception:
                # A bug of ours must not blind us for a node; what is known of it grows old meanwhile.
                _LOG.exception("a poll ended by an exception", extra={"node": name})
            # asyncio.wait_for of Python 3.11 loses a cancellation that comes together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s(watch)):
                    await watch.soon.wait()

    def _pause_s(self, watch: _Watch) -> float:
        """Shorter while a replica has no address yet: its transfer, and so its first token, waits for that."""
        poll_s = self.limits.poll_s
        if watch.node is None or watch.failing_since is not None:
            return poll_s
        if any(not r.peer.address for r in watch.node.replicas if r.active):
            return min(poll_s, SOON_S)
        alike = self._moving if _moves(watch.node) else len(self._watches)
        return max(poll_s, alike / POLLS_PER_S)

    async def _poll(self, name: str, watch: _Watch) -> None:
        asked_at = self.clock()
        try:
            node = await self.calls.get_status(name, polled_at=asked_at, deadline_s=self.limits.deadline_s)
        except AgentCallError as error:
            self.metrics.poll_failures.labels(name).inc()
            self.metrics.agent_up.labels(name).set(0)
            if watch.failing_since is None:
                watch.failing_since = asked_at
                watch.told.clear()
            problem = str(error)
            if problem not in watch.told and len(watch.told) < PROBLEMS_MAX:
                watch.told.add(problem)
                _LOG.warning("an agent does not answer", extra={"node": name, "problem": problem})
            return
        if watch.failing_since is not None:
            _LOG.info("an agent answers again", extra={"node": name})
        self.metrics.agent_up.labels(name).set(1)
        changed = watch.node is None or _gist(node) != _gist(watch.node) or watch.failing_since is not None
        watch.node, watch.failing_since = node, None
        if changed:
            self.wake.set()

    async def _scrape(self, gateway: str) -> None:
        while True:
            try:
                reading = await self._read_gateway(gateway)
                scrape = self._scrapes[gateway]
                before = scrape.reading
                scrape.reading = reading or before
                self.metrics.gateway_up.labels(gateway).set(reading is not None)
                if reading is not None and (before is None or reading.calls_for_more(before)):
                    self.wake.set()
            except Exception:
                _LOG.exception("a scrape ended by an exception", extra={"gateway": gateway})
            await asyncio.sleep(self.limits.poll_s)

    async def _read_gateway(self, gateway: str) -> Reading | None:
        """What a gateway tells, None when it does not."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=self.limits.deadline_s), trust_env=False
            )
        asked_at = self.clock()
        try:
            async with self._session.get(f"http://{gateway}/metrics", params=DEMAND_ONLY) as answer:
                answer.raise_for_status()
                body = await answer.content.read(SCRAPE_BYTES_MAX)
                while not answer.content.at_eof() and len(body) < SCRAPE_BYTES_MAX:
                    body += await answer.content.read(SCRAPE_BYTES_MAX - len(body))
            return parse_reading(body.decode("utf-8"), at=asked_at)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            self.metrics.scrape_failures.labels(gateway).inc()
            _LOG.debug("a gateway was not scraped", extra={"gateway": gateway, "problem": repr(error)})
            return None


def _moves(node: Node) -> bool:
    """Something there is about to change."""
    return any(replica.state is not ReplicaState.SERVING for replica in node.replicas)


def _gist(node: Node) -> object:
    """What of a node's answer deserves a pass at once; counters and rates can wait for the tick."""
    return (
        node.instance_id,
        node.facts.leaving,
        tuple((d.worker_state, d.replica_id) for d in node.devices),
        tuple((c.key, c.state, c.on_disk) for c in node.checkpoints),
        tuple((c.digest, c.state, c.transfer is not None and c.transfer.stalled) for c in node.host_copies),
        tuple(
            (
                r.replica_id,
                r.state,
                r.peer,
                r.transfer is not None,
                r.transfer is not None and r.transfer.stalled,
            )
            for r in node.replicas
        ),
    )


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
