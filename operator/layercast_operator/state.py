"""The little that is remembered between passes, and how it changes: values in, values out.

Everything here can be forgotten: after a restart it is rebuilt from what is observed, at the price of waiting (a
full window before anything shrinks, no back-off left over). Nothing here is needed to find a replica.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce

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
from layercast_operator.estimators import START_S, Estimates, Prediction, What, learned, predict
from layercast_operator.modelservice import ModelService, ScalePolicy
from layercast_operator.policy import Rule
from layercast_operator.snapshot import CheckpointState, Replica, ReplicaState, Role, Snapshot
from layercast_operator.timelines import (
    ScaledReplica,
    ScaleRecord,
    came_true,
    refreshed,
    with_replica,
)

SCALES_MAX = 20
ERRORS_MAX = 5
ERROR_AGE_MAX_S = 60.0
BACKOFF_FIRST_S = 1.0
BACKOFF_MAX_S = 60.0
# A whole model rests when an agent says that asking again cannot help.
REFUSED_REST_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What `spec.model` turned out to be."""

    key: str
    digest: str
    segment_bytes: tuple[int, ...]
    context_length_max: int

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return sum(self.segment_bytes)

    @property
    def layers(self) -> int:
        """Transformer layers: every segment but embed and head."""
        return max(len(self.segment_bytes) - 2, 0)

    @property
    def first_share(self) -> float:
        """Part of all bytes that one layer is, the largest where they differ."""
        return max(self.segment_bytes[1:-1], default=self.nbytes) / max(self.nbytes, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Rest after a failure."""

    failures: int
    until: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RecentError:
    """A command that failed."""

    at: float
    node: str
    text: str
    refused: bool
    """Asking again cannot help: what was asked for is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionMemory:
    """A condition as it was last reported, to know when it changes."""

    status: str
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """A transfer that was asked for: the first upstream, and when (seconds since the epoch)."""

    upstream: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMemory:
    """What is remembered of one model."""

    generation: int = 0
    target: int | None = None
    """Replicas wanted; None until the first decision of this process."""
    spec_replicas: int | None = None
    below_since: float | None = None
    below_at: int | None = None
    """For which number of replicas `below_since` holds."""
    prefill_tokens_per_s: float | None = None
    load_time_s: float | None = None
    resolved: Resolved | None = None
    scales: tuple[ScaleRecord, ...] = ()
    estimates: Estimates = field(default_factory=dict)
    came_true: tuple[Prediction, ...] = ()
    """Predictions that ended in the last pass."""
    prepare_backoffs: Mapping[str, Backoff] = field(default_factory=dict)
    start_backoffs: Mapping[str, Backoff] = field(default_factory=dict)
    host_backoffs: Mapping[str, Backoff] = field(default_factory=dict)
    """Nodes at which a host copy failed."""
    served_at: Mapping[str, float] = field(default_factory=dict)
    """When each node last had a replica, seconds since the epoch."""
    host_hopeless: str = ""
    """Why no host copy can be had, in words; empty while one may come."""
    host_crowded_out: str = ""
    """Why there is none for now, although it could be had if it were needed."""
    copy_wanted_since: float | None = None
    """Since when the last device copy waits to go."""
    members_awaited_since: float | None = None
    """Since when a replica that would lead waits for the others of its pipeline."""
    live_sources: Mapping[str, str] = field(default_factory=dict)
    feeds: Mapping[str, Feed] = field(default_factory=dict)
    """Who was told to read from whom, by target; what an agent shows of it follows a moment later."""
    """Live target to the replica whose queue it shares."""
    errors: tuple[RecentError, ...] = ()
    refused_until: float = 0.0
    conditions: Mapping[str, ConditionMemory] = field(default_factory=dict)


def resting(backoffs: Mapping[str, Backoff], now: float) -> frozenset[str]:
    """Nodes that are in back-off."""
    return frozenset(node for node, backoff in backoffs.items() if backoff.until > now)


def _failed(backoffs: Mapping[str, Backoff], node: str, now: float) -> dict[str, Backoff]:
    failures = backoffs[node].failures + 1 if node in backoffs else 1
    rest_s = min(BACKOFF_FIRST_S * 2.0 ** (failures - 1), BACKOFF_MAX_S)
    return {**backoffs, node: Backoff(failures=failures, until=now + rest_s)}


def observe(memory: ModelMemory, model: ModelService, snapshot: Snapshot) -> ModelMemory:
    """Take in what a new snapshot tells."""
    now = snapshot.at
    replicas = snapshot.replicas(model.name)
    if memory.generation != model.generation:
        # What was refused or failed may have been mended by the edit.
        memory = replace(
            memory,
            generation=model.generation,
            prepare_backoffs={},
            start_backoffs={},
            refused_until=0.0,
            errors=(),
        )
    ids = {replica.replica_id for replica in replicas}
    serving = [replica for replica in replicas if replica.state is ReplicaState.SERVING]
    good = {replica.node for replica in serving}
    scales = tuple(refreshed(record, replicas) for record in memory.scales)
    ended = came_true(memory.scales, scales)
    return replace(
        memory,
        resolved=resolve(model, snapshot, memory.resolved),
        prefill_tokens_per_s=_prefill_rate(serving) or memory.prefill_tokens_per_s,
        load_time_s=_load_time_s(serving) or memory.load_time_s,
        scales=scales,
        estimates=reduce(learned, ended, memory.estimates),
        came_true=ended,
        start_backoffs={n: b for n, b in memory.start_backoffs.items() if n not in good or b.until > now},
        prepare_backoffs={
            n: b for n, b in memory.prepare_backoffs.items() if not _is_ready(snapshot, n, model.model.key)
        },
        host_backoffs={n: b for n, b in memory.host_backoffs.items() if b.until > now - BACKOFF_MAX_S},
        served_at=_served_at(memory, replicas, snapshot),
        live_sources={t: s for t, s in memory.live_sources.items() if t in ids},
        feeds={t: feed for t, feed in memory.feeds.items() if t in ids},
        errors=tuple(error for error in memory.errors if now - error.at < ERROR_AGE_MAX_S),
    )


def _served_at(memory: ModelMemory, replicas: Iterable[Replica], snapshot: Snapshot) -> dict[str, float]:
    """Nodes that have a replica serve now; so does, after a restart, one with a copy that nobody remembers."""
    digest = memory.resolved.digest if memory.resolved is not None else ""
    found = {node.name for node in snapshot.present if node.host_copy(digest) is not None}
    found -= set(memory.served_at)
    found |= {replica.node for replica in replicas}
    known = {node.name for node in snapshot.nodes}
    kept = {node: at for node, at in memory.served_at.items() if node in known}
    return {**kept, **dict.fromkeys(found, snapshot.at)}


def _is_ready(snapshot: Snapshot, node_name: str, key: str) -> bool:
    node = snapshot.node(node_name)
    checkpoints = node.checkpoints if node is not None else ()
    return any(c.key == key and c.state is CheckpointState.READY for c in checkpoints)


def resolve(model: ModelService, snapshot: Snapshot, before: Resolved | None) -> Resolved | None:
    """The checkpoint of `spec.model`; None until some node has packed it.

    Two nodes can hold different digests for one key when the source changed in between. Then what was resolved
    before stays, else what most replicas use, else the smallest name: any choice does, if it is always the same.
    """
    key = model.model.key
    ready = {
        c.digest: c
        for node in snapshot.present
        for c in node.checkpoints
        if c.key == key and c.digest and c.state is CheckpointState.READY
    }
    known = before if before is not None and before.key == key else None
    if not ready or (known is not None and known.digest in ready):
        return known
    users = [replica.digest for replica in snapshot.replicas(model.name)]
    digest = min(ready, key=lambda d: (-users.count(d), d))
    found = ready[digest]
    return Resolved(
        key=key,
        digest=digest,
        segment_bytes=found.segment_bytes,
        context_length_max=found.context_length_max,
    )


def _prefill_rate(serving: Iterable[Replica]) -> float | None:
    """Of those that compute prompts; what others measured with the last tokens of a move says nothing of prompts."""
    rates = [
        r.prefill_tokens_per_s for r in serving if r.prefill_tokens_per_s > 0 and r.role is not Role.DECODE
    ]
    return sum(rates) / len(rates) if rates else None


def _load_time_s(serving: Iterable[Replica]) -> float | None:
    spans = [
        r.timeline.complete_at - r.timeline.assigned_at
        for r in serving
        if r.timeline.complete_at is not None and r.timeline.assigned_at is not None
    ]
    return max(spans, default=None)


def with_target(
    memory: ModelMemory,
    *,
    target: int,
    replicas_from: int,
    reason: str,
    rule: Rule,
    policy: ScalePolicy,
    now: float,
) -> ModelMemory:
    """A new number of replicas: the window starts anew, and the change is written down."""
    memory = replace(memory, target=target, below_since=None, below_at=None)
    if target == replicas_from:
        return memory
    record = ScaleRecord(
        decided_at=now,
        replicas_from=replicas_from,
        replicas_to=target,
        reason=reason,
        rule=rule.value,
        policy=policy.value,
    )
    return replace(memory, scales=(*memory.scales, record)[-SCALES_MAX:])


def after_actions(
    memory: ModelMemory, actions: Iterable[Action], *, policy: ScalePolicy, now: float
) -> ModelMemory:
    """Remember what was asked for: who started for which decision, who shares whose queue, who rests."""
    for action in actions:
        match action:
            case PrepareCheckpoint():
                memory = replace(memory, prepare_backoffs=_failed(memory.prepare_backoffs, action.node, now))
            case StartReplica():
                memory = _with_started(memory, action, policy, now)
            case StartTransfer():
                memory = _with_transfer(memory, action, now)
            case StopReplica(failed=True):
                text = f"{action.node}: {action.replica_id}: {action.why}"
                error = RecentError(at=now, node=action.node, text=text, refused=False)
                memory = replace(
                    memory,
                    start_backoffs=_failed(memory.start_backoffs, action.node, now),
                    errors=(*memory.errors, error)[-ERRORS_MAX:],
                )
            case DropHostCopy(failed=True):
                memory = replace(memory, host_backoffs=_failed(memory.host_backoffs, action.node, now))
            case StopReplica() | DrainReplica() | SetReplicaRole() | StartHostCopy() | DropHostCopy():
                pass
    return memory


def _with_started(memory: ModelMemory, action: StartReplica, policy: ScalePolicy, now: float) -> ModelMemory:
    """Attach the replica to the decision that it follows, or write down a repair."""
    started = ScaledReplica(
        replica_id=action.replica_id, node=action.node, predictions=_of_start(memory, action, now)
    )
    last = memory.scales[-1] if memory.scales else None
    open_places = 0 if last is None else last.replicas_to - last.replicas_from - len(last.replicas)
    same_pass = last is not None and last.rule == Rule.REPAIR.value and last.decided_at == now
    if last is not None and (open_places > 0 or same_pass):
        record = replace(last, replicas=(*last.replicas, started))
        return replace(memory, scales=(*memory.scales[:-1], record))
    target = memory.target or 0
    record = ScaleRecord(
        decided_at=now,
        replicas_from=max(target - 1, 0),
        replicas_to=target,
        reason=action.why,
        rule=Rule.REPAIR.value,
        policy=policy.value,
        replicas=(started,),
    )
    return replace(memory, scales=(*memory.scales, record)[-SCALES_MAX:])


def _of_start(memory: ModelMemory, action: StartReplica, now: float) -> tuple[Prediction, ...]:
    """What is predicted of a replica when it is asked for."""
    share = memory.resolved.first_share if memory.resolved is not None else 1.0
    priors = {
        What.FIRST_SEGMENT: START_S + share * action.parameters_s,
        What.LOAD: START_S + action.parameters_s,
    }
    return tuple(
        predict(memory.estimates, what, action.way, prior_s=prior_s, at=now)
        for what, prior_s in priors.items()
    )


def _with_transfer(memory: ModelMemory, action: StartTransfer, now: float) -> ModelMemory:
    upstream = action.upstreams[0]
    source = action.node if upstream is None else upstream.peer_id
    estimate = predict(memory.estimates, What.TRANSFER, action.way, prior_s=action.parameters_s, at=now)
    scales = tuple(
        with_replica(record, replace(entry, source=source, predictions=_once(entry.predictions, estimate)))
        if (entry := record.replica(action.replica_id)) is not None
        else record
        for record in memory.scales
    )
    live_sources = {t: s for t, s in memory.live_sources.items() if t != action.replica_id}
    if action.live_source is not None:
        live_sources[action.replica_id] = action.live_source.peer_id
    feeds = {**memory.feeds, action.replica_id: Feed(upstream=source, at=now)}
    return replace(memory, scales=scales, live_sources=live_sources, feeds=feeds)


def _once(known: tuple[Prediction, ...], estimate: Prediction) -> tuple[Prediction, ...]:
    """A transfer that is given better upstreams is still the one that was predicted."""
    return known if any(p.what is estimate.what for p in known) else (*known, estimate)


def after_error(memory: ModelMemory, action: Action, *, code: str, text: str, now: float) -> ModelMemory:
    """A command failed: remember it for status, and let its node rest where that helps."""
    refused = code == "INVALID_ARGUMENT"
    error = RecentError(at=now, node=action.node, text=text, refused=refused)
    memory = replace(memory, errors=(*memory.errors, error)[-ERRORS_MAX:])
    if refused:
        return replace(memory, refused_until=now + REFUSED_REST_S)
    if isinstance(action, StartHostCopy):
        return replace(memory, host_backoffs=_failed(memory.host_backoffs, action.node, now))
    if isinstance(action, StartReplica) and code != "ALREADY_EXISTS":
        return replace(memory, start_backoffs=_failed(memory.start_backoffs, action.node, now))
    return memory
