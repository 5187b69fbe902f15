"""A device that was promised to a replica, and what was asked for with it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from layercast.agent.v1alpha1 import agent_pb2 as pb

from layercast_agent.workers import Worker


@dataclass(slots=True, kw_only=True)
class Assignment:
    """A device that is taken: from the moment of choosing it until it is free again."""

    request: pb.StartReplicaRequest
    worker: Worker
    begun: asyncio.Task[None]
    assigned: bool = False


def blank_replica(assignment: Assignment) -> pb.Replica:
    """An assigned replica of which its worker has not told anything yet."""
    return pb.Replica(
        replica_id=assignment.request.replica_id,
        model=assignment.request.model,
        digest=assignment.request.digest,
        device_id=assignment.worker.slot.device_id,
        state=pb.REPLICA_STATE_LOADING,
    )


def same_request(known: Assignment, request: pb.StartReplicaRequest) -> bool:
    """Whether a repeat asks for what is there. `manifest_peer` is only where to ask, so it may differ."""
    first = known.request
    return (
        first.model == request.model
        and first.digest == request.digest
        and first.context_length_max == request.context_length_max
        and first.batch_size_max == request.batch_size_max
        and first.step_tokens_max == request.step_tokens_max
        and first.engine == request.engine
        and first.prefix_caching_off == request.prefix_caching_off
        and request.device_id in ("", known.worker.slot.device_id)
    )
