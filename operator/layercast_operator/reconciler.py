"""The loop: look, take a turn for each model, carry out, report. Everything that decides is elsewhere and pure.

A pass happens on every tick and whenever something has changed. It holds nothing that it could not find again, so
the operator may die at any line. What goes wrong with one model is that model's alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from layercast.route.v1alpha1 import route_pb2

from layercast_operator.actions import StartReplica
from layercast_operator.cluster import Cluster, Desired
from layercast_operator.executor import Executor
from layercast_operator.history import memory_of
from layercast_operator.hostcopies import deployed_of, plan_host_copies
from layercast_operator.metrics import Metrics
from layercast_operator.modelservice import ModelService, Queries, ScalePolicy
from layercast_operator.observer import Observer
from layercast_operator.pending import with_pending
from layercast_operator.planner import plan_orphans
from layercast_operator.routes import RouteInput, RouteTable, route_of, route_of_orphans
from layercast_operator.snapshot import Snapshot
from layercast_operator.state import ConditionMemory, ModelMemory, after_actions, after_error
from layercast_operator.status import report, report_invalid
from layercast_operator.turn import gist_of, is_calm, take_turn

_LOG = logging.getLogger(__name__)

_BASE36 = "0123456789abcdefghijklmnopqrstuvwxyz"
ALIVE_AFTER_PASS_S = 10.0
# A model with nothing to do has a turn at least so often: windows end, copies elsewhere come and go.
CALM_S = 2.0
CALM_EACH_S = 0.02
TURNS_AT_ONCE = 20
COPIES_REST = 10
# A pass over many models that all need something ends here: what it was planned from grows old.
TURNS_S = 0.3


class Clock:
    """Seconds since the epoch that never step back: the wall clock at the start, then the monotonic one."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def __call__(self) -> float:
        return self._offset + time.monotonic()


def random_id() -> str:
    """Six characters of base 36."""
    return "".join(secrets.choice(_BASE36) for _ in range(6))


@dataclass(slots=True, kw_only=True)
class Reconciler:
    """Owns the memory between passes. Nothing else is kept, and this may be lost."""

    cluster: Cluster
    observer: Observer
    executor: Executor
    routes: RouteTable
    metrics: Metrics
    clock: Callable[[], float]
    wake: asyncio.Event
    tick_s: float = 0.2
    policy: ScalePolicy | None = None
    """Overrides that of every ModelService."""
    new_id: Callable[[], str] = random_id
    _memories: dict[str, ModelMemory] = field(default_factory=dict)
    _invalid: dict[str, dict[str, ConditionMemory]] = field(default_factory=dict)
    _routes: dict[str, route_pb2.ModelRoute] = field(default_factory=dict)
    _calm: dict[str, object] = field(default_factory=dict)
    """Models with nothing to do, and what that was found from."""
    _turned: dict[str, float] = field(default_factory=dict)
    """When each model had its last turn: before each had one, routes are not complete."""
    _copies_after: float = 0.0
    _passed_at: float | None = None
    _ready: bool = False

    async def run(self, stop: asyncio.Event) -> None:
        """Pass after pass until `stop`; a pass that fails is logged and followed by the next."""
        while not stop.is_set():
            self.wake.clear()
            begun_at = self.clock()
            try:
                await self.pass_once()
            except Exception:
                self.metrics.reconcile_errors.labels("").inc()
                _LOG.exception("a pass ended by an exception")
            # Polls and scrapes need the loop as well: whatever wakes us, passes take at most half of it.
            await asyncio.sleep(min(self.clock() - begun_at, self.tick_s))
            # asyncio.wait_for of Python 3.11 loses a cancellation that comes together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.tick_s):
                    await self.wake.wait()

    def alive(self) -> bool:
        """Passes happen."""
        return self._passed_at is not None and self.clock() - self._passed_at < ALIVE_AFTER_PASS_S

    def ready(self) -> bool:
        """Passes happen and every node has answered or was given up once: routes are told."""
        return self._ready and self.alive()

    async def pass_once(self) -> None:
        """One look at everything, one turn for each model."""
        desired = await self.cluster.desired()
        if desired.complete and not desired.problem:
            self.observer.calls.wanted = frozenset(model.model.key for model in desired.models)
        await self.observer.set_cluster(desired.agents, desired.gateways, desired.nodes)
        names = [model.name for model in desired.models]
        if self.observer.prometheus is not None:
            self.observer.prometheus.models = {
                model.name: model.scaling.queries if model.scaling is not None else Queries()
                for model in desired.models
            }
        snapshot = with_pending(
            self.observer.snapshot(names),
            self.executor.pending(),
            self.executor.pending_host_copies(),
            self.executor.pending_roles(),
        )
        self._take_failures()
        taken: set[tuple[str, str]] = set()
        await self._turns(desired, snapshot, taken)
        if snapshot.at >= self._copies_after:
            begun_at = self.clock()
            self._keep_host_copies(desired, snapshot)
            # One decision for all models: with hundreds it is not for every pass.
            self._copies_after = snapshot.at + COPIES_REST * (self.clock() - begun_at)
        await self._others(desired, snapshot)
        known = bool(desired.agents) or (desired.complete and not desired.problem)
        if known and not snapshot.unseen and self._turned.keys() >= set(names):
            await self.routes.publish(list(self._routes.values()))
            self._ready = True
        self._passed_at = self.clock()

    async def _turns(self, desired: Desired, snapshot: Snapshot, taken: set[tuple[str, str]]) -> None:
        """A turn for each model that needs one, while what was seen is still true; the next pass goes on from there."""
        due = self._due(desired.models, snapshot)
        spent_s = 0.0
        for number, model in enumerate(due):
            if number % TURNS_AT_ONCE == 0:
                await asyncio.sleep(0)  # nobody waits for hundreds of turns
            begun_at = self.clock()
            await self._one_model(model, desired, snapshot, taken)
            self._turned[model.name] = snapshot.at
            spent_s += self.clock() - begun_at
            if spent_s > TURNS_S and number + 1 < len(due):
                self.wake.set()
                return

    def _due(self, models: Sequence[ModelService], snapshot: Snapshot) -> list[ModelService]:
        """Who needs a turn: those for whom something is different first, and of these who waited longest."""
        calm_s = max(CALM_S, CALM_EACH_S * len(models))
        found: list[tuple[bool, float, ModelService]] = []
        for model in models:
            at, gist = self._turned.get(model.name, 0.0), self._calm.get(model.name)
            same = gist is not None and gist == gist_of(model, snapshot)
            if not same or snapshot.at - at > calm_s:
                found.append((same, at, model))
        found.sort(key=lambda each: each[:2])
        return [model for *_, model in found]

    def _take_failures(self) -> None:
        for failure in self.executor.take_failures():
            model = failure.action.model
            if model in self._memories:
                self._calm.pop(model, None)
                self._memories[model] = after_error(
                    self._memories[model],
                    failure.action,
                    code=failure.code,
                    text=failure.text,
                    now=failure.at,
                )

    async def _one_model(
        self, model: ModelService, desired: Desired, snapshot: Snapshot, taken: set[tuple[str, str]]
    ) -> None:
        """A turn; its exceptions end here, for the sake of the other models."""
        try:
            with self.metrics.reconcile_seconds.labels(model.name).time():
                await self._turn(model, desired, snapshot, taken)
        except Exception:
            self.metrics.reconcile_errors.labels(model.name).inc()
            _LOG.exception("a turn ended by an exception", extra={"model": model.name})

    async def _turn(
        self, model: ModelService, desired: Desired, snapshot: Snapshot, taken: set[tuple[str, str]]
    ) -> None:
        name = model.name
        if name not in self._memories:
            self._memories[name] = memory_of(await self.cluster.last_status(name) or {})
        turn = take_turn(
            model=model,
            policy=self.policy,
            snapshot=snapshot,
            memory=self._memories[name],
            new_id=self.new_id,
            taken=taken,
        )
        for prediction in turn.memory.came_true:
            self.metrics.show_prediction(name, prediction)
        begun = self.executor.submit(turn.plan.actions, snapshot)
        taken |= {(action.node, action.device_id) for action in begun if isinstance(action, StartReplica)}
        memory = after_actions(turn.memory, begun, policy=turn.policy, now=snapshot.at)
        if turn.changed:
            rule, reason = turn.decision.rule.value, turn.decision.reason
            self.metrics.decisions.labels(name, rule).inc()
            _LOG.info(
                "the number of replicas changes",
                extra={"model": name, "to": memory.target, "rule": rule, "reason": reason},
            )
        endpoint = f"http://{desired.gateways[0]}/v1" if desired.gateways else ""
        told = report(model, snapshot, replace(turn, memory=memory), endpoint=endpoint)
        self._memories[name] = told.memory
        replicas = snapshot.replicas(name)
        self._routes[name] = route_of(
            RouteInput(model=model, resolved=told.memory.resolved, replicas=replicas, message=told.message)
        )
        self._calm.pop(name, None)
        if is_calm(turn, replicas):
            self._calm[name] = gist_of(model, snapshot)
        self.metrics.show_model(told.status, replicas)
        await self.cluster.write_status(name, told.status)

    def _keep_host_copies(self, desired: Desired, snapshot: Snapshot) -> None:
        """After all turns, because it must know which replicas they let go; one decision for all models."""
        deployed = [
            wanted
            for model in desired.models
            if (wanted := deployed_of(model, self.policy, self._memories.get(model.name), snapshot.at))
        ]
        # Once more, with what this pass has asked for: a copy keeps away from replicas that are being started.
        snapshot = with_pending(snapshot, self.executor.pending())
        plan = plan_host_copies(
            snapshot,
            deployed,
            leaving=self.executor.leaving(),
            all_known=desired.complete and len(deployed) == len(desired.models),
        )
        begun = self.executor.submit(plan.actions, snapshot)
        for name, before in self._memories.items():
            mine = [action for action in begun if action.model == name]
            memory = after_actions(before, mine, policy=ScalePolicy.LIVE, now=snapshot.at)
            digest = memory.resolved.digest if memory.resolved is not None else ""
            self._memories[name] = replace(
                memory,
                host_hopeless=plan.hopeless.get(digest, ""),
                host_crowded_out=plan.crowded_out.get(digest, ""),
            )

    async def _others(self, desired: Desired, snapshot: Snapshot) -> None:
        """What has no usable ModelService: report broken files, let go what was deleted."""
        for broken in desired.invalid:
            before = self._invalid.get(broken.name, {})
            status, self._invalid[broken.name] = report_invalid(
                broken.name, broken.problem, before=before, now=snapshot.at
            )
            await self.cluster.write_status(broken.name, status)
        if not desired.complete:
            return
        # What is broken now may be mended in a moment: its replicas are nobody's orphans.
        wanted = {model.name for model in desired.models} | {broken.name for broken in desired.invalid}
        self.executor.submit(plan_orphans(snapshot, wanted).actions, snapshot)
        left = {replica.model for replica in snapshot.replicas()} - wanted
        for name in [name for name in self._routes if name not in wanted | left]:
            _LOG.info("a ModelService and its replicas are gone", extra={"model": name})
            del self._routes[name]
            self._memories.pop(name, None)
            self._calm.pop(name, None)
            self._turned.pop(name, None)
            self.metrics.forget_model(name)
            await self.cluster.forget(name)
        for name in left:
            self._routes[name] = route_of_orphans(name, snapshot.replicas(name))
        broken_names = {broken.name for broken in desired.invalid}
        for name in [name for name in self._invalid if name not in broken_names]:
            del self._invalid[name]
            if name not in wanted:
                await self.cluster.forget(name)
