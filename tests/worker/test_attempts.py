"""A request that its gateway begins anew while an older attempt of it is between two replicas."""

from __future__ import annotations

import asyncio
import time

import pytest
from layercast.engine.v1alpha1 import engine_pb2
from layercast.peer.v1alpha1 import peer_pb2
from tests.worker.conftest import Packed
from tests.worker.inprocess import Gateway, Worker

from layercast_agent.worker import handoffs, wire

pytestmark = [pytest.mark.timeout(120)]

PROMPT = [7] * 12


def request(*, attempt: int, prompt: list[int] = PROMPT) -> engine_pb2.Request:
    found = engine_pb2.Request(
        request_id="r",
        gateway_id="g",
        attempt=attempt,
        model="tiny",
        prompt_token_ids=prompt,
        sampling=engine_pb2.Sampling(max_tokens=4),
    )
    found.arrived_at.FromNanoseconds(time.time_ns())
    return found


@pytest.mark.parametrize("end", ["the taker dies", "taken", "not taken"])
async def test_a_handoff_that_ends_late_leaves_the_newer_attempt_alone(
    packed: Packed, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handoffs, "LEASE_S", 0.2)
    worker = Worker("target", disk_bytes_per_s=int(packed.manifest.nbytes / 60))
    try:
        await worker.start(packed.manifest, packed.files)
        worker.feed(worker.from_disk(packed.folder))
        replica = worker.replica
        replica.desk.submit(request(attempt=1))
        given = await replica.give(peer_pb2.TakeHandoffRequest(taker=peer_pb2.Peer(peer_id="source")))
        assert given.handoff.request.attempt == 1
        replica.desk.submit(request(attempt=2))
        if end != "the taker dies":
            await replica.release(peer_pb2.ReleaseHandoffRequest(request_id="r", taken=end == "taken"))
        await worker.until(lambda replica: not len(replica.shelf))
        waiting = await replica.desk.ask(lambda engine: [seq.attempt for seq in engine.waiting])
        assert waiting == [2]
        assert replica.desk.owned["r"].attempt == 2
        async with asyncio.timeout(1):
            await replica.desk.return_all("the test is over")
    finally:
        await worker.kill()


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
async def test_of_an_offered_and_a_submitted_attempt_the_newer_one_stays(
    packed: Packed, order: tuple[int, int]
) -> None:
    """Whichever comes first; the offer cannot be kept (its prompt is longer than the context), and ends late."""
    offered, submitted = order
    worker, gateway = Worker("target", disk_bytes_per_s=int(packed.manifest.nbytes / 60)), Gateway()
    try:
        await worker.start(packed.manifest, packed.files)
        source = peer_pb2.Peer(peer_id="source", address="127.0.0.1:9")  # it offers, and does not take
        worker.feed(worker.from_disk(packed.folder), live_source=source)
        await gateway.connect(worker.host.address)
        replica = worker.replica
        await worker.until(lambda replica: replica.desk.can_reach("g"))
        handoff = peer_pb2.Handoff(request=request(attempt=offered, prompt=[7] * 200))
        offer = peer_pb2.OfferHandoffsRequest(source=source, handoffs=[handoff])
        if submitted < offered:
            replica.desk.submit(request(attempt=submitted))
        offering = asyncio.create_task(replica.accept_offers(offer))
        async with asyncio.timeout(5):
            while getattr(replica.desk.owned.get("r"), "attempt", 0) != offered:
                await asyncio.sleep(0)
        if submitted > offered:
            replica.desk.submit(request(attempt=submitted))
        assert not (await offering).accepted_request_ids
        waiting = await replica.desk.ask(lambda engine: [seq.attempt for seq in engine.waiting])
        assert waiting == ([submitted] if submitted > offered else [])
        assert [seq.attempt for seq in replica.desk.owned.values()] == waiting
    finally:
        await gateway.close()
        await worker.kill()


async def test_an_offer_that_comes_again_is_answered_from_what_is_here(packed: Packed) -> None:
    """Its giver heard no answer and closed the state meanwhile: it is owned here, once, and nothing is fetched."""
    worker, gateway = Worker("target", disk_bytes_per_s=int(packed.manifest.nbytes / 60)), Gateway()
    source = Worker("source")
    try:
        await worker.start(packed.manifest, packed.files)
        await source.start(packed.manifest, packed.files)
        source.feed(source.from_disk(packed.folder))
        await source.until(lambda replica: replica.loop.complete)
        worker.feed(worker.from_disk(packed.folder), live_source=source.peer)
        await gateway.connect(worker.host.address)
        replica, giver = worker.replica, source.replica
        await worker.until(lambda replica: replica.desk.can_reach("g"))
        seq = wire.sequence_of(request(attempt=1))
        handoff = giver.shelf.put(
            seq, layers_done=0, state=giver.desk.embed(seq), model="tiny", now=time.monotonic()
        )
        offer = peer_pb2.OfferHandoffsRequest(source=source.peer, handoffs=[handoff])
        assert (await replica.accept_offers(offer)).accepted_request_ids == ["r"]
        giver.shelf.close("r")
        assert (await replica.accept_offers(offer)).accepted_request_ids == ["r"]
        assert [seq.attempt for seq in replica.desk.owned.values()] == [1]
        assert await replica.desk.ask(lambda engine: [seq.attempt for seq in engine.waiting]) == [1]
        assert handoff.HasField("state"), "without one there was nothing to fetch"
    finally:
        await gateway.close()
        await worker.kill()
        await source.kill()
