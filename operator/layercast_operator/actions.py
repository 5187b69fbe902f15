"""What a plan consists of: one thing to do on one node, and why. Tagged values, carried out by the executor."""

from __future__ import annotations

from dataclasses import dataclass

from layercast_operator.snapshot import PeerRef, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareCheckpoint:
    """Fetch and pack a checkpoint on a node's disk."""

    node: str
    model: str
    key: str
    source: str
    revision: str
    dtype: str
    why: str

    @property
    def subject(self) -> str:
        """What it changes; one command at a time is in flight per node and subject."""
        return self.key


@dataclass(frozen=True, slots=True, kw_only=True)
class StartReplica:
    """Assign an idle device to a model."""

    node: str
    model: str
    replica_id: str
    digest: str
    device_id: str
    context_length_max: int
    batch_size_max: int
    step_tokens_max: int
    """0 means the device's own."""
    engine: str
    """Block implementation asked for."""
    prefix_caching: bool
    manifest_peer: PeerRef | None
    """Where the manifest is; None when the node's own disk has it."""
    why: str
    way: str = ""
    """The kind of copy from which its parameters will probably come."""
    parameters_s: float = 0.0
    """How long they take from there, uncorrected."""

    @property
    def subject(self) -> str:
        """What it changes."""
        return self.replica_id


@dataclass(frozen=True, slots=True, kw_only=True)
class SetReplicaRole:
    """Say what a replica does for requests from now on; nothing is loaded for it."""

    node: str
    model: str
    replica_id: str
    role: Role
    why: str

    @property
    def subject(self) -> str:
        """What it changes; a drain or a transfer need not wait for it."""
        return f"{self.replica_id}/role"


@dataclass(frozen=True, slots=True, kw_only=True)
class StartTransfer:
    """Feed a replica, or feed it better. A None among `upstreams` is the node's own disk."""

    node: str
    model: str
    replica_id: str
    transfer_id: str
    generation: int
    upstreams: tuple[PeerRef | None, ...]
    segment_order: tuple[int, ...]
    live_source: PeerRef | None
    why: str
    lead: tuple[PeerRef, ...] | None = None
    """Nobody complete serves, and this replica leads a pipeline with these, maybe with none; None: it does not."""
    way: str = ""
    """The kind of copy that is read."""
    parameters_s: float = 0.0
    """How long it takes from there, uncorrected."""

    @property
    def subject(self) -> str:
        """What it changes."""
        return self.replica_id


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainReplica:
    """Stop new work, let running work end."""

    node: str
    model: str
    replica_id: str
    grace_s: float
    why: str
    destinations: tuple[PeerRef, ...] = ()
    """Replicas to which its running requests move."""

    @property
    def subject(self) -> str:
        """What it changes."""
        return self.replica_id


@dataclass(frozen=True, slots=True, kw_only=True)
class StopReplica:
    """Free the device."""

    node: str
    model: str
    replica_id: str
    failed: bool
    """It had failed: its node rests before it is tried again."""
    why: str

    @property
    def subject(self) -> str:
        """What it changes."""
        return self.replica_id


@dataclass(frozen=True, slots=True, kw_only=True)
class StartHostCopy:
    """Keep a copy in a node's host memory, or feed it better. No upstreams let it rest; None is the own disk."""

    node: str
    model: str
    digest: str
    generation: int
    upstreams: tuple[PeerRef | None, ...]
    manifest_peer: PeerRef | None
    """Where the manifest is; None when the node's own disk has it."""
    nbytes: int
    why: str

    @property
    def subject(self) -> str:
        """What it changes."""
        return self.digest


@dataclass(frozen=True, slots=True, kw_only=True)
class DropHostCopy:
    """Give the host memory of a copy back."""

    node: str
    model: str
    """Whose checkpoint it is; empty when nobody's."""
    digest: str
    failed: bool
    """It had failed: its node rests before it is tried again."""
    why: str

    @property
    def subject(self) -> str:
        """What it changes."""
        return self.digest


Action = (
    PrepareCheckpoint
    | StartReplica
    | SetReplicaRole
    | StartTransfer
    | DrainReplica
    | StopReplica
    | StartHostCopy
    | DropHostCopy
)
