"""A request that its gateway begins anew while an older attempt of it is between two replicas."""

from __future__ import annotations

import asyncio
import time

import pytest
from layercast.engine.v1alpha1 import engine_pb2
from layercast.peer.v1alpha1 import peer_pb2
from tests.worker.conftest import Packed
from tests.worker.inprocess import Worker

from layercast_agent.worker import handoffs

pytestmark = [pytest.mark.timeout(120)]

PROMPT = [7] * 12


def request(*, attempt: int) -> engine_pb2.Request:
    found = engine_pb2.Request(
        request_id="r",
        gateway_id="g",
        attempt=attempt,
        model="tiny",
        prompt_token_ids=PROMPT,
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
