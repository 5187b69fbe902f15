"""What a replica tells about itself: the `Replica` message of GetStatus."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp
from layercast.agent.v1alpha1 import agent_pb2

from layercast_agent.worker.host import WorkerHost
from layercast_agent.worker.memory_plan import PAGE_TOKENS
from layercast_agent.worker.replica import Replica


def replica_status(replica: Replica, host: WorkerHost) -> agent_pb2.Replica:
    """The whole state, cheap enough to be asked ten times a second."""
    memory = replica.memory
    segments = range(len(memory.manifest.segments))
    status = agent_pb2.Replica(
        replica_id=replica.spec.replica_id,
        model=replica.spec.model,
        digest=replica.spec.digest,
        device_id=host.settings.device,
        state=replica.state,
        peer=host.peer(replica.spec.replica_id),
        segments_resident=[memory.residency.segment_complete(segment) for segment in segments],
        layers_resident=memory.residency.layers_resident,
        layers_total=memory.shape.layers,
        load=_load(replica),
        timeline=_timeline(replica),
        error=replica.error,
        memory=agent_pb2.MemoryPlan(
            device_bytes=memory.plan.device_bytes,
            parameter_bytes=memory.plan.parameter_bytes,
            kv_bytes=memory.plan.kv_bytes,
            kv_pages=memory.plan.kv_pages,
            kv_page_tokens=PAGE_TOKENS,
            workspace_bytes=memory.plan.workspace_bytes,
        ),
        engine=memory.engine.model.block,
        role=replica.role,
    )
    if replica.runner is not None:
        transfer = replica.runner.status()
        status.transfer.CopyFrom(
            agent_pb2.Transfer(
                transfer_id=transfer.transfer_id,
                generation=transfer.generation,
                # Before the first connection: whom it will ask, so that a planner can put others behind it.
                upstream=transfer.upstream or ("" if transfer.stalled else replica.preferred_upstream),
                done_bytes=transfer.done_bytes,
                total_bytes=transfer.total_bytes,
                bytes_per_s=transfer.bytes_per_s,
                failures=transfer.failures,
                stalled=transfer.stalled,
            )
        )
    return status


def _load(replica: Replica) -> agent_pb2.ReplicaLoad:
    view = replica.loop.view
    offered = replica.cooperation.offered
    return agent_pb2.ReplicaLoad(
        requests_waiting=view.load.requests_waiting + len(offered),
        requests_running=view.load.requests_running,
        prompt_tokens_waiting=view.load.prompt_tokens_waiting + sum(len(seq.prompt) for seq in offered),
        kv_pages_used=view.load.kv_pages_used,
        kv_pages_total=view.load.kv_pages_total,
        kv_pages_cached=view.load.kv_pages_cached,
        prefix_tokens_asked=view.load.prefix_tokens_asked,
        prefix_tokens_hit=view.load.prefix_tokens_hit,
        preemptions=view.load.preemptions,
        prefill_tokens_per_s=view.prefill_tokens_per_s,
        handoffs_given=replica.handoffs_given + replica.cooperation.given,
        handoffs_taken=replica.handoffs_taken + replica.cooperation.taken,
        comparisons=_comparisons(replica),
        requests_moved=replica.mover.moved,
        kv_bytes_sent=replica.mover.bytes_sent,
    )


def _comparisons(replica: Replica) -> list[agent_pb2.Comparison]:
    found = dict(replica.loop.view.compared)
    found["pause"] = replica.mover.pauses
    if replica.pipeline is not None:
        found["resume"] = replica.pipeline.resumes
    return [
        agent_pb2.Comparison(
            what=what, count=each.count, predicted_s=each.predicted_s, actual_s=each.actual_s
        )
        for what, each in found.items()
        if each.count
    ]


def _timeline(replica: Replica) -> agent_pb2.ReplicaTimeline:
    timeline = replica.timeline
    message = agent_pb2.ReplicaTimeline()
    for name, seconds in (
        ("assigned_at", timeline.assigned_at),
        ("first_segment_at", timeline.first_segment_at),
        ("first_layer_at", replica.loop.view.first_layer_at),
        ("first_token_at", timeline.first_token_at),
        ("complete_at", timeline.complete_at),
    ):
        if seconds is not None:
            getattr(message, name).CopyFrom(_timestamp(seconds))
    return message


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(int(seconds * 1e9))
    return stamp
