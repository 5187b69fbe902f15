"""Whether a checkpoint is safe without one more device copy: the waiting side of the pool invariant. Pure.

The last device copy is never freed before a host copy is complete. That wait has an end: where no host memory can have
the checkpoint, or none had it in time, a disk is the last resort, and the reason is told.
"""

from __future__ import annotations

from collections.abc import Sequence

from layercast_operator.modelservice import ScalePolicy
from layercast_operator.multicast import Holder, HolderKind
from layercast_operator.snapshot import Snapshot
from layercast_operator.state import ModelMemory, Resolved

# How long the last device copy waits for one in host memory: a while, and what a slow network needs for the bytes.
COPY_WAIT_S = 30.0
COPY_BYTES_PER_S_MIN = 50e6


def suffice(others: Sequence[Holder], disk: str) -> bool:
    """Whether `others` keep a checkpoint; copies on disk count where `disk` says why they must do."""
    in_memory = any(h.kind is not HolderKind.DISK for h in others)
    return in_memory or (bool(others) and bool(disk))


def disk_will_do(policy: ScalePolicy, memory: ModelMemory, resolved: Resolved, snapshot: Snapshot) -> str:
    """Why nobody waits for a host copy before the last device copy goes; empty while one may come."""
    if policy is ScalePolicy.TTL_CACHE:
        return "ttl-cache keeps no last copy in memory"
    if not any(node.host_pool_bytes >= resolved.nbytes for node in snapshot.present):
        return "no node has so much host memory"
    if memory.host_hopeless:
        return memory.host_hopeless
    limit_s = COPY_WAIT_S + resolved.nbytes / COPY_BYTES_PER_S_MIN
    if memory.copy_wanted_since is not None and snapshot.at - memory.copy_wanted_since > limit_s:
        return f"no host copy was complete within {limit_s:.0f} s"
    return ""
