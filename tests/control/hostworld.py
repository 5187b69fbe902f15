"""The world made of values with host memory in it: copies fill along the sources that were planned, nodes lose them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from tests.control.world import NBYTES, RATE, Pilot, World, peer

from layercast_operator.actions import (
    Action,
    DrainReplica,
    DropHostCopy,
    StartHostCopy,
    StartReplica,
    StopReplica,
)
from layercast_operator.hostcopies import HostPlan, deployed_of, plan_host_copies
from layercast_operator.modelservice import ScalePolicy
from layercast_operator.pending import PendingReplica, with_pending
from layercast_operator.snapshot import (
    HostCopy,
    HostCopyState,
    Node,
    PeerRef,
    ReplicaState,
    Transfer,
)
from layercast_operator.state import after_actions

__all__ = ["HostPilot", "HostWorld", "SimCopy"]


@dataclass(slots=True)
class SimCopy:
    """A host copy in the world."""

    upstreams: tuple[PeerRef | None, ...]
    generation: int
    done: float = 0.0
    upstream: str = ""
    followers: int = 0


@dataclass
class HostWorld(World):
    """Nodes with pools of so many bytes."""

    nodes_count: int = 3
    pool: int = 3 * NBYTES
    devices_each: int = 1
    copies: dict[str, dict[str, SimCopy]] = field(default_factory=dict)
    started_at: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(nodes=self.nodes_count, devices=self.devices_each)
        self.copies = {name: {} for name in self.nodes}
        self.started_at = dict.fromkeys(self.nodes, 0.0)

    def revive(self, name: str) -> None:
        """The node is back, without what its memory held."""
        super().revive(name)
        self.copies[name] = {}
        self.started_at[name] = self.now

    def holds(self, name: str, digest: str) -> float:
        """Also from host memory."""
        copy = self.copies.get(name, {}).get(digest)
        alive = name in self.nodes and self.nodes[name].alive
        return max(super().holds(name, digest), copy.done if copy is not None and alive else -1.0)

    def host_copies(self, digest: str, *, complete: bool = True) -> list[str]:
        """Nodes that live and hold it in memory."""
        return [
            name
            for name, held in self.copies.items()
            if self.nodes[name].alive and digest in held and (held[digest].done >= NBYTES or not complete)
        ]

    def in_memory(self, digest: str) -> list[str]:
        """Complete copies in any memory, devices included."""
        devices = [r.replica_id for r in self.replicas() if r.digest == digest and r.done >= NBYTES]
        return [*devices, *self.host_copies(digest)]

    def apply(self, actions: Iterable[Action]) -> None:
        """What agents do when asked."""
        for action in actions:
            if not isinstance(action, StartHostCopy | DropHostCopy):
                super().apply([action])
                continue
            self.log.append(action)
            if self.nodes[action.node].alive:
                self._apply_copy(action)

    def _apply_copy(self, action: StartHostCopy | DropHostCopy) -> None:
        held = self.copies[action.node]
        if isinstance(action, DropHostCopy):
            held.pop(action.digest, None)
            return
        if action.digest not in held:
            assert (len(held) + 1) * NBYTES <= self.pool, "more than the pool has"
            held[action.digest] = SimCopy(action.upstreams, action.generation)
        copy = held[action.digest]
        assert action.generation >= copy.generation
        copy.upstreams, copy.generation, copy.upstream = action.upstreams, action.generation, ""

    def pass_time(self, seconds: float = 0.2) -> None:
        """Copies fill too."""
        super().pass_time(seconds)
        for name, held in self.copies.items():
            for digest, copy in held.items() if self.nodes[name].alive else ():
                names = [name if upstream is None else upstream.peer_id for upstream in copy.upstreams]
                able = [(n, self.holds(n, digest)) for n in names if n != name or copy.upstreams[0] is None]
                able = [(n, amount) for n, amount in able if amount >= 0]
                copy.upstream = able[0][0] if able and copy.done < NBYTES else ""
                if able:
                    copy.done = max(copy.done, min(copy.done + RATE * seconds, able[0][1]))

    def _node(self, node: Any) -> Node:
        held = self.copies[node.name]
        return replace(
            super()._node(node),
            host_pool_bytes=self.pool,
            host_pool_used_bytes=len(held) * NBYTES,
            host_copies=tuple(_copy(digest, copy) for digest, copy in held.items()),
            started_at=self.started_at[node.name],
        )


def _copy(digest: str, copy: SimCopy) -> HostCopy:
    complete = copy.done >= NBYTES
    transfer = Transfer(
        transfer_id=digest,
        generation=copy.generation,
        upstream=copy.upstream,
        done_bytes=int(copy.done),
        total_bytes=NBYTES,
        stalled=not copy.upstream and not complete,
    )
    state = HostCopyState.COMPLETE if complete else HostCopyState.FILLING
    return HostCopy(
        digest=digest, state=state, total_bytes=NBYTES, transfer=transfer, followers=copy.followers
    )


class HostPilot(Pilot):
    """Passes as the reconciler makes them: all turns, then the host copies."""

    plan: HostPlan = HostPlan()
    world: HostWorld

    def act(self) -> list[Action]:
        """One pass."""
        snapshot = self.world.snapshot()
        actions = super().act()
        deployed = [
            each
            for name, model in self.models.items()
            if (each := deployed_of(model, None, self.memories[name], self.world.now)) is not None
        ]
        pending = [
            PendingReplica(
                replica_id=a.replica_id, model=a.model, digest=a.digest, node=a.node, device_id=a.device_id
            )
            for a in actions
            if isinstance(a, StartReplica)
        ]
        snapshot = with_pending(snapshot, pending)
        leaving = {a.replica_id for a in actions if isinstance(a, DrainReplica | StopReplica)}
        known = len(deployed) == len(self.models)
        self.plan = plan_host_copies(snapshot, deployed, leaving=leaving, all_known=known)
        self.world.apply(self.plan.actions)
        for name, memory in self.memories.items():
            mine = [a for a in self.plan.actions if a.model == name]
            after = after_actions(memory, mine, policy=ScalePolicy.LIVE, now=self.world.now)
            digest = after.resolved.digest if after.resolved is not None else ""
            self.memories[name] = replace(after, host_hopeless=self.plan.hopeless.get(digest, ""))
        return [*actions, *self.plan.actions]

    def settle(self, seconds: float) -> None:
        """Passes for a while; where nothing has happened for a moment, time goes faster."""
        end, quiet = self.world.now + seconds, 0
        while self.world.now < end:
            quiet = 0 if self.act() else quiet + 1
            self.world.pass_time(0.2 if quiet < 12 else 2.0)

    def serving(self) -> int:
        """Replicas that serve."""
        return len(self.world.replicas(ReplicaState.SERVING))


def peers(*names: str) -> tuple[PeerRef, ...]:
    """Addresses of these."""
    return tuple(peer(name) for name in names)
