"""Prompts go to one replica and answers come from another: what the gateway says, counts, and does when one dies."""

from __future__ import annotations

from layercast.engine.v1alpha1 import engine_pb2
from tests.gateway.conftest import Worker, World, accepted, tokens, within
from tests.gateway.test_faults import REPLY, SIX_TOKENS, Reading

from layercast_gateway.counts import occupations
from layercast_gateway.replay import RequestState, Work, dispatch, on_event
from layercast_gateway.replicas import Occupation

SERVING = "SERVING"


async def crew(world: World, *roles: str) -> tuple[Reading, list[Worker]]:
    """A replica of each role that is named, and a client that reads."""
    workers = [await world.worker(REPLY, automatic=False) for _ in roles]
    await world.operator.publish(*((worker, SERVING) for worker in workers), roles=roles)
    client = world.client(await world.gateway(silence_s=0.1))
    for worker in workers:
        await within(worker.connected.wait())
    return Reading(client), workers


async def test_a_request_names_where_it_decodes_and_is_read_from_there(world: World) -> None:
    reading, (prefill, decode) = await crew(world, "PREFILL", "DECODE")
    request = await prefill.submit()
    assert request.decode_at.address == decode.address
    assert request.decode_at.replica_id == f"replica-{decode.address}"
    prefill.send(accepted(request), tokens(request, 0, prefill.reply[:6]))
    await reading.has(SIX_TOKENS)
    decode.send(accepted(request), tokens(request, 0, decode.reply[:7]))
    decode.play(request)
    assert await reading.end() == REPLY
    assert decode.submits.empty()


async def test_the_one_that_decodes_dies_and_its_request_begins_anew(world: World) -> None:
    reading, (prefill, decode, other) = await crew(world, "PREFILL", "DECODE", "DECODE")
    request = await prefill.submit()
    first, second = (decode, other) if request.decode_at.address == decode.address else (other, decode)
    prefill.send(accepted(request))
    first.send(accepted(request), tokens(request, 0, first.reply[:6]))
    await reading.has(SIX_TOKENS)
    await first.die()
    again = await prefill.submit()
    assert (again.attempt, len(again.generated_token_ids)) == (2, 6)
    assert again.decode_at.address == second.address
    prefill.play(again)  # nobody is obliged to hand over
    assert await reading.end() == REPLY


async def test_the_one_that_computes_prompts_dies_and_the_other_does_both(world: World) -> None:
    reading, (prefill, decode) = await crew(world, "PREFILL", "DECODE")
    request = await prefill.submit()
    prefill.send(accepted(request), tokens(request, 0, prefill.reply[:6]))
    await reading.has(SIX_TOKENS)
    await prefill.die()
    again = await decode.submit()
    assert not again.HasField("decode_at")
    decode.play(again)
    assert await reading.end() == REPLY


def test_a_request_on_its_way_counts_where_it_goes() -> None:
    work = Work(
        request_id="r",
        model="m",
        prompt=(1, 2),
        sampling=engine_pb2.Sampling(max_tokens=9),
        arrived_at=0.0,
        deadline=9.0,
    )
    state = RequestState(work=work)
    dispatch(state, address="p:1", accept_by=5.0, decode_at=("d", "d:1"))
    counted = {"p:1": Occupation(unstarted=1, in_flight=1), "d:1": Occupation(unstarted=0, in_flight=1)}
    assert occupations([state], {"p:1", "d:1"}) == counted
    told = engine_pb2.Event(request_id="r", attempt=1, accepted=engine_pb2.Accepted(replica_id="d"))
    on_event(state, address="d:1", event=told, now=1.0)
    assert occupations([state], {"p:1", "d:1"}) == {"d:1": Occupation(unstarted=1, in_flight=1)}
