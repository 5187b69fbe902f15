"""Where checkpoints are kept in host memory: the O(1) pool, and the two caches that it is measured against. Pure.

The invariant (BlitzScale, OSDI'25, section 5.3): every deployed checkpoint has at least one complete copy in some
device or host memory of the cluster, and at most one host copy beyond what devices hold. So, for every checkpoint:

* One host copy where there is room, away from the devices that hold it: a node's death must not take both.
* Under pressure those without a copy in memory come first, then those whose last device copy is about to go. Room is
  made for them, and only for them, by dropping host copies of checkpoints that devices hold as well. A last copy in
  memory is never dropped.
* A copy that nobody waits for rests while its source feeds replicas: what is urgent has the network to itself.
* A copy that was lost is missing, and what is missing is placed again; nothing is remembered for that.

With the policies `host-cache` and `ttl-cache` every node decides for itself (see `_nodes_wanted`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from layercast_operator.actions import Action, DropHostCopy
from layercast_operator.feeding import REPLACE_AFTER_MS
from layercast_operator.hostfeeding import (
    Upstreams,
    feeders,
    is_gone,
    sends_elsewhere,
    start_command,
    upstreams_for,
)
from layercast_operator.modelservice import CACHE_POLICIES, ModelService, ScalePolicy
from layercast_operator.snapshot import HostCopy, Node, ReplicaState, Snapshot
from layercast_operator.state import ModelMemory, resting

# A machine whose agent has just started may have died of something that comes back.
YOUNG_S = 60.0
# Agents that start within so many seconds start together.
TOGETHER_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """A checkpoint that a ModelService wants, as far as host copies care."""

    model: str
    digest: str
    nbytes: int
    policy: ScalePolicy
    target: int
    """Replicas wanted."""
    served_at: Mapping[str, float] = field(default_factory=dict)
    """When each node last had a replica of it, seconds since the epoch."""
    cache_s: float = 300.0
    """How long `ttl-cache` keeps what is not served any more."""
    resting: Collection[str] = ()
    """Nodes that failed at it and are left alone for a while."""


def deployed_of(
    model: ModelService, policy: ScalePolicy | None, memory: ModelMemory | None, now: float
) -> Deployed | None:
    """What a ModelService wants; None until its checkpoint is known. `policy` overrides the model's own."""
    if memory is None or memory.resolved is None:
        return None
    return Deployed(
        model=model.name,
        digest=memory.resolved.digest,
        nbytes=memory.resolved.nbytes,
        policy=policy or model.policy,
        target=model.replicas if memory.target is None else memory.target,
        served_at=memory.served_at,
        cache_s=model.scaling.host_cache_s if model.scaling is not None else 300.0,
        resting=resting(memory.host_backoffs, now),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPlan:
    """What to do, and by digest what stands in the way."""

    actions: tuple[Action, ...] = ()
    hopeless: Mapping[str, str] = field(default_factory=dict)
    """Why no host copy can be had, even if everybody made room; nobody need wait for one."""
    crowded_out: Mapping[str, str] = field(default_factory=dict)
    """Why there is none for now although devices hold the checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Where:
    """What is seen of one checkpoint."""

    copies: tuple[tuple[Node, HostCopy], ...]
    """Complete or on their way, also on nodes that are silent."""
    staying: tuple[str, ...]
    """Nodes of complete device copies that are not about to go."""
    arriving: tuple[str, ...]
    """Nodes of replicas that load it."""

    @property
    def complete(self) -> bool:
        return any(copy.complete and not node.facts.leaving for node, copy in self.copies)


def plan_host_copies(
    snapshot: Snapshot,
    deployed: Sequence[Deployed],
    *,
    leaving: Collection[str] = (),
    all_known: bool = False,
) -> HostPlan:
    """The next step for all models together.

    `leaving` names replicas that are being let go and may not show it. `all_known` says that `deployed` is all there
    is: only then is a checkpoint that is not in it nobody's.
    """
    if snapshot.unseen:
        return HostPlan()
    wanted = _merged(deployed)
    places = {each.digest: _where(snapshot, each.digest, leaving) for each in wanted}
    plan = _Planner(snapshot, places)
    plan.tidy(wanted, all_known=all_known)
    for each in sorted(wanted, key=lambda d: (_urgency(d, places[d.digest]), d.model)):
        if each.policy in CACHE_POLICIES:
            plan.cache(each)
        else:
            plan.pool(each)
    return HostPlan(actions=tuple(plan.actions), hopeless=plan.hopeless, crowded_out=plan.crowded_out)


def _merged(deployed: Sequence[Deployed]) -> list[Deployed]:
    """One entry a checkpoint: that of the model which keeps most of it."""
    ordered = sorted(deployed, key=lambda d: (d.policy not in CACHE_POLICIES, d.target == 0, d.model))
    return list({d.digest: d for d in reversed(ordered)}.values())


def _where(snapshot: Snapshot, digest: str, leaving: Collection[str]) -> _Where:
    nodes = [node for node in snapshot.holding(digest) if not node.lost]
    copies = [(node, copy) for node in nodes if (copy := node.host_copy(digest)) is not None and copy.there]
    found = [(r, node) for node in nodes for r in node.replicas if r.digest == digest]
    found.sort(key=lambda pair: pair[0].replica_id)
    staying = [
        node.name
        for replica, node in found
        if replica.complete
        and replica.state is ReplicaState.SERVING
        and replica.replica_id not in leaving
        and not node.facts.leaving
    ]
    arriving = tuple(node.name for replica, node in found if replica.arriving)
    return _Where(copies=tuple(copies), staying=tuple(staying), arriving=arriving)


def _urgency(each: Deployed, where: _Where) -> int:
    """0: nothing in memory. 1: only devices that are about to go. 2: nobody waits for it."""
    if where.complete or (each.target > 0 and (where.staying or where.arriving)):
        return 2
    return 1 if where.staying else 0


class _Planner:
    """Actions under construction, and the room that they leave."""

    def __init__(self, snapshot: Snapshot, places: Mapping[str, _Where]) -> None:
        self.actions: list[Action] = []
        self.hopeless: dict[str, str] = {}
        self.crowded_out: dict[str, str] = {}
        self._snapshot = snapshot
        self._places = places
        self._free = {
            node.name: node.host_pool_bytes - node.host_pool_used_bytes
            for node in snapshot.nodes
            if node.fresh and node.host_pool_bytes
        }
        self._dropped: set[tuple[str, str]] = set()
        self._feeders = feeders(snapshot)

    # Copies that nobody wants

    def tidy(self, wanted: Sequence[Deployed], *, all_known: bool) -> None:
        """Drop what failed or is half dropped, and what belongs to no model once nobody loads it any more."""
        owners = {each.digest: each.model for each in wanted}
        loading = {replica.digest for replica in self._snapshot.replicas() if replica.arriving}
        for node in self._snapshot.nodes:
            for copy in node.host_copies if node.fresh else ():
                model = owners.get(copy.digest, "")
                if not copy.there:
                    why = f"it failed: {copy.error}" if copy.error else "it is not free yet"
                    self._drop(node, copy, model, why, failed=bool(copy.error))
                elif not model and all_known and copy.digest not in loading:
                    self._drop(node, copy, model, "no ModelService wants this checkpoint any more")

    def _drop(self, node: Node, copy: HostCopy, model: str, why: str, *, failed: bool = False) -> None:
        self._dropped.add((node.name, copy.digest))
        self.actions.append(
            DropHostCopy(node=node.name, model=model, digest=copy.digest, failed=failed, why=why)
        )

    # One copy in the cluster

    def pool(self, each: Deployed) -> None:
        """Keep one host copy: place what is missing, feed what is filling, drop what is too much."""
        where = self._places[each.digest]
        kept = _best(where)
        if kept is None:
            self._place(each, where)  # also when all there is lies on nodes that leave
        elif kept[1].complete and set(where.staying) == {kept[0].name}:
            self._move(each, where, kept[0])
        else:
            for node, copy in where.copies:
                if node is not kept[0] and kept[1].complete and node.fresh and not copy.followers:
                    self._drop(node, copy, each.model, f"{kept[0].name} keeps one")
            self._feed(each, *kept, urgent=_urgency(each, where) < 2)

    def _move(self, each: Deployed, where: _Where, beside: Node) -> None:
        """A replica loaded beside its host copy, and nobody else has one: fill a copy elsewhere, then drop this one."""
        elsewhere = [entry for entry in where.copies if entry[0] is not beside]
        for node, copy in elsewhere:
            self._feed(each, node, copy, urgent=False)
        able = [node for node in self._able(each) if self._free[node.name] >= each.nbytes]
        if able and not elsewhere and not where.arriving:
            self._start(each, min(able, key=lambda node: self._order(node, each, where)), urgent=False)

    def _place(self, each: Deployed, where: _Where) -> None:
        """On the best node with room; for an urgent copy room is made."""
        able = self._able(each)
        if not able:
            why = "no node has so much host memory"
            resting = [n for n in self._snapshot.nodes if n.name in each.resting]
            self.hopeless[each.digest] = "its nodes rest after a failure" if resting else why
            return
        ranked = sorted(able, key=lambda node: self._order(node, each, where))
        roomy = [node for node in ranked if self._free[node.name] >= each.nbytes]
        urgency = _urgency(each, where)
        if roomy:
            self._start(each, roomy[0], urgent=urgency < 2)
        elif urgency == 2:
            self.crowded_out[each.digest] = "host memory is full"
        else:
            self._make_room(each, ranked)

    def _able(self, each: Deployed) -> list[Node]:
        """Nodes whose pool is large enough and that have no copy yet."""
        return [
            node
            for node in self._snapshot.nodes
            if node.name in self._free
            and node.host_pool_bytes >= each.nbytes
            and node.name not in each.resting
            and not node.facts.leaving
            and node.host_copy(each.digest) is None
        ]

    def _order(self, node: Node, each: Deployed, where: _Where) -> tuple[bool, bool, bool, float, bool, str]:
        """Away from devices that hold it and from their leaf, not on a node that has just come back, evenly."""
        near = {*where.staying, *where.arriving}
        leaves = {n.leaf for n in self._snapshot.nodes if n.name in near}
        on_disk = any(c.digest == each.digest and c.on_disk for c in node.checkpoints)
        used = round(1 - self._free[node.name] / node.host_pool_bytes, 2)
        return (node.name in near, self._is_young(node), node.leaf in leaves, used, not on_disk, node.name)

    def _is_young(self, node: Node) -> bool:
        """Whether its agent started a moment ago, and later than those of others."""
        first = min(n.started_at for n in self._snapshot.nodes if n.fresh)
        return node.started_at - first > TOGETHER_S and self._snapshot.at - node.started_at < YOUNG_S

    def _make_room(self, each: Deployed, ranked: Sequence[Node]) -> None:
        """Drop, on the node where least is lost, host copies that devices hold as well."""
        best: list[tuple[Node, HostCopy]] | None = None
        for node in ranked:
            chosen = self._victims(node, each.nbytes - self._free[node.name])
            if chosen is not None and (best is None or _bytes_of(chosen) < _bytes_of(best)):
                best = chosen
        if best is None:
            self.hopeless[each.digest] = "host memory is full of last copies"
            return
        for node, copy in best:
            self._drop(node, copy, "", f"{each.model} has no other copy in memory; devices hold this one")

    def _victims(self, node: Node, nbytes: int) -> list[tuple[Node, HostCopy]] | None:
        """Enough droppable copies of a node, those with most other copies first; None when they do not suffice."""
        droppable = [
            copy
            for copy in node.host_copies
            if copy.there and not copy.pending and (node.name, copy.digest) not in self._dropped
            if (where := self._places.get(copy.digest)) is not None and where.staying
        ]
        droppable.sort(
            key=lambda c: (c.followers > 0, -len(self._places[c.digest].staying), -c.total_bytes, c.digest)
        )
        chosen: list[tuple[Node, HostCopy]] = []
        for copy in droppable:
            if nbytes <= 0:
                break
            chosen.append((node, copy))
            nbytes -= copy.total_bytes
        return chosen if nbytes <= 0 else None

    # One copy a node

    def cache(self, each: Deployed) -> None:
        """Keep a copy on every node that wants one by its own rule, where there is room; nothing is evicted."""
        where = self._places[each.digest]
        nodes = _nodes_wanted(each, self._snapshot)
        held = {node.name: copy for node, copy in where.copies}
        for node in self._snapshot.nodes:
            if node.name not in self._free:
                continue
            copy = held.get(node.name)
            if node.name not in nodes:
                if copy is not None and not copy.followers:
                    self._drop(node, copy, each.model, f"not served here for {each.cache_s:g} s")
            elif copy is not None:
                self._feed(each, node, copy, urgent=True)
            elif self._free[node.name] >= each.nbytes and node.name not in each.resting:
                self._start(each, node, urgent=True)

    # Filling

    def _start(self, each: Deployed, node: Node, *, urgent: bool) -> None:
        self._free[node.name] -= each.nbytes
        upstreams, why = self._upstreams(each, node)
        # A copy that could only rest begins when the replicas are fed.
        if upstreams and (urgent or not sends_elsewhere(upstreams, self._feeders, self._snapshot)):
            self._command(each, node, upstreams, why)

    def _feed(self, each: Deployed, node: Node, copy: HostCopy, *, urgent: bool) -> None:
        """Better upstreams for a copy that has none, or none at all while others need them more."""
        transfer = copy.transfer
        if copy.complete or transfer is None or not node.fresh:
            return
        if self._snapshot.at * 1000 - transfer.generation < REPLACE_AFTER_MS:
            return
        upstreams, why = self._upstreams(each, node)
        rests = not transfer.upstream
        if not urgent and sends_elsewhere(upstreams, self._feeders, self._snapshot):
            if not rests:
                self._command(each, node, (), "it rests while its source feeds replicas")
        elif upstreams and (rests or transfer.stalled or is_gone(transfer.upstream, self._snapshot)):
            self._command(each, node, upstreams, why)

    def _upstreams(self, each: Deployed, node: Node) -> tuple[Upstreams, str]:
        own = each.policy in CACHE_POLICIES  # as ServerlessLLM does, where a disk has it
        return upstreams_for(self._snapshot, each.digest, each.nbytes, node, own_disk_only=own)

    def _command(self, each: Deployed, node: Node, upstreams: Upstreams, why: str) -> None:
        self.actions.append(
            start_command(
                self._snapshot,
                model=each.model,
                digest=each.digest,
                nbytes=each.nbytes,
                node=node,
                upstreams=upstreams,
                why=why,
            )
        )


def _best(where: _Where) -> tuple[Node, HostCopy] | None:
    """The copy that stays: complete, seen, away from devices, with followers; none on a node that leaves."""

    def order(entry: tuple[Node, HostCopy]) -> tuple[bool, bool, bool, int, str]:
        node, copy = entry
        return (not copy.complete, not node.fresh, node.name in where.staying, -copy.followers, node.name)

    return min((entry for entry in where.copies if not entry[0].facts.leaving), key=order, default=None)


def _nodes_wanted(each: Deployed, snapshot: Snapshot) -> frozenset[str]:
    """`host-cache` (AllCache): every node. `ttl-cache` (ServerlessLLM): where it served within `cache_s`."""
    if each.policy is ScalePolicy.HOST_CACHE:
        return frozenset(node.name for node in snapshot.nodes)
    return frozenset(node for node, at in each.served_at.items() if snapshot.at - at <= each.cache_s)


def _bytes_of(copies: Sequence[tuple[Node, HostCopy]]) -> int:
    return sum(copy.total_bytes for _, copy in copies)
