"""What a multicast plan is made from: copies, targets and the network between them, as plain values.

The network is that of BlitzScale (OSDI'25, section 5.1): devices joined by NVLink are one logical node, a node
hangs on a leaf switch by NICs that are full duplex, leaves are joined by a spine that is not modelled.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from layercast_operator.snapshot import PeerRef

# Where a node does not tell: one 10 Gbit/s NIC, one SATA disk, one memory channel shared by two processes.
ASSUMED_NIC_BYTES_PER_S = 1.25e9
ASSUMED_DISK_BYTES_PER_S = 0.5e9
INSIDE_NODE_BYTES_PER_S = 10e9
# What a member must have before it can pass something on (chunk size of packed checkpoints).
FORWARD_BYTES = 4 * 1024 * 1024


class HolderKind(Enum):
    """Where a complete copy is; the order is the order of preference."""

    DEVICE = "device"
    HOST = "host memory"
    DISK = "disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A complete copy that can be read."""

    peer: PeerRef
    node: str
    leaf: str
    kind: HolderKind
    nic_bytes_per_s: float
    """Rate of one NIC in either direction."""
    read_bytes_per_s: float
    """How fast the copy itself can be read."""
    busy: str = ""
    """Why its sending direction should not carry parameters; empty when it may."""
    leaving: bool = False
    """It is being drained: usable, and soon gone."""
    domain: str = ""
    """NVLink domain; the node itself when empty."""
    nics: int = 1
    """NICs of its node that can send shards side by side."""
    nvlink_bytes_per_s: float = INSIDE_NODE_BYTES_PER_S

    @property
    def logical(self) -> str:
        """The logical node: everything that NVLink joins."""
        return self.domain or self.node


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A replica that wants parameters."""

    peer: PeerRef
    node: str
    leaf: str
    nic_bytes_per_s: float
    sends_kv: bool = False
    """It sends KV to other replicas as soon as it executes (prefill role)."""
    receives_kv: bool = False
    """It receives KV from other replicas as soon as it executes (decode role)."""
    domain: str = ""
    nics: int = 1
    nvlink_bytes_per_s: float = INSIDE_NODE_BYTES_PER_S

    @property
    def logical(self) -> str:
        """The logical node: everything that NVLink joins."""
        return self.domain or self.node


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A target that is being fed; new ones may be appended below it."""

    target: Target
    upstream: str
