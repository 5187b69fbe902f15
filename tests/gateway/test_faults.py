"""Replicas that die, hand over, give back, repeat themselves or stay silent: each client gets its text once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from layercast.engine.v1alpha1 import engine_pb2
from tests.gateway.conftest import (
    MODEL,
    Worker,
    World,
    accepted,
    failed,
    finished,
    returned,
    tokens,
    within,
)  # fmt: skip

USER: Any = [{"role": "user", "content": "Hi"}]
REPLY = "the quick brown fox 🎉 jumps over 漢字🚀 the lazy dog"


EIGHT_STEPS = len("the quick brown fox 🎉 jumps over")
"""Characters that acceptance and seven tokens of the reply make certain."""

SIX_TOKENS = len("the quick brown fox 🎉 jumps")


class Reading:
    """A streaming request whose text is read as it comes."""

    def __init__(self, client: openai.AsyncOpenAI, **fields: Any) -> None:
        self.text = ""
        self.grew = asyncio.Condition()
        self._done = asyncio.create_task(self._read(client, fields))

    async def has(self, characters: int) -> None:
        """Returns when so much text arrived."""
        async with self.grew:
            await within(self.grew.wait_for(lambda: len(self.text) >= characters))

    async def end(self) -> str:
        """The whole text, when the stream has ended well; raises what ended it otherwise."""
        await within(self._done)
        return self.text

    async def leave(self) -> None:
        """The client closes its connection."""
        self._done.cancel()
        await asyncio.gather(self._done, return_exceptions=True)

    async def _read(self, client: openai.AsyncOpenAI, fields: dict[str, Any]) -> None:
        stream = await client.chat.completions.create(model=MODEL, messages=USER, stream=True, **fields)
        async with stream:
            async for chunk in stream:
                async with self.grew:
                    self.text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
                    self.grew.notify_all()


async def test_replica_dies_mid_stream(world: World) -> None:
    workers = [await world.worker(REPLY, automatic=False) for _ in range(2)]
    reading = Reading(await world.serving(*workers))
    first = min(workers, key=lambda w: w.address)
    request = await first.submit()
    first.play(request, 8)
    await reading.has(EIGHT_STEPS)
    await first.die()
    second = next(w for w in workers if w is not first)
    again = await second.submit()
    assert again.attempt == 2
    assert again.request_id == request.request_id
    assert list(again.generated_token_ids) == second.reply[:7]
    assert (again.sampling, again.arrived_at) == (request.sampling, request.arrived_at)
    second.play(again)
    assert await reading.end() == REPLY
    assert await world.metric("replays_total") == 1


async def test_the_only_replica_dies_and_comes_back(world: World) -> None:
    worker = await world.worker(REPLY, automatic=False)
    reading = Reading(await world.serving(worker))
    worker.play(await worker.submit(), 8)
    await reading.has(EIGHT_STEPS)
    await worker.die()
    await worker.revive()
    again = await worker.submit()
    assert again.attempt == 2
    assert (await worker.cancel()).attempt == 1  # its older self might still execute it
    worker.play(again)
    assert await reading.end() == REPLY


async def test_dispatch_lost_before_it_was_accepted(world: World) -> None:
    worker = await world.worker(REPLY, automatic=False)
    client = await world.serving(worker)
    answer = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=USER))
    for attempt in range(1, 7):  # more often than the attempts that count as faults
        assert (await worker.submit()).attempt == attempt
        await worker.die()
        await worker.revive()
    worker.play(await worker.submit())
    assert (await within(answer)).choices[0].message.content == REPLY


async def test_replica_dies_between_last_token_and_finished(world: World) -> None:
    workers = [await world.worker(REPLY, automatic=False) for _ in range(2)]
    client = await world.serving(*workers)
    answer = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=USER))
    first = min(workers, key=lambda w: w.address)
    request = await first.submit()
    first.send(accepted(request), tokens(request, 0, first.reply))
    result = await within(answer)  # no Finished was ever sent
    assert result.choices[0].message.content == REPLY
    assert result.choices[0].finish_reason == "stop"


async def test_tokens_come_from_the_replica_that_took_over(world: World) -> None:
    source, target = [await world.worker(REPLY, automatic=False) for _ in range(2)]
    await world.operator.publish((source, "SERVING"), (target, "LIVE"))
    client = world.client(await world.gateway())
    await within(target.connected.wait())
    reading = Reading(client)
    request = await source.submit()
    source.send(accepted(request))
    target.send(accepted(request, layers_done=3))
    target.send(tokens(request, 0, target.reply[:6]))
    await reading.has(SIX_TOKENS)
    await source.die()  # not its request any more: nothing is replayed
    target.send(tokens(request, 6, target.reply[6:]), finished(request))
    assert await reading.end() == REPLY
    assert await world.metric("replays_total") == 0
    assert await world.metric("handoffs_total") == 1


async def test_target_dies_with_what_it_took(world: World) -> None:
    source, target = [await world.worker(REPLY, automatic=False) for _ in range(2)]
    await world.operator.publish((source, "SERVING"), (target, "LIVE"))
    client = world.client(await world.gateway())
    await within(target.connected.wait())
    reading = Reading(client)
    request = await source.submit()
    source.send(accepted(request))
    target.send(accepted(request, layers_done=3), tokens(request, 0, target.reply[:6]))
    await reading.has(SIX_TOKENS)
    await target.die()
    again = await source.submit()
    assert (again.attempt, len(again.generated_token_ids)) == (2, 6)
    source.play(again)
    assert await reading.end() == REPLY


async def test_target_dies_before_it_announced_what_it_took(world: World) -> None:
    """The gateway believes that the source has it, and the source believes that the target does."""
    source, target = [await world.worker(REPLY, automatic=False) for _ in range(2)]
    await world.operator.publish((source, "SERVING"), (target, "LIVE"))
    client = world.client(await world.gateway(silence_s=0.1))
    await within(target.connected.wait())
    reading = Reading(client)
    request = await source.submit()
    source.send(accepted(request))
    await target.die()
    again = await source.submit()
    assert again.attempt == 2
    source.play(again)
    assert await reading.end() == REPLY


async def test_announcements_that_cross(world: World) -> None:
    """The target's announcement overtakes the source's: the target is the owner all the same."""
    source, target = [await world.worker(REPLY, automatic=False) for _ in range(2)]
    await world.operator.publish((source, "SERVING"), (target, "LIVE"))
    client = world.client(await world.gateway(silence_s=100))
    await within(target.connected.wait())
    reading = Reading(client)
    request = await source.submit()
    target.send(accepted(request))
    target.send(tokens(request, 0, target.reply[:6]))
    await reading.has(SIX_TOKENS)
    source.send(accepted(request))
    source.send(
        tokens(request, 0, target.reply[:7])
    )  # proves that the announcement was read; one token is new
    await reading.has(len(world.text.decode(target.reply[:6])) + 1)
    await target.die()
    await source.die()
    await source.revive()
    assert (await source.submit()).attempt == 2
    await reading.leave()


async def test_no_acceptance_in_time(world: World) -> None:
    workers = [await world.worker(REPLY, automatic=False) for _ in range(2)]
    reading = Reading(await world.serving(*workers, accept_timeout_s=0.1))
    mute, other = sorted(workers, key=lambda w: w.address)
    request = await mute.submit()
    again = await other.submit()
    assert again.attempt == 2
    assert (await mute.cancel()).attempt == 1
    other.send(accepted(again))
    mute.send(accepted(request), tokens(request, 0, [5, 6, 7]))  # too late, and told so
    assert (await mute.cancel()).attempt == 1
    other.play(again)
    assert await reading.end() == REPLY


async def test_silent_worker_that_left_the_table(world: World) -> None:
    """Its machine lost power: the stream never breaks, but the operator knows."""
    silent, other = [await world.worker(REPLY, automatic=False) for _ in range(2)]
    reading = Reading(await world.serving(silent, silence_s=0.02))
    request = await silent.submit()
    silent.play(request, 8)
    await reading.has(EIGHT_STEPS)
    await world.operator.publish((other, "SERVING"))
    again = await other.submit()
    assert (again.attempt, list(again.generated_token_ids)) == (2, other.reply[:7])
    other.play(again)
    assert await reading.end() == REPLY


async def test_duplicates_are_dropped_and_a_gap_is_replayed(world: World) -> None:
    worker = await world.worker(REPLY, automatic=False)
    reading = Reading(await world.serving(worker))
    request = await worker.submit()
    reply = worker.reply
    worker.send(accepted(request), tokens(request, 0, reply[:3]), tokens(request, 0, reply[:3]))
    worker.send(tokens(request, 1, reply[1:6]), tokens(request, 2, reply[2:4]))
    worker.send(tokens(request, 8, reply[8:9]))
    again = await worker.submit()
    assert list(again.generated_token_ids) == reply[:6]
    worker.send(tokens(request, 6, reply[6:8]))  # the old attempt says nothing any more
    worker.play(again)
    assert await reading.end() == REPLY


async def test_returned_requests_keep_their_order(world: World) -> None:
    worker = await world.worker("Hello", automatic=False)
    client = await world.serving(worker, window_requests=2)
    answers = []
    given: list[engine_pb2.Request] = []
    for _ in range(4):
        answers.append(asyncio.create_task(client.chat.completions.create(model=MODEL, messages=USER)))
        if len(given) < 2:
            given.append(await worker.submit())
    worker.send(*(returned(request) for request in reversed(given)))
    again = [await worker.submit(), await worker.submit()]
    assert [r.request_id for r in again] == [r.request_id for r in given]
    assert [r.attempt for r in again] == [2, 2]
    worker.automatic = True
    for request in again:
        worker.play(request)
    for answer in answers:
        assert (await within(answer)).choices[0].message.content == "Hello"


async def test_failures_end_with_one_clear_error(world: World) -> None:
    worker = await world.worker(automatic=False)
    client = await world.serving(worker)
    answer = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=USER))
    for _ in range(5):
        worker.send(failed(await worker.submit(), client_fault=False))
    with pytest.raises(openai.InternalServerError, match=r"tried 5 times.*out of luck") as caught:
        await within(answer)
    assert caught.value.code == "attempts_exhausted"
    assert worker.submits.empty()


async def test_error_after_the_first_text_is_an_event(world: World) -> None:
    worker = await world.worker(REPLY, automatic=False)
    reading = Reading(await world.serving(worker, request_deadline_s=0.5))
    request = await worker.submit()
    worker.play(request, 8)
    with pytest.raises(openai.APIError, match="deadline passed before its last token"):
        await reading.end()
    assert REPLY.startswith(reading.text) and reading.text
    assert (await worker.cancel()).request_id == request.request_id


@pytest.mark.parametrize("stream", [True, False])
async def test_client_leaves(world: World, stream: bool) -> None:
    worker = await world.worker(REPLY, automatic=False)
    client = await world.serving(worker)
    if stream:
        reading = Reading(client)
        request = await worker.submit()
        worker.play(request, 8)
        await reading.has(EIGHT_STEPS)
        await reading.leave()
    else:
        answer = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=USER))
        request = await worker.submit()
        answer.cancel()
    cancel = await worker.cancel()
    assert (cancel.request_id, cancel.attempt) == (request.request_id, 1)
    status, _ = await world.get(world.gateways[0], "/readyz")
    assert status == 200
    assert await world.metric("requests_in_flight") == 0


async def test_many_requests_over_dying_replicas(world: World) -> None:
    """A storm: every replica dies and comes back while many answers stream; all are right."""
    workers = [await world.worker(REPLY, automatic=False) for _ in range(3)]
    client = await world.serving(*workers, silence_s=0.05)
    players = [asyncio.create_task(_play(worker)) for worker in workers]
    readings = [Reading(client, stop=["NEVER"]) for _ in range(24)]
    for worker in workers:
        await readings[0].has(1)
        await worker.die()
        await worker.revive()
    try:
        assert {await reading.end() for reading in readings} == {REPLY}
    finally:
        for player in players:
            player.cancel()
        await asyncio.gather(*players, return_exceptions=True)
    assert await world.metric("requests_in_flight") == 0


async def _play(worker: Worker) -> None:
    """Executes honestly, one step of every request after another, as a batch would."""
    running: list[AsyncIterator[None]] = []

    async def execution(request: engine_pb2.Request) -> AsyncIterator[None]:
        for step in worker.events_of(request):
            worker.send(*step)
            yield

    while True:
        if not running:
            running.append(execution(await worker.submits.get()))
        while not worker.submits.empty():
            running.append(execution(worker.submits.get_nowait()))
        for one in [*running]:
            try:
                await anext(one)
            except StopAsyncIteration:
                running.remove(one)
        await asyncio.sleep(0)
