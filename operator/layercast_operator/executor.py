"""Carries plans out: all commands at the same time, one in flight per (node, subject), errors as values.

After a command, its subject is left alone until the node has been seen again: otherwise the next pass, which still
sees the old state, would ask for the same thing twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import assert_never

from layercast_operator.actions import (
    Action,
    DrainReplica,
    DropHostCopy,
    PrepareCheckpoint,
    SetReplicaRole,
    StartHostCopy,
    StartReplica,
    StartTransfer,
    StopReplica,
)
from layercast_operator.agents import AgentCalls
from layercast_operator.errors import AgentCallError
from layercast_operator.metrics import Metrics
from layercast_operator.pending import PendingHostCopy, PendingReplica, PendingRole
from layercast_operator.snapshot import Node, Snapshot

_LOG = logging.getLogger(__name__)

FLIGHTS_MAX = 256
RETRY_FIRST_S = 0.2
RETRY_MAX_S = 5.0
# Agents show what they did at once; one that answers from a moment ago gets this long.
VISIBLE_AFTER_S = 2.0
# Failures of a subject are forgotten after this long without a new one.
FAILURES_FORGOTTEN_S = 30.0

_Key = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A command that an agent refused or that was lost."""

    action: Action
    code: str
    text: str
    at: float


@dataclass(slots=True, kw_only=True)
class _Flight:
    """The last command about one subject."""

    action: Action
    task: asyncio.Task[None] | None = None
    finished_at: float | None = None
    failures: int = 0
    not_before: float = 0.0


@dataclass(slots=True, kw_only=True)
class Executor:
    """Owns the commands in flight. `poll_soon(node)` asks for a fresh look; `wake` asks for a pass."""

    calls: AgentCalls
    metrics: Metrics
    clock: Callable[[], float]
    wake: asyncio.Event
    poll_soon: Callable[[str], None]
    may_act: Callable[[], bool] = lambda: True
    """Asked before each command: without leadership nothing is begun."""
    _flights: dict[_Key, _Flight] = field(default_factory=dict)
    _failures: list[Failure] = field(default_factory=list)
    _settled_at: float | None = None

    def submit(self, actions: Iterable[Action], snapshot: Snapshot) -> list[Action]:
        """Begin what can begin now; returns it. The rest is planned again when it still matters."""
        if self._settled_at != snapshot.at:  # once a pass, however many models submit
            self._settle(snapshot)
            self._settled_at = snapshot.at
        begun: list[Action] = []
        for action in actions if self.may_act() else ():
            key = (action.node, action.subject)
            before = self._flights.get(key)
            if not self._may_begin(before, snapshot.at) or len(self._flights) >= FLIGHTS_MAX:
                continue
            failures = before.failures if before is not None else 0
            flight = _Flight(action=action, failures=failures)
            self._flights[key] = flight
            flight.task = asyncio.create_task(
                self._fly(flight), name=f"{type(action).__name__} {action.subject}"
            )
            begun.append(action)
        return begun

    def pending(self) -> list[PendingReplica]:
        """Replicas that were asked for and may not be visible yet."""
        return [
            PendingReplica(
                replica_id=flight.action.replica_id,
                model=flight.action.model,
                digest=flight.action.digest,
                node=flight.action.node,
                device_id=flight.action.device_id,
            )
            for flight in self._flights.values()
            if isinstance(flight.action, StartReplica) and flight.failures == 0
        ]

    def pending_roles(self) -> list[PendingRole]:
        """Roles that were given and may not be visible yet: else the next pass might give another replica the same."""
        return [
            PendingRole(replica_id=action.replica_id, node=action.node, role=action.role)
            for flight in self._flights.values()
            if isinstance(action := flight.action, SetReplicaRole) and flight.failures == 0
        ]

    def pending_host_copies(self) -> list[PendingHostCopy]:
        """Host copies that were asked for or asked away. One that may be gone already is nobody's last copy."""
        found: list[PendingHostCopy] = []
        for flight in self._flights.values():
            match flight.action:
                case StartHostCopy(node=node, digest=digest, nbytes=nbytes) if flight.failures == 0:
                    found.append(PendingHostCopy(node=node, digest=digest, total_bytes=nbytes))
                case DropHostCopy(node=node, digest=digest):
                    found.append(PendingHostCopy(node=node, digest=digest, total_bytes=0, dropped=True))
        return found

    def leaving(self) -> set[str]:
        """Replicas that were asked to drain or stop and may not show it yet."""
        return {
            flight.action.replica_id
            for flight in self._flights.values()
            if isinstance(flight.action, DrainReplica | StopReplica)
        }

    def take_failures(self) -> list[Failure]:
        """What went wrong since the last call."""
        taken = list(self._failures)
        self._failures.clear()
        return taken

    async def close(self) -> None:
        """Give up what is in flight: agents finish what they have begun, the next operator observes it."""
        tasks = [flight.task for flight in self._flights.values() if flight.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._flights.clear()

    def _may_begin(self, before: _Flight | None, now: float) -> bool:
        """Settled flights are gone from the table, so one that is there and did not fail is unseen yet."""
        if before is None:
            return True
        return before.finished_at is not None and before.failures > 0 and now >= before.not_before

    def _settle(self, snapshot: Snapshot) -> None:
        """Forget commands whose effect has been seen, or whose node is not there any more."""
        for key, flight in list(self._flights.items()):
            if flight.finished_at is None:
                continue
            node = snapshot.node(key[0])
            waited_s = snapshot.at - flight.finished_at
            seen = node is None or node.lost or node.polled_at > flight.finished_at
            if seen and node is not None and not node.lost and waited_s < VISIBLE_AFTER_S:
                seen = _visible(flight.action, node)
            if (seen and flight.failures == 0) or waited_s > FAILURES_FORGOTTEN_S:
                del self._flights[key]

    async def _fly(self, flight: _Flight) -> None:
        action, kind = flight.action, type(flight.action).__name__
        _LOG.info(
            "a command begins",
            extra={"kind": kind, "node": action.node, "subject": action.subject, "why": action.why},
        )
        code = "OK"
        try:
            await self.calls.carry_out(action)
            flight.failures = 0
        except AgentCallError as error:
            code = error.code
            self._fail(flight, code, str(error))
        except Exception as error:
            # A bug of ours must not end the loop of everything else; it is counted, logged and shown.
            code = "INTERNAL"
            _LOG.exception("a command ended by an exception", extra={"kind": kind})
            self._fail(flight, code, f"{action.node}: {error!r}")
        flight.finished_at = self.clock()
        self.metrics.actions.labels(kind, code).inc()
        self.poll_soon(action.node)
        self.wake.set()

    def _fail(self, flight: _Flight, code: str, text: str) -> None:
        now = self.clock()
        flight.failures += 1
        flight.not_before = now + min(RETRY_FIRST_S * 2.0 ** (flight.failures - 1), RETRY_MAX_S)
        _LOG.warning("a command failed", extra={"node": flight.action.node, "problem": text})
        self._failures.append(Failure(action=flight.action, code=code, text=text, at=now))


def _visible(action: Action, node: Node) -> bool:
    """Whether the node's answer shows what the command did."""
    if isinstance(action, PrepareCheckpoint):
        return any(checkpoint.key == action.key for checkpoint in node.checkpoints)
    if isinstance(action, StartHostCopy | DropHostCopy):
        return _copy_visible(action, node)
    replica = next((r for r in node.replicas if r.replica_id == action.replica_id and not r.pending), None)
    match action:
        case StartReplica():
            return replica is not None
        case SetReplicaRole():
            return replica is None or replica.role is action.role
        case StartTransfer():
            transfer = replica.transfer if replica is not None else None
            return replica is None or (transfer is not None and transfer.generation >= action.generation)
        case DrainReplica():
            return replica is None or not replica.executes
        case StopReplica():
            return replica is None
        case _:
            assert_never(action)


def _copy_visible(action: StartHostCopy | DropHostCopy, node: Node) -> bool:
    copy = node.host_copy(action.digest)
    if isinstance(action, DropHostCopy):
        return copy is None or not copy.there
    transfer = copy.transfer if copy is not None else None
    return transfer is not None and transfer.generation >= action.generation
