"""Between the wire's messages and the engine's values; the only place of the worker that knows both."""

from __future__ import annotations

from collections.abc import Iterable

from layercast.agent.v1alpha1 import agent_pb2
from layercast.engine.v1alpha1 import engine_pb2 as pb

from layercast_agent.engine.sequence import (
    DecodePlace,
    FinishReason,
    Guide,
    SamplingParams,
    Sequence,
    TokenEvent,
)

FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


def sequence_of(request: pb.Request) -> Sequence:
    """A fresh sequence: nothing executed, tokens of earlier attempts included."""
    sampling = request.sampling
    return Sequence(
        request_id=request.request_id,
        attempt=request.attempt,
        gateway_id=request.gateway_id,
        prompt=tuple(request.prompt_token_ids),
        generated=list(request.generated_token_ids),
        sampling=SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p or 1.0,
            top_k=sampling.top_k,
            seed=sampling.seed,
            max_tokens=sampling.max_tokens,
            stop_token_ids=frozenset(sampling.stop_token_ids),
            logprobs=sampling.logprobs,
            top_logprobs=sampling.top_logprobs,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty or 1.0,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=tuple(sorted(sampling.logit_bias.items())),
            min_tokens=sampling.min_tokens,
            guide=_guide(sampling),
        ),
        arrived_at=request.arrived_at.ToNanoseconds() / 1e9,
        decode_at=_decode_at(request),
    )


def _decode_at(request: pb.Request) -> DecodePlace | None:
    place = request.decode_at
    return DecodePlace(replica_id=place.replica_id, address=place.address) if place.address else None


def _guide(sampling: pb.Sampling) -> Guide | None:
    kind = sampling.guide.WhichOneof("kind")
    return Guide(kind=kind, text=getattr(sampling.guide, kind)) if kind else None


def request_of(seq: Sequence, *, model: str) -> pb.Request:
    """The request as another replica needs it to go on."""
    sampling = seq.sampling
    request = pb.Request(
        request_id=seq.request_id,
        gateway_id=seq.gateway_id,
        attempt=seq.attempt,
        model=model,
        prompt_token_ids=seq.prompt,
        generated_token_ids=seq.generated,
        sampling=pb.Sampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            max_tokens=sampling.max_tokens,
            stop_token_ids=sorted(sampling.stop_token_ids),
            logprobs=sampling.logprobs,
            top_logprobs=sampling.top_logprobs,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=dict(sampling.logit_bias),
            min_tokens=sampling.min_tokens,
            guide=pb.Guide(**{sampling.guide.kind: sampling.guide.text}) if sampling.guide else None,
        ),
    )
    request.arrived_at.FromNanoseconds(int(seq.arrived_at * 1e9))
    if seq.decode_at is not None:
        place = pb.DecodePlace(replica_id=seq.decode_at.replica_id, address=seq.decode_at.address)
        request.decode_at.CopyFrom(place)
    return request


def accepted(seq: Sequence, *, replica_id: str, layers_done: int = 0) -> pb.Event:
    """This replica owns the request from now on."""
    return pb.Event(
        request_id=seq.request_id,
        attempt=seq.attempt,
        accepted=pb.Accepted(replica_id=replica_id, layers_done=layers_done),
    )


def returned(seq: Sequence, *, reason: str) -> pb.Event:
    """The gateway should dispatch the request elsewhere."""
    return pb.Event(request_id=seq.request_id, attempt=seq.attempt, returned=pb.Returned(reason=reason))


def refused(request: pb.Request, *, message: str) -> pb.Event:
    """The request can be served by nobody; the client should mend it."""
    return pb.Event(
        request_id=request.request_id,
        attempt=request.attempt,
        failed=pb.Failed(client_fault=True, message=message),
    )


def tokens_so_far(seq: Sequence) -> pb.Event | None:
    """All tokens of this attempt again, for a gateway that reconnected."""
    if not seq.generated:
        return None
    return pb.Event(
        request_id=seq.request_id,
        attempt=seq.attempt,
        tokens=pb.Tokens(position=0, token_ids=seq.generated),
    )


def events_of(token: TokenEvent) -> list[pb.Event]:
    """One new token, and the request's end when it was the last."""
    event = pb.Event(
        request_id=token.request_id,
        attempt=token.attempt,
        tokens=pb.Tokens(position=token.position, token_ids=[token.token_id]),
    )
    if token.logprobs is not None:
        entry = event.tokens.logprobs.add(logprob=token.logprobs.logprob)
        for token_id, logprob in token.logprobs.top:
            entry.top.add(token_id=token_id, logprob=logprob)
    if token.error:
        failed = pb.Failed(client_fault=True, message=token.error)
        return [event, pb.Event(request_id=token.request_id, attempt=token.attempt, failed=failed)]
    if token.finish is None:
        return [event]
    finished = pb.Event(
        request_id=token.request_id,
        attempt=token.attempt,
        finished=pb.Finished(reason=FINISH_REASONS[token.finish]),
    )
    return [event, finished]


def events_by_gateway(tokens: Iterable[TokenEvent]) -> dict[str, list[pb.Event]]:
    """Groups one step's tokens by the gateway that waits for them."""
    grouped: dict[str, list[pb.Event]] = {}
    for token in tokens:
        grouped.setdefault(token.gateway_id, []).extend(events_of(token))
    return grouped


STATES_ARRIVING = frozenset(
    {agent_pb2.REPLICA_STATE_LOADING, agent_pb2.REPLICA_STATE_LIVE, agent_pb2.REPLICA_STATE_LEADING}
)
"""Parameters are on their way."""

STATES_BEFORE_LEADING = STATES_ARRIVING - {agent_pb2.REPLICA_STATE_LEADING}
"""From these it can begin to lead."""
