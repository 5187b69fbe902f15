"""A request as a worker is given it."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp
from layercast.engine.v1alpha1 import engine_pb2

from layercast_gateway.replay import RequestState


def request_of(state: RequestState, *, gateway_id: str) -> engine_pb2.Request:
    """The current attempt of a request, with the tokens that are here already."""
    work = state.work
    arrived_at = Timestamp()
    arrived_at.FromNanoseconds(int(work.arrived_at * 1e9))
    request = engine_pb2.Request(
        request_id=work.request_id,
        gateway_id=gateway_id,
        attempt=state.attempt,
        model=work.model,
        prompt_token_ids=work.prompt,
        generated_token_ids=state.tokens,
        sampling=work.sampling,
        arrived_at=arrived_at,
    )
    if state.decode_at is not None:
        replica_id, address = state.decode_at
        request.decode_at.CopyFrom(engine_pb2.DecodePlace(replica_id=replica_id, address=address))
    return request
