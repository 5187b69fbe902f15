"""Which replicas compute prompts and which decode, where a service is disaggregated. Pure.

Roles are a division of the replicas that the policy wants: `divide` says how many of each, `assign` says whose role
changes. Every replica holds the same parameters, so another role costs no load: decode grows by a prefill replica that
becomes one (mutation; BlitzScale, OSDI'25, section 5.4), because loading a decode replica live would bring parameters
in by the direction in which its KV arrives. New replicas therefore have no role while they load, may compute prompts
meanwhile, and get one when they serve.

One replica alone does both. A replica that decodes gives its role up only when it holds no request: what it has is KV
that would have to move. The last serving replica that computes prompts keeps its role.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from layercast_operator.actions import SetReplicaRole
from layercast_operator.modelservice import Disaggregation, RoleBounds
from layercast_operator.snapshot import Replica, ReplicaState, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleNeeds:
    """Fewest replicas that demand calls for, by role; 0 also where that is not known."""

    prefill: int = 0
    decode: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """Replicas by role. Both are 0 where every replica does both."""

    prefill: int = 0
    decode: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.prefill + self.decode


UNDIVIDED = Division()


def divide(total: int, bounds: Disaggregation | None, *, needs: RoleNeeds, current: Division) -> Division:
    """How many of `total` replicas compute prompts and how many decode.

    Whoever has least to spare gets the next replica, and whoever has most gives one up; beyond that a replica changes
    its role only where one role has too few and the other can spare it, so that little demand changes nothing.
    """
    if bounds is None or total < 2:
        return UNDIVIDED
    prefill, decode = current.prefill, current.decode
    while prefill + decode < total:
        if _wants_prefill(prefill, decode, needs, bounds):
            prefill += 1
        else:
            decode += 1
    while prefill + decode > total:
        if decode > 0 and (prefill == 0 or decode - needs.decode > prefill - needs.prefill):
            decode -= 1
        else:
            prefill -= 1
    if prefill > needs.prefill and decode < needs.decode:
        decode += min(prefill - needs.prefill, needs.decode - decode)
    elif decode > needs.decode and prefill < needs.prefill:
        decode -= min(decode - needs.decode, needs.prefill - prefill)
    return _bounded(total, decode, bounds)


def _wants_prefill(prefill: int, decode: int, needs: RoleNeeds, bounds: Disaggregation) -> bool:
    full = [_is_full(prefill, bounds.prefill), _is_full(decode, bounds.decode)]
    if full[0] != full[1]:
        return full[1]
    return prefill - needs.prefill <= decode - needs.decode


def _is_full(count: int, bounds: RoleBounds) -> bool:
    return bounds.most > 0 and count >= bounds.most


def _bounded(total: int, decode: int, bounds: Disaggregation) -> Division:
    """Within the bounds of both roles as far as they allow it, and at least one of each."""
    if bounds.prefill.most:
        decode = max(decode, total - bounds.prefill.most)
    if bounds.decode.most:
        decode = min(decode, bounds.decode.most)
    decode = max(decode, bounds.decode.least)
    decode = max(1, min(decode, total - bounds.prefill.least, total - 1))
    return Division(prefill=total - decode, decode=decode)


def division_of(replicas: Sequence[Replica]) -> Division:
    """What there is. Those that do both have no role yet."""
    roles = [replica.role for replica in replicas]
    return Division(prefill=roles.count(Role.PREFILL), decode=roles.count(Role.DECODE))


def assign(
    replicas: Sequence[Replica], division: Division, *, sharing: Collection[str], fresh: Collection[str]
) -> list[SetReplicaRole]:
    """Whose role changes now. `sharing` give part of their queue to a live target, and stay; `fresh` nodes answer."""
    able = [r for r in replicas if not r.pending and r.node in fresh and r.active]
    if not division.total:
        return [
            _role(r, Role.BOTH, "it does both: nobody shares the work with it")
            for r in able
            if r.role is not Role.BOTH
        ]
    decode = sum(1 for r in replicas if r.role is Role.DECODE)
    changes = _more_decode(able, division.decode - decode, sharing)
    changes += _less_decode(able, decode - division.decode)
    changed = {change.replica_id for change in changes}
    changes += [
        _role(r, Role.PREFILL, "others decode")
        for r in able
        if r.role is Role.BOTH and r.state is ReplicaState.SERVING and r.replica_id not in changed
    ]
    return changes


def with_roles(replicas: Sequence[Replica], changes: Sequence[SetReplicaRole]) -> list[Replica]:
    """The replicas as they are when the changes took effect."""
    given = {change.replica_id: change.role for change in changes}
    return [replace(r, role=given[r.replica_id]) if r.replica_id in given else r for r in replicas]


def _more_decode(able: Sequence[Replica], missing: int, sharing: Collection[str]) -> list[SetReplicaRole]:
    """Those that have no role yet, then the emptiest of those that compute prompts; one of them all stays."""
    serving = [r for r in able if r.role is not Role.DECODE and r.state is ReplicaState.SERVING]

    def order(replica: Replica) -> tuple[bool, int, str]:
        return (replica.role is Role.PREFILL, replica.requests, replica.replica_id)

    free = sorted((r for r in serving if r.replica_id not in sharing), key=order)
    chosen = free[: max(min(missing, len(serving) - 1), 0)]
    return [_role(r, Role.DECODE, "decode needs more, and it has the parameters already") for r in chosen]


def _less_decode(able: Sequence[Replica], surplus: int) -> list[SetReplicaRole]:
    """Those that hold nothing."""
    free = [r for r in able if r.role is Role.DECODE and r.state is ReplicaState.SERVING and not r.requests]
    chosen = sorted(free, key=lambda r: (r.kv_pages_used, r.replica_id))[: max(surplus, 0)]
    return [_role(r, Role.PREFILL, "prefill needs more, and it holds no request") for r in chosen]


def _role(replica: Replica, role: Role, why: str) -> SetReplicaRole:
    return SetReplicaRole(
        node=replica.node, model=replica.model, replica_id=replica.replica_id, role=role, why=why
    )
