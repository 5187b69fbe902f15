"""The time model of a multicast: at what rate parameters reach each member of the trees, and when they are there.

Every target has one upstream, so flows form trees below the copies that are read. What arrives at a member is the
least of: what arrives at its upstream; the upstream's NIC, shared equally by the flows that leave its node; its
own NIC, shared equally by the flows that enter its node; for a copy, its read rate, shared equally by its readers.
Inside a logical node NVLink takes the place of both NICs and is not shared. A node of several NICs gives each flow
one of them until flows outnumber NICs. A member passes a unit of `FORWARD_BYTES` on when it has all of it, so

    T = |M|/B + (hops - 1) c/B                                      (BlitzScale, OSDI'25, section 5.1, Figure 13)

for B what arrives. A group that is fed in g shards, each over its own NIC, takes B from all g and gathers the rest
inside: (g-1)/g |M|/B_nvl more (Figure 14). Spine, latency and the progress already made are not modelled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from layercast_operator.snapshot import PeerRef
from layercast_operator.topology import FORWARD_BYTES, Holder, HolderKind, Target


@dataclass(slots=True, eq=False)
class Member:
    """A copy that is read, or a target that is fed; `rate` is settled when all flows are known."""

    peer: PeerRef
    node: str
    logical: str
    leaf: str
    nic: float
    nics: int
    nvlink: float
    rank: int
    """Preference of the kind of copy at the root; targets have that of their root."""
    rate: float
    """Bytes per second that arrive here; at a copy, how fast it is read."""
    up: Member | None = None
    hops: int = 0
    """Hops from the copy at the top; 0 for the copy itself."""
    shard: int = 0
    shards: int = 1
    chain: int = -1
    """Number of the chain it belongs to; -1 for copies and for what was being fed before."""

    @property
    def outside(self) -> bool:
        """Whether it is fed over NICs."""
        up = self.up
        return up is not None and up.node != self.node and up.logical != self.logical


def copy_member(holder: Holder, rank: int) -> Member:
    """The root of a tree; NVLink reaches copies on devices, of the rest only those of the same node."""
    return Member(
        holder.peer,
        holder.node,
        holder.logical if holder.kind is HolderKind.DEVICE else holder.node,
        holder.leaf,
        holder.nic_bytes_per_s,
        holder.nics,
        holder.nvlink_bytes_per_s,
        rank,
        holder.read_bytes_per_s,
    )


def target_member(target: Target, up: Member | None, rate: float) -> Member:
    """A target below `up`, or an orphan at the top of what hangs below it."""
    return Member(
        target.peer,
        target.node,
        target.logical,
        target.leaf,
        target.nic_bytes_per_s,
        target.nics,
        target.nvlink_bytes_per_s,
        up.rank if up is not None else 0,
        rate,
        up,
        up.hops + 1 if up is not None else 1,
        chain=up.chain if up is not None else -1,
    )


def settle(members: Iterable[Member]) -> None:
    """Set what arrives at every member; upstreams come before those below them."""
    listed = [m for m in members if m.up is not None]
    leaves = Counter(m.up.node for m in listed if m.up is not None and m.outside)
    enters = Counter(m.node for m in listed if m.outside)
    readers = Counter(id(m.up) for m in listed if m.up is not None and not m.up.hops)
    for member in listed:
        up = member.up
        if up is None:
            continue
        rate = up.rate if up.hops else up.rate / readers[id(up)] * member.shards
        if member.outside:
            sent = min(up.nic, up.nic * up.nics / leaves[up.node])
            received = min(member.nic, member.nic * member.nics / enters[member.node])
            member.rate = min(rate, member.shards * min(sent, received))
        else:
            member.rate = min(rate, member.nvlink, up.nvlink)


def gather_s(member: Member, checkpoint_bytes: int) -> float:
    """Seconds to gather the shards of the others inside the logical node."""
    return (member.shards - 1) / member.shards * checkpoint_bytes / member.nvlink


def predicted_s(member: Member, checkpoint_bytes: int) -> float:
    """Seconds until all parameters are at `member`."""
    rate = max(member.rate, 1.0)
    fill = (member.hops - 1) * FORWARD_BYTES / (rate / member.shards)
    return checkpoint_bytes / rate + fill + gather_s(member, checkpoint_bytes)
