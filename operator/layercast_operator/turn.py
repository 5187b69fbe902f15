"""One turn of one model: how many replicas, then what to do. Pure: a snapshot and a memory in, both answers out.

The reconciler takes turns with the real cluster, the tests with worlds made of values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from layercast_operator.modelservice import UNSCALED, ModelService, ScalePolicy, Scaling, ScalingMode
from layercast_operator.placement import capacity
from layercast_operator.planner import Plan, plan
from layercast_operator.policy import (
    Decision,
    KvUse,
    PolicyInput,
    Rule,
    counted,
    decide,
    limit_of_devices,
    role_needs,
)
from layercast_operator.replacing import PlanInput
from layercast_operator.roles import Division, divide, division_of
from layercast_operator.snapshot import Replica, ReplicaState, Snapshot
from layercast_operator.state import ModelMemory, observe, with_target


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What came of a turn. `memory` does not know of the actions yet: `state.after_actions` tells it of those that
    were begun."""

    memory: ModelMemory
    decision: Decision
    plan: Plan
    policy: ScalePolicy
    recommendation: Decision | None
    """In mode Recommend: what the policy would do."""
    changed: bool
    """The number of wanted replicas is another than before this turn."""
    given: PolicyInput
    """What the decision could know."""
    division: Division
    """How many replicas should have which role."""


def take_turn(
    *,
    model: ModelService,
    policy: ScalePolicy | None,
    snapshot: Snapshot,
    memory: ModelMemory,
    new_id: Callable[[], str],
    taken: Collection[tuple[str, str]] = (),
) -> Turn:
    """Observe, decide, plan. `policy` overrides the model's own; `taken` are devices promised to others."""
    before = memory.target
    memory = observe(memory, model, snapshot)
    chosen = policy or model.policy
    nbytes = memory.resolved.nbytes if memory.resolved is not None else 0
    room = capacity(snapshot, model=model.name, checkpoint_bytes=nbytes, selector=model.node_selector)
    decision, memory, recommendation = _choose_target(model, chosen, snapshot, memory, room)
    target = memory.target if memory.target is not None else decision.replicas
    given = _policy_input(model, snapshot, memory, target, room)
    possible = target if room is None else min(target, room)
    division = divide(
        possible,
        model.disaggregation,
        needs=role_needs(model.scaling or UNSCALED, given),
        current=division_of([r for r in snapshot.replicas(model.name) if r.active]),
    )
    step = plan(
        PlanInput(
            model=model,
            policy=chosen,
            target=possible,
            division=division,
            snapshot=snapshot,
            memory=memory,
            new_id=new_id,
            taken=taken,
        )
    )
    memory = replace(
        memory,
        copy_wanted_since=_since(memory.copy_wanted_since, snapshot.at, holds=step.waits_for_copy),
        members_awaited_since=_since(memory.members_awaited_since, snapshot.at, holds=step.waits_for_members),
    )
    return Turn(
        memory=memory,
        decision=decision,
        plan=step,
        policy=chosen,
        recommendation=recommendation,
        changed=memory.target != before,
        given=given,
        division=division,
    )


def _since(known: float | None, at: float, *, holds: bool) -> float | None:
    """When something that now holds, or not, began to hold."""
    return (at if known is None else known) if holds else None


def gist_of(model: ModelService, snapshot: Snapshot) -> object:
    """What the next turn of a model with nothing to do depends on: equal means that it would do nothing again."""
    replicas = snapshot.replicas(model.name)
    places = tuple((n.health, n.facts) for n in (snapshot.node(r.node) for r in replicas) if n is not None)
    return (model, snapshot.demand.get(model.name), snapshot.unseen, replicas, places)


def is_calm(turn: Turn, replicas: Sequence[Replica]) -> bool:
    """Nothing was done, nothing is missing, nothing is on its way and no window runs."""
    settled = all(replica.state is ReplicaState.SERVING for replica in replicas)
    waits = turn.plan.actions or turn.plan.blocked or turn.changed or turn.decision.below_since is not None
    return settled and not waits and len(replicas) == turn.memory.target


def _choose_target(
    model: ModelService, policy: ScalePolicy, snapshot: Snapshot, memory: ModelMemory, room: int | None
) -> tuple[Decision, ModelMemory, Decision | None]:
    """The wanted number: from the specification, or from demand; with the recommendation where one is due."""
    active = sum(1 for r in snapshot.replicas(model.name) if r.active)
    if snapshot.unseen and memory.target is None:
        names = ", ".join(snapshot.unseen)
        reason = f"held: {names} has not answered yet and may hold replicas"
        return Decision(replicas=active, rule=Rule.UNKNOWN, reason=reason), memory, None
    scaling = model.scaling
    if memory.target is None:
        decision = _first_target(model, active, room, acted_on=memory.spec_replicas)
    elif memory.spec_replicas != model.replicas:
        replicas = _within(model.replicas, scaling)
        reason = f"spec.replicas was changed from {memory.spec_replicas} to {model.replicas}"
        decision = Decision(
            replicas=replicas, rule=Rule.MANUAL, reason=reason, limited=_limit(model, replicas, room)
        )
    elif scaling is None or scaling.mode is ScalingMode.RECOMMEND:
        replicas = _within(model.replicas, scaling)
        reason = f"spec.replicas is {model.replicas}"
        decision = Decision(
            replicas=replicas, rule=Rule.FIXED, reason=reason, limited=_limit(model, replicas, room)
        )
    else:
        return _follow_demand(model, scaling, policy, snapshot, memory, room=room)
    before = active if memory.target is None else memory.target
    if decision.replicas != memory.target:
        memory = with_target(
            memory,
            target=decision.replicas,
            replicas_from=before,
            reason=decision.reason,
            rule=decision.rule,
            policy=policy,
            now=snapshot.at,
        )
    memory = replace(memory, spec_replicas=model.replicas)
    if scaling is None or scaling.mode is not ScalingMode.RECOMMEND:
        return decision, memory, None
    advice = decide(scaling, _policy_input(model, snapshot, memory, decision.replicas, room))
    memory = replace(memory, below_since=advice.below_since, below_at=decision.replicas)
    return decision, memory, advice


def _follow_demand(
    model: ModelService,
    scaling: Scaling,
    policy: ScalePolicy,
    snapshot: Snapshot,
    memory: ModelMemory,
    *,
    room: int | None,
) -> tuple[Decision, ModelMemory, None]:
    target = memory.target or 0
    current = target if room is None else min(target, room)
    given = _policy_input(model, snapshot, memory, current, room)
    decision = decide(scaling, given)
    if room is not None and target > room and decision.replicas == room:
        # Devices are missing for now. What was wanted stays wanted, for when they come back.
        limited = decision.limited or limit_of_devices(wanted=target, capacity=room)
        return replace(decision, limited=limited), memory, None
    if decision.replicas == current:
        return decision, replace(memory, below_since=decision.below_since, below_at=current), None
    memory = with_target(
        memory,
        target=decision.replicas,
        replicas_from=current,
        reason=decision.reason,
        rule=decision.rule,
        policy=policy,
        now=snapshot.at,
    )
    return decision, memory, None


def _first_target(model: ModelService, active: int, room: int | None, *, acted_on: int | None) -> Decision:
    """After a start: what runs goes on, within bounds; where nothing runs, the specification says where to start."""
    changed = acted_on is not None and acted_on != model.replicas
    if active and model.scaling is not None and model.scaling.mode is ScalingMode.AUTO and not changed:
        replicas = _within(active, model.scaling)
        reason = f"{counted(active, 'replica')} found running"
    else:
        replicas = _within(model.replicas, model.scaling)
        reason = f"spec.replicas is {model.replicas}"
    return Decision(replicas=replicas, rule=Rule.START, reason=reason, limited=_limit(model, replicas, room))


def _within(replicas: int, scaling: Scaling | None) -> int:
    if scaling is None:
        return replicas
    return max(scaling.replicas_min, min(replicas, scaling.replicas_max))


def _limit(model: ModelService, replicas: int, room: int | None) -> str:
    """Why fewer (or more) than asked for: bounds first, then devices."""
    if replicas != model.replicas and model.scaling is not None:
        bounds = f"{model.scaling.replicas_min} to {model.scaling.replicas_max}"
        return f"spec.replicas is {model.replicas}, spec.scaling allows {bounds}"
    return limit_of_devices(wanted=replicas, capacity=room)


def _policy_input(
    model: ModelService, snapshot: Snapshot, memory: ModelMemory, current: int, room: int | None
) -> PolicyInput:
    rate = memory.prefill_tokens_per_s
    if model.scaling is not None and model.scaling.prefill_tokens_per_s > 0:
        rate = model.scaling.prefill_tokens_per_s
    return PolicyInput(
        now=snapshot.at,
        current=current,
        capacity=room,
        demand=snapshot.demand.get(model.name),
        kv=_kv_use(snapshot, model.name),
        prefill_tokens_per_s=rate,
        load_time_s=memory.load_time_s,
        below_since=memory.below_since if memory.below_at == current else None,
        disaggregation=model.disaggregation,
    )


def _kv_use(snapshot: Snapshot, model: str) -> KvUse | None:
    """Pages of all replicas that are not leaving; None when one that serves cannot be asked."""
    replicas = [r for r in snapshot.replicas(model) if r.active and not r.pending]
    serving = [r for r in replicas if r.state is ReplicaState.SERVING]
    if not serving:
        return KvUse(used=0, pages_per_replica=1.0)
    if not all(_answers(snapshot, r) and r.kv_pages_total for r in serving):
        return None
    totals = [r.kv_pages_total for r in serving]
    return KvUse(
        used=sum(r.kv_pages_used for r in replicas),
        pages_per_replica=sum(totals) / len(totals),
        page_tokens=max(r.kv_page_tokens for r in serving),
    )


def _answers(snapshot: Snapshot, replica: Replica) -> bool:
    node = snapshot.node(replica.node)
    return node is not None and node.fresh
