"""A request keeps every wish about its tokens on the way from a gateway and from replica to replica."""

from __future__ import annotations

import dataclasses

from layercast.engine.v1alpha1 import engine_pb2 as pb

from layercast_agent.engine.sequence import Guide, SamplingParams, Sequence, TokenEvent
from layercast_agent.worker import wire

SAMPLING = SamplingParams(
    max_tokens=7,
    temperature=0.5,
    top_p=0.75,
    top_k=3,
    seed=2**63,
    stop_token_ids=frozenset({4, 5}),
    logprobs=True,
    top_logprobs=2,
    min_p=0.125,
    repetition_penalty=1.5,
    presence_penalty=-0.5,
    frequency_penalty=0.25,
    logit_bias=((3, 1.5), (9, -100.0)),
    min_tokens=2,
    guide=Guide(kind="regex", text="a+"),
)


def test_every_field_survives() -> None:
    defaults = SamplingParams(max_tokens=1)
    for field in dataclasses.fields(SamplingParams):
        assert getattr(SAMPLING, field.name) != getattr(defaults, field.name), f"{field.name} proves nothing"
    for sampling in (SAMPLING, defaults):
        seq = Sequence(
            request_id="r",
            attempt=2,
            gateway_id="g",
            prompt=(1, 2),
            generated=[3],
            sampling=sampling,
            arrived_at=5.5,
        )
        again = wire.sequence_of(pb.Request.FromString(wire.request_of(seq, model="m").SerializeToString()))
        assert again.sampling == sampling
        assert (again.prompt, again.generated, again.arrived_at) == (seq.prompt, seq.generated, 5.5)


def test_a_request_that_cannot_go_on_fails_after_its_token() -> None:
    token = TokenEvent(request_id="r", attempt=1, gateway_id="g", position=3, token_id=8, error="too complex")
    tokens, failed = wire.events_of(token)
    assert list(tokens.tokens.token_ids) == [8]
    assert (failed.failed.client_fault, failed.failed.message) == (True, "too complex")
