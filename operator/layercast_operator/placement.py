"""Which devices get the next replicas, and which node prepares a checkpoint: pure, with reasons.

A device qualifies when its worker is idle, or about to be warm, and the parameters fit. Among those, the one whose
parameters are there soonest wins (ServerlessLLM, OSDI'24: start-up-time-optimised placement), estimated over the
three ways they can come: from a peer, from the node's own disk, from the origin. A device that is still warming
may win and is waited for: seconds of patience beside a local copy can be shorter than a slow network.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from layercast_operator.estimators import Estimates, What, factor_of
from layercast_operator.multicast import (
    ASSUMED_DISK_BYTES_PER_S,
    ASSUMED_NIC_BYTES_PER_S,
    INSIDE_NODE_BYTES_PER_S,
    Holder,
    HolderKind,
)
from layercast_operator.snapshot import Node, Snapshot

# A hub or an object store over the internet; only ranks "nobody near has it" last.
ASSUMED_ORIGIN_BYTES_PER_S = 50e6

ORIGIN = "origin"

_ANYWHERE: Mapping[str, str] = {}
_UNCORRECTED: Estimates = {}

# What a worker that is not warm yet still needs: imports and first kernels, about half of them behind it.
ASSUMED_WARMING_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A device for a replica."""

    node: str
    device_id: str
    predicted_s: float
    """Until its parameters are there, corrected by what others took."""
    why: str
    way: str = ""
    """The kind of copy that they come from."""
    parameters_s: float = 0.0
    """The same from rates alone."""
    ready: bool = True
    """False for a device that is warming: it is worth waiting for, and nothing can be started on it now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placements:
    """As many places as were asked for and exist; `missing` says why there are not more."""

    places: tuple[Place, ...]
    missing: str
    warming: int = 0
    """Devices that are waited for."""


def nic_bytes_per_s(node: Node) -> float:
    """Rate of a node's network in either direction; an assumption where it tells none."""
    return float(node.egress_bytes_per_s or ASSUMED_NIC_BYTES_PER_S)


def disk_bytes_per_s(node: Node) -> float:
    """Rate of a node's disk; an assumption where it is not measured."""
    return float(node.disk_bytes_per_s or ASSUMED_DISK_BYTES_PER_S)


def capacity(
    snapshot: Snapshot, *, model: str, checkpoint_bytes: int, selector: Mapping[str, str] = _ANYWHERE
) -> int | None:
    """Devices that hold a replica of `model` or could; None while a node has not been seen yet.

    A replica that should move away counts until it is gone: that there is no other place must not shrink a service.
    """
    if snapshot.unseen:
        return None
    free, held = snapshot.device_owners()
    fits = [node for node, device in free if device.memory_bytes >= checkpoint_bytes]
    ours = sum(1 for device in held.get(model, ()) if device.memory_bytes >= checkpoint_bytes)
    return ours + sum(1 for node in fits if not node.facts.unwanted(selector))


def place_replicas(
    snapshot: Snapshot,
    *,
    count: int,
    checkpoint_bytes: int,
    holders: Sequence[Holder],
    avoid: Collection[str],
    taken: Collection[tuple[str, str]] = (),
    selector: Mapping[str, str] = _ANYWHERE,
    estimates: Estimates = _UNCORRECTED,
) -> Placements:
    """Up to `count` devices, soonest parameters first; those that are only worth waiting for are in `missing`.

    `avoid` names nodes that are in back-off, `taken` (node, device) pairs promised in this pass. `estimates` is what
    earlier transfers taught about each kind of copy.
    """
    chosen: list[Place] = []
    used = set(taken)
    yards = _yards(snapshot, used, avoid, checkpoint_bytes, holders, selector=selector, estimates=estimates)
    while len(chosen) < count and yards:
        best = min(yards, key=_Yard.rank)
        chosen.append(best.take())
        used.add((best.node, chosen[-1].device_id))
        if not best.free:
            yards.remove(best)
    waited = [f"{place.device_id} of {place.node}, which is warming" for place in chosen if not place.ready]
    missing = f"waits for {' and '.join(waited)}" if waited else ""
    if not missing and len(chosen) < count:
        missing = _missing(snapshot, used, avoid, checkpoint_bytes, selector)
    ready = tuple(place for place in chosen if place.ready)
    return Placements(places=ready, missing=missing, warming=len(waited))


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """When parameters could be on a node, and from where."""

    seconds: float
    prior_s: float
    """From rates alone."""
    way: str
    words: str


@dataclass(slots=True, kw_only=True)
class _Yard:
    """What one node offers: its devices that qualify, best first as (seconds, device, idle)."""

    node: str
    arrival: Arrival
    crowd: int
    """Devices of the node that have a replica."""
    free: list[tuple[float, str, bool]]

    def rank(self) -> tuple[float, int, str, str]:
        """Seconds, crowding of the node, names."""
        # Tenths of a second: a difference below that is noise, and spreading over nodes is worth more.
        seconds, device, _ = self.free[0]
        return (round(seconds, 1), self.crowd, self.node, device)

    def take(self) -> Place:
        """The best device, which is offered no more."""
        seconds, device, idle = self.free.pop(0)
        self.crowd += 1
        arrival = self.arrival
        return Place(
            node=self.node,
            device_id=device,
            predicted_s=seconds,
            why=f"parameters in about {seconds:.1f} s {arrival.words}",
            way=arrival.way,
            parameters_s=arrival.prior_s,
            ready=idle,
        )


def _yards(
    snapshot: Snapshot,
    used: Collection[tuple[str, str]],
    avoid: Collection[str],
    checkpoint_bytes: int,
    holders: Sequence[Holder],
    *,
    selector: Mapping[str, str],
    estimates: Estimates,
) -> list[_Yard]:
    """Every node with a device that qualifies."""
    yards = []
    for node in snapshot.nodes:
        if not node.fresh or node.name in avoid or node.facts.unwanted(selector):
            continue
        open_devices = [
            device
            for device in node.devices
            if device.memory_bytes >= checkpoint_bytes
            and (node.name, device.device_id) not in used
            and (device.idle or device.warming)
        ]
        if not open_devices:
            continue
        arrival = estimate(node, checkpoint_bytes=checkpoint_bytes, holders=holders, estimates=estimates)
        crowd = sum(1 for d in node.devices if d.replica_id or (node.name, d.device_id) in used)
        warming = {d.device_id: 0.0 if d.idle else ASSUMED_WARMING_S for d in open_devices}
        free = [(arrival.seconds + warming[d.device_id], d.device_id, d.idle) for d in open_devices]
        yards.append(_Yard(node=node.name, arrival=arrival, crowd=crowd, free=sorted(free)))
    return yards


def estimate(
    node: Node, *, checkpoint_bytes: int, holders: Sequence[Holder], estimates: Estimates = _UNCORRECTED
) -> Arrival:
    """When the parameters could be on `node`, by the best way; from the origin when nobody has them."""
    ways: list[tuple[float, str, str]] = []
    if not holders:
        ways.append((ASSUMED_ORIGIN_BYTES_PER_S, ORIGIN, "from the origin"))
    for holder in holders:
        kind = holder.kind.value
        if holder.node == node.name and holder.kind is not HolderKind.DEVICE:
            ways.append((holder.read_bytes_per_s, kind, f"from its own {kind}"))
            continue
        rate = INSIDE_NODE_BYTES_PER_S
        if holder.node != node.name:
            rate = min(holder.nic_bytes_per_s, nic_bytes_per_s(node))
        ways.append((min(rate, holder.read_bytes_per_s), kind, f"from {holder.peer.peer_id}"))
    arrivals = [
        Arrival(
            seconds=checkpoint_bytes / rate * factor_of(estimates, What.TRANSFER, way),
            prior_s=checkpoint_bytes / rate,
            way=way,
            words=words,
        )
        for rate, way, words in ways
    ]
    return min(arrivals, key=lambda arrival: (arrival.seconds, arrival.words))


def _missing(
    snapshot: Snapshot,
    used: Collection[tuple[str, str]],
    avoid: Collection[str],
    checkpoint_bytes: int,
    selector: Mapping[str, str],
) -> str:
    """Why there is no further device, in words: the nearest to usable first."""
    reasons: dict[str, int] = {}
    for node in snapshot.nodes:
        for device in node.devices:
            reason = _unfit(node, device.device_id, used, avoid, checkpoint_bytes, selector=selector)
            reasons[reason] = reasons.get(reason, 0) + 1
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    return f"no idle device: {listed}" if listed else "no device is known"


def _unfit(
    node: Node,
    device_id: str,
    used: Collection[tuple[str, str]],
    avoid: Collection[str],
    checkpoint_bytes: int,
    *,
    selector: Mapping[str, str],
) -> str:
    device = next(d for d in node.devices if d.device_id == device_id)
    if not node.fresh:
        return f"on a node that is {node.health.value.lower()}"
    if unwanted := node.facts.unwanted(selector):
        return f"on a node that is {unwanted}"
    if device.replica_id or (node.name, device_id) in used:
        return "occupied"
    if device.error:
        return f"broken ({device.error})"
    if device.memory_bytes < checkpoint_bytes:
        return f"too small (the parameters take {checkpoint_bytes / 1e6:.0f} MB)"
    if node.name in avoid:
        return "waiting after a failure"
    return device.worker_state.value.lower()


def choose_preparer(
    snapshot: Snapshot,
    *,
    failures: Mapping[str, int],
    avoid: Collection[str],
    selector: Mapping[str, str] = _ANYWHERE,
) -> tuple[str, str] | None:
    """The node that fetches and packs a checkpoint which nobody has, and why; None when there is none now.

    The first replica will load from its disk, so a node with an idle device comes first, then the one with the
    most device memory free; nodes that failed at it come last.
    """

    def order(node: Node) -> tuple[bool, int, int, str]:
        free = sum(device.memory_bytes for device in node.devices if device.idle)
        return (bool(node.facts.unwanted(selector)), failures.get(node.name, 0), -free, node.name)

    able = [node for node in snapshot.nodes if node.fresh and node.name not in avoid]
    if not able:
        return None
    best = min(able, key=order)
    return best.name, "nobody holds the checkpoint; this node has the most idle device memory"
