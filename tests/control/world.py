"""A small cluster made of values, in which real plans take effect: the planner's tests run whole scale-ups in it.

Bytes flow along the chains that were planned, one chunkless fluid per hop; nodes die when told to. There is no
network, no clock but `now`, and no chance: the same steps give the same world.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from layercast_operator.actions import (
    Action,
    DrainReplica,
    PrepareCheckpoint,
    SetReplicaRole,
    StartReplica,
    StartTransfer,
    StopReplica,
)
from layercast_operator.modelservice import (
    Band,
    ModelService,
    ModelSource,
    ScalePolicy,
    Scaling,
    ScalingMode,
)
from layercast_operator.snapshot import (
    Checkpoint,
    CheckpointState,
    Demand,
    Device,
    Node,
    NodeFacts,
    NodeHealth,
    PeerRef,
    Replica,
    ReplicaState,
    Role,
    Snapshot,
    Timeline,
    Transfer,
    WorkerState,
)
from layercast_operator.state import ModelMemory, after_actions
from layercast_operator.turn import Turn, take_turn

STEP_S = 0.2
SEGMENTS = (100, 200, 200, 200, 100)
NBYTES = sum(SEGMENTS)
LAYERS = len(SEGMENTS) - 2
PREPARE_S = 0.6
DRAIN_S = 0.6
RATE = 400.0


def scaling(least: int = 1, most: int = 3, **changes: object) -> Scaling:
    """A scaling section with the defaults of the documentation."""
    values: dict[str, object] = {
        "replicas_min": least,
        "replicas_max": most,
        "mode": ScalingMode.AUTO,
        "policy": ScalePolicy.LIVE,
        "queue_s": Band(low=0.5, high=0.7),
        "kv_utilization": Band(low=0.75, high=0.95),
        "prefill_tokens_per_s": 0.0,
        "scale_down_s": 10.0,
        **changes,
    }
    return Scaling(**values)  # type: ignore[arg-type]


def service(name: str = "m", replicas: int = 1, **changes: object) -> ModelService:
    """A ModelService of a file source."""
    values: dict[str, object] = {
        "name": name,
        "model": ModelSource(source=f"file:///models/{name}", revision="", dtype="float32"),
        "replicas": replicas,
        "scaling": None,
        "context_length": 2048,
        "batch_size": 16,
        "drain_grace_s": 20.0,
        **changes,
    }
    return ModelService(**values)  # type: ignore[arg-type]


def demand(tokens: float = 0, waiting: float = 0, in_flight: float = 0, *, complete: bool = True) -> Demand:
    """What the gateways tell."""
    return Demand(
        prompt_tokens_waiting=tokens,
        requests_waiting=waiting,
        requests_in_flight=in_flight,
        complete=complete,
    )


def peer(name: str) -> PeerRef:
    """An address that says whose it is."""
    return PeerRef(peer_id=name, address=f"{name}:1", data_address=f"{name}:2")


@dataclass(slots=True)
class SimReplica:
    """A replica in the world."""

    replica_id: str
    model: str
    digest: str
    device: str
    assigned_at: float
    state: ReplicaState = ReplicaState.LOADING
    upstreams: tuple[PeerRef | None, ...] = ()
    generation: int = 0
    live: bool = False
    members: tuple[str, ...] = ()
    done: float = 0.0
    upstream: str = ""
    stalled: bool = False
    drained_at: float = 0.0
    complete_at: float | None = None
    waiting: int = 0
    running: int = 0
    kv_used: int = 0
    role: Role = Role.BOTH


@dataclass(slots=True)
class SimNode:
    """A node in the world."""

    name: str
    devices: tuple[str, ...]
    alive: bool = True
    health: NodeHealth = NodeHealth.FRESH
    facts: NodeFacts = field(default_factory=NodeFacts)
    ready_at: dict[str, float] = field(default_factory=dict)
    replicas: dict[str, SimReplica] = field(default_factory=dict)


class World:
    """Nodes, replicas and time; `step` is one pass of the operator and the time until the next."""

    def __init__(self, nodes: int = 3, devices: int = 1) -> None:
        names = [f"node-{i}" for i in range(nodes)]
        self.nodes = {n: SimNode(n, tuple(f"cpu:{d}" for d in range(devices))) for n in names}
        self.now = 1000.0
        self.demand: dict[str, Demand] = {}
        self.prefill_rate = 1000.0
        self.log: list[Action] = []
        self.silent_starts: set[str] = set()
        """Nodes whose new replicas never get an address."""
        self._ids = itertools.count()

    def new_id(self) -> str:
        """Ids as the operator makes them, in order."""
        return f"{next(self._ids):06d}"

    def digest(self, key: str) -> str:
        """The digest of a source."""
        return f"digest-of-{key}"

    def replicas(self, *states: ReplicaState) -> list[SimReplica]:
        """Replicas of living nodes, of some states or of all."""
        found = [r for n in self.nodes.values() if n.alive for r in n.replicas.values()]
        return [r for r in found if not states or r.state in states]

    def kill(self, name: str, health: NodeHealth = NodeHealth.LOST) -> None:
        """The node is gone with all it held; the operator sees it with that health."""
        node = self.nodes[name]
        node.alive, node.health = False, health

    def revive(self, name: str) -> None:
        """The node is back, with its disk and nothing else."""
        node = self.nodes[name]
        node.alive, node.health = True, NodeHealth.FRESH
        node.replicas.clear()

    def holds(self, name: str, digest: str) -> float:
        """Bytes that a peer can give: all from an agent's disk, what has arrived from a replica."""
        for node in self.nodes.values():
            if not node.alive:
                continue
            if node.name == name:
                return NBYTES if node.ready_at.get(digest, self.now + 1) <= self.now else -1.0
            if name in node.replicas and node.replicas[name].digest == digest:
                return node.replicas[name].done
        return -1.0

    def apply(self, actions: Iterable[Action]) -> None:
        """What agents do when asked; a dead node does nothing."""
        for action in actions:
            self.log.append(action)
            node = self.nodes[action.node]
            if node.alive:
                self._apply(node, action)

    def _apply(self, node: SimNode, action: Action) -> None:
        match action:
            case PrepareCheckpoint():
                node.ready_at.setdefault(self.digest(action.key), self.now + PREPARE_S)
            case StartReplica():
                busy = {r.device for r in node.replicas.values()}
                assert action.device_id not in busy, "two replicas on one device"
                node.replicas[action.replica_id] = SimReplica(
                    action.replica_id, action.model, action.digest, action.device_id, self.now
                )
            case SetReplicaRole():
                node.replicas[action.replica_id].role = action.role
            case StartTransfer():
                replica = node.replicas[action.replica_id]
                assert action.generation > replica.generation, "a generation that replaces nothing"
                assert action.upstreams, "nobody to read from"
                replica.upstreams, replica.generation = action.upstreams, action.generation
                replica.live = action.live_source is not None
                replica.state = ReplicaState.LIVE if replica.live else ReplicaState.LOADING
                if action.lead is not None:
                    replica.state = ReplicaState.LEADING
                    replica.members = tuple(peer.peer_id for peer in action.lead)
                replica.stalled = False
            case DrainReplica():
                replica = node.replicas[action.replica_id]
                replica.state, replica.drained_at = ReplicaState.DRAINING, self.now + DRAIN_S
            case StopReplica():
                node.replicas.pop(action.replica_id, None)

    def pass_time(self, seconds: float = STEP_S) -> None:
        """Bytes arrive, drains end."""
        self.now = round(self.now + seconds, 3)  # golden files have no float noise
        for node in self.nodes.values():
            for replica in node.replicas.values() if node.alive else ():
                self._progress(node, replica, seconds)

    def _progress(self, node: SimNode, replica: SimReplica, seconds: float) -> None:
        if replica.state is ReplicaState.DRAINING and self.now >= replica.drained_at:
            replica.state = ReplicaState.DRAINED
        arriving = {ReplicaState.LOADING, ReplicaState.LIVE, ReplicaState.LEADING}
        if replica.state not in arriving or not replica.generation:
            return
        names = [node.name if upstream is None else upstream.peer_id for upstream in replica.upstreams]
        able = [(name, self.holds(name, replica.digest)) for name in names]
        able = [(name, held) for name, held in able if held >= 0]
        replica.stalled = not able
        if not able:
            return
        replica.upstream, held = able[0]
        replica.done = max(replica.done, min(replica.done + RATE * seconds, held))
        if replica.done >= NBYTES:
            replica.state, replica.complete_at = ReplicaState.SERVING, self.now

    def snapshot(self, unseen: tuple[str, ...] = ()) -> Snapshot:
        """What the observer would tell."""
        nodes = tuple(self._node(n) for n in self.nodes.values() if n.name not in unseen)
        return Snapshot(at=self.now, nodes=nodes, unseen=unseen, demand=dict(self.demand))

    def _node(self, node: SimNode) -> Node:
        by_device = {r.device: r.replica_id for r in node.replicas.values()}
        return Node(
            name=node.name,
            instance_id="1",
            peer=peer(node.name),
            devices=tuple(
                Device(
                    device_id=d,
                    memory_bytes=2 * NBYTES,
                    worker_state=WorkerState.ASSIGNED if d in by_device else WorkerState.IDLE,
                    replica_id=by_device.get(d, ""),
                )
                for d in node.devices
            ),
            checkpoints=tuple(self._checkpoint(d, at) for d, at in node.ready_at.items()),
            replicas=tuple(self._replica(node, r) for r in node.replicas.values()),
            egress_bytes_per_s=int(RATE),
            disk_bytes_per_s=int(RATE),
            leaf="leaf",
            health=node.health,
            polled_at=self.now,
            facts=node.facts,
        )

    def _checkpoint(self, digest: str, ready_at: float) -> Checkpoint:
        ready = ready_at <= self.now
        return Checkpoint(
            key=digest.removeprefix("digest-of-"),
            state=CheckpointState.READY if ready else CheckpointState.PACKING,
            digest=digest if ready else "",
            segment_bytes=SEGMENTS if ready else (),
            context_length_max=4096,
            on_disk=ready,
        )

    def _replica(self, node: SimNode, replica: SimReplica) -> Replica:
        complete = replica.done >= NBYTES
        transfer = Transfer(
            transfer_id=f"{replica.replica_id}-t",
            generation=replica.generation,
            upstream=replica.upstream,
            done_bytes=int(replica.done),
            total_bytes=NBYTES,
            bytes_per_s=int(RATE),
            stalled=replica.stalled,
        )
        return Replica(
            replica_id=replica.replica_id,
            model=replica.model,
            digest=replica.digest,
            node=node.name,
            device_id=replica.device,
            state=replica.state,
            peer=PeerRef(peer_id=replica.replica_id, address="", data_address="")
            if node.name in self.silent_starts
            else peer(replica.replica_id),
            layers_resident=LAYERS if complete else int(LAYERS * replica.done / NBYTES),
            layers_total=LAYERS,
            transfer=transfer if replica.generation else None,
            requests_waiting=replica.waiting,
            requests_running=replica.running,
            role=replica.role,
            kv_page_tokens=16,
            kv_pages_used=replica.kv_used,
            kv_pages_total=100,
            prefill_tokens_per_s=self.prefill_rate if complete else 0.0,
            timeline=Timeline(assigned_at=replica.assigned_at, complete_at=replica.complete_at),
        )


class Pilot:
    """Takes turns for models in a world, as the reconciler does."""

    def __init__(self, world: World, *models: ModelService) -> None:
        self.world = world
        self.models = {model.name: model for model in models}
        self.memories = {name: ModelMemory() for name in self.models}
        self.turns: dict[str, Turn] = {}

    def turn(self, name: str, taken: set[tuple[str, str]] | None = None) -> Turn:
        """What would be done for one model now; nothing is done."""
        return take_turn(
            model=self.models[name],
            policy=None,
            snapshot=self.world.snapshot(),
            memory=self.memories[name],
            new_id=self.world.new_id,
            taken=taken if taken is not None else set(),
        )

    def act(self) -> list[Action]:
        """One pass: plan, and let the plan take effect at once."""
        actions: list[Action] = []
        taken: set[tuple[str, str]] = set()
        for name in self.models:
            turn = self.turn(name, taken)
            self.turns[name] = turn
            actions += turn.plan.actions
            taken |= {(a.node, a.device_id) for a in turn.plan.actions if isinstance(a, StartReplica)}
            self.memories[name] = after_actions(
                turn.memory, turn.plan.actions, policy=turn.policy, now=self.world.now
            )
        self.world.apply(actions)
        return actions

    def step(self) -> list[Action]:
        """One pass and the time until the next."""
        actions = self.act()
        self.world.pass_time()
        return actions

    def run(self, seconds: float) -> list[Action]:
        """Passes for a while."""
        return [action for _ in range(round(seconds / STEP_S)) for action in self.step()]
