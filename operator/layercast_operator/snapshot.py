"""What was seen: the cluster as plain values, the only input of every decision.

These mirror the wire without importing it: planner and policy run in worlds made of values. Times are unix seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum


class ReplicaState(Enum):
    """What a replica does; names as on the wire."""

    LOADING = "Loading"
    LIVE = "Live"
    LEADING = "Leading"
    SERVING = "Serving"
    DRAINING = "Draining"
    DRAINED = "Drained"
    FAILED = "Failed"


class Role(Enum):
    """What a replica does for requests."""

    BOTH = "Both"
    PREFILL = "Prefill"
    DECODE = "Decode"


class WorkerState(Enum):
    """What the process of a device does."""

    WARMING = "Warming"
    IDLE = "Idle"
    ASSIGNED = "Assigned"
    DEAD = "Dead"


class CheckpointState(Enum):
    """How far a checkpoint is on a node's disk."""

    FETCHING = "Fetching"
    PACKING = "Packing"
    READY = "Ready"
    FAILED = "Failed"


class HostCopyState(Enum):
    """How far a copy in host memory is."""

    FILLING = "Filling"
    COMPLETE = "Complete"
    DROPPING = "Dropping"
    FAILED = "Failed"


class NodeHealth(Enum):
    """What is known of a node now."""

    FRESH = "Fresh"
    SILENT = "Silent"
    """Does not answer: unknown. What it said last is kept; nothing is asked of it."""
    LOST = "Lost"
    """Has not answered for so long that its replicas count as gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRef:
    """How to reach a worker or an agent."""

    peer_id: str
    address: str
    data_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """How parameters arrive at a replica."""

    transfer_id: str
    generation: int
    upstream: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    bytes_per_s: int = 0
    failures: tuple[str, ...] = ()
    stalled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """When what happened to a replica; None means not yet."""

    assigned_at: float | None = None
    first_segment_at: float | None = None
    first_layer_at: float | None = None
    first_token_at: float | None = None
    complete_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One serving copy of a model, as its node told of it."""

    replica_id: str
    model: str
    digest: str
    node: str
    device_id: str
    state: ReplicaState
    peer: PeerRef
    layers_resident: int = 0
    layers_total: int = 0
    transfer: Transfer | None = None
    requests_waiting: int = 0
    requests_running: int = 0
    prompt_tokens_waiting: int = 0
    kv_pages_used: int = 0
    kv_pages_total: int = 0
    prefill_tokens_per_s: float = 0.0
    handoffs_given: int = 0
    handoffs_taken: int = 0
    timeline: Timeline = field(default_factory=Timeline)
    engine: str = ""
    error: str = ""
    pending: bool = False
    """Asked for and not yet seen; occupies its device, has no address."""
    role: Role = Role.BOTH
    kv_page_tokens: int = 0
    requests_moved: int = 0
    """Requests that it gave to other replicas while they ran, with their KV."""

    @property
    def requests(self) -> int:
        """Requests that it holds."""
        return self.requests_waiting + self.requests_running

    @property
    def arriving(self) -> bool:
        """Its parameters are on their way."""
        return self.state in {ReplicaState.LOADING, ReplicaState.LIVE, ReplicaState.LEADING}

    @property
    def executes(self) -> bool:
        """It may own requests, which it has to finish or give back before it goes."""
        return self.state in {ReplicaState.SERVING, ReplicaState.LIVE, ReplicaState.LEADING}

    @property
    def active(self) -> bool:
        """It counts as capacity: it serves, or will."""
        return self.arriving or self.state is ReplicaState.SERVING

    @property
    def complete(self) -> bool:
        """It holds every segment."""
        return self.state in {ReplicaState.SERVING, ReplicaState.DRAINING, ReplicaState.DRAINED} and (
            self.layers_resident >= self.layers_total
        )


@dataclass(frozen=True, slots=True)
class Rdma:
    """Whether a worker reads its peers by RDMA."""

    used: bool = False
    reason: str = ""
    """Why, or why not, in a sentence; empty until the worker has told."""
    missed: bool = False
    """It was demanded and cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, or one share of the processor."""

    device_id: str
    memory_bytes: int
    worker_state: WorkerState
    replica_id: str = ""
    error: str = ""
    rdma: Rdma = field(default_factory=Rdma)

    @property
    def idle(self) -> bool:
        """A replica can be started on it now."""
        return self.worker_state is WorkerState.IDLE and not self.replica_id and not self.error

    @property
    def warming(self) -> bool:
        """It will be idle soon."""
        return self.worker_state is WorkerState.WARMING and not self.replica_id and not self.error


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a node knows of one checkpoint."""

    key: str
    state: CheckpointState
    digest: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    error: str = ""
    segment_bytes: tuple[int, ...] = ()
    context_length_max: int = 0
    on_disk: bool = False
    in_host_memory: bool = False


LOSING_AGENT = "losing its agent"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What the cluster knows of a node, and that its agent is to end, which either may know first."""

    labels: Mapping[str, str] = field(default_factory=dict)
    leaving: str = ""
    """Why it takes no new replicas and those that it has move away, in words; empty when it stays."""

    def unwanted(self, selector: Mapping[str, str]) -> str:
        """Why a replica that must be on nodes with these labels should not be here; empty when it may."""
        if self.leaving:
            return self.leaving
        missing = [
            f"{key}={value}" for key, value in sorted(selector.items()) if self.labels.get(key) != value
        ]
        return f"without {', '.join(missing)}" if missing else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCopy:
    """A checkpoint in the host memory of a node."""

    digest: str
    state: HostCopyState
    total_bytes: int
    transfer: Transfer | None = None
    followers: int = 0
    """Peers that read it, or would if another source died."""
    error: str = ""
    pending: bool = False
    """Asked for and not yet seen."""

    @property
    def there(self) -> bool:
        """It is complete or on its way."""
        return self.state in {HostCopyState.FILLING, HostCopyState.COMPLETE}

    @property
    def complete(self) -> bool:
        """Everything can be read."""
        return self.state is HostCopyState.COMPLETE


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node, as its agent told of it last."""

    name: str
    instance_id: str
    peer: PeerRef
    devices: tuple[Device, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    replicas: tuple[Replica, ...] = ()
    egress_bytes_per_s: int = 0
    """0 means unlimited or unknown."""
    disk_bytes_per_s: int = 0
    """0 means not measured."""
    leaf: str = ""
    host_pool_bytes: int = 0
    """Host memory for copies of checkpoints; 0 means that it keeps none."""
    host_pool_used_bytes: int = 0
    host_copies: tuple[HostCopy, ...] = ()
    started_at: float = 0.0
    """Of its agent."""
    health: NodeHealth = NodeHealth.FRESH
    polled_at: float = 0.0
    """When the question was sent whose answer this is: everything before it is included."""
    facts: NodeFacts = field(default_factory=NodeFacts)

    @property
    def fresh(self) -> bool:
        """Something may be asked of it."""
        return self.health is NodeHealth.FRESH

    @property
    def lost(self) -> bool:
        """What it held counts as gone."""
        return self.health is NodeHealth.LOST

    def host_copy(self, digest: str) -> HostCopy | None:
        """Its copy of a checkpoint in host memory, complete or not."""
        return next((copy for copy in self.host_copies if copy.digest == digest), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Traffic that wants one model, summed over gateways.

    `complete` is False when a gateway is missing from the sums: then they are lower bounds, good enough to grow
    and no ground to shrink.
    """

    prompt_tokens_waiting: float
    requests_waiting: float
    requests_in_flight: float
    complete: bool
    problem: str = ""
    reason: str = ""
    """Why it is not complete, in one word; empty means that a gateway is missing."""


@dataclass(slots=True)
class _Index:
    """What a snapshot was asked before: with hundreds of models each question is asked hundreds of times."""

    nodes: dict[str, Node] | None = None
    all: tuple[Replica, ...] | None = None
    by_model: dict[str, tuple[Replica, ...]] | None = None
    by_digest: dict[str, tuple[Node, ...]] | None = None
    devices: tuple[list[tuple[Node, Device]], dict[str, list[Device]]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything that a pass knows."""

    at: float
    nodes: tuple[Node, ...] = ()
    unseen: tuple[str, ...] = ()
    """Nodes that have never answered this operator and are not yet given up: they may hold anything."""
    demand: Mapping[str, Demand] = field(default_factory=dict)
    """By model; absent means that no gateway tells anything."""
    demand_problem: str = ""
    """Why `demand` lacks models, in words."""
    ttft_p99_s: Mapping[str, float] = field(default_factory=dict)
    """By model, where it is known: 99th percentile of the time to the first token."""
    _index: _Index = field(default_factory=_Index, init=False, compare=False, repr=False)

    @property
    def present(self) -> Iterator[Node]:
        """Nodes that are not lost."""
        return (node for node in self.nodes if not node.lost)

    def node(self, name: str) -> Node | None:
        """The node of that name."""
        if self._index.nodes is None:
            self._index.nodes = {node.name: node for node in reversed(self.nodes)}
        return self._index.nodes.get(name)

    def replicas(self, model: str | None = None) -> tuple[Replica, ...]:
        """Replicas on nodes that are not lost, of one model or of all, in order of their ids."""
        if self._index.all is None:
            found = (r for node in self.present for r in node.replicas)
            self._index.all = tuple(sorted(found, key=lambda replica: replica.replica_id))
        if model is None:
            return self._index.all
        if self._index.by_model is None:
            by_model: dict[str, list[Replica]] = {}
            for replica in self._index.all:
                by_model.setdefault(replica.model, []).append(replica)
            self._index.by_model = {name: tuple(each) for name, each in by_model.items()}
        return self._index.by_model.get(model, ())

    def device_owners(self) -> tuple[list[tuple[Node, Device]], dict[str, list[Device]]]:
        """Sound devices of nodes that are not lost: those without a replica that we know, and the others by model."""
        if self._index.devices is None:
            owner = {replica.replica_id: replica.model for replica in self.replicas()}
            free: list[tuple[Node, Device]] = []
            held: dict[str, list[Device]] = {}
            sound = ((node, d) for node in self.present for d in node.devices if not d.error)
            for node, device in sound:
                if device.replica_id in owner:
                    held.setdefault(owner[device.replica_id], []).append(device)
                else:
                    free.append((node, device))
            self._index.devices = (free, held)
        return self._index.devices

    def holding(self, digest: str) -> tuple[Node, ...]:
        """Nodes that have anything of a checkpoint, in their order: a replica, or a copy."""
        if self._index.by_digest is None:
            by_digest: dict[str, dict[str, Node]] = {}
            for node in self.nodes:
                digests = {r.digest for r in node.replicas} | {c.digest for c in node.checkpoints}
                digests |= {copy.digest for copy in node.host_copies}
                for each in digests:
                    by_digest.setdefault(each, {})[node.name] = node
            self._index.by_digest = {each: tuple(found.values()) for each, found in by_digest.items()}
        return self._index.by_digest.get(digest, ())
