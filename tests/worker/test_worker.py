"""Workers as processes: load, serve, share, hand over, drain, die."""

from __future__ import annotations

import random
import statistics
from itertools import pairwise
from pathlib import Path

import grpc
import pytest
from layercast.agent.v1alpha1 import agent_pb2
from layercast.worker.v1alpha1 import worker_pb2
from tests.worker.conftest import GatewayClient, Packed, Reference, StartWorker
from tokenizers import Tokenizer

from layercast_agent import rdma

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

PROMPTS = [[random.Random(i).randrange(3, 500) for _ in range(20 + 7 * (i % 5))] for i in range(24)]


def serving(status: worker_pb2.GetWorkerStatusResponse) -> bool:
    return status.replica.state == agent_pb2.REPLICA_STATE_SERVING


async def test_a_replica_from_disk_answers_like_transformers(
    packed: Packed, start_worker: StartWorker, gateway: GatewayClient, reference: Reference
) -> None:
    worker = await start_worker("a")
    await worker.assign(packed)
    await worker.feed(packed)
    await worker.until(serving)
    peer = await worker.peer()
    await gateway.connect(peer.address)
    for index, prompt in enumerate(PROMPTS[:8]):
        await gateway.submit(peer.address, gateway.request(f"r{index}", prompt, max_tokens=12))
    await gateway.all_done()
    for index, prompt in enumerate(PROMPTS[:8]):
        assert gateway.answers[f"r{index}"].tokens == reference(prompt, 12)


async def test_what_carried_the_parameters_and_why_not_rdma(
    packed: Packed, start_worker: StartWorker
) -> None:
    first, second = await start_worker("a"), await start_worker("b")
    for worker, upstreams in ((first, None), (second, [first])):
        await worker.assign(packed)
        await worker.feed(packed, upstreams=[await peer.peer() for peer in upstreams] if upstreams else None)
        await worker.until(serving)
    nbytes = packed.manifest.nbytes
    told = [(await worker.status()).reads for worker in (first, second)]
    assert [dict(reads.read_bytes) for reads in told] == [
        {"rdma": 0, "tcp": 0, "shm": 0, "disk": nbytes},
        {"rdma": 0, "tcp": nbytes, "shm": 0, "disk": 0},
    ]
    verdict = rdma.judge(rdma.look(), rdma.Rdma.AUTO)
    assert {(reads.rdma, reads.rdma_reason, reads.rdma_missed) for reads in told} == {
        (verdict.use, verdict.reason, False)
    }


async def test_bad_requests_are_refused_and_harm_nobody(
    packed: Packed, start_worker: StartWorker, gateway: GatewayClient
) -> None:
    worker = await start_worker("a")
    await worker.assign(packed, context=64)
    await worker.feed(packed)
    await worker.until(serving)
    peer = await worker.peer()
    await gateway.connect(peer.address)
    await gateway.submit(peer.address, gateway.request("long", [5] * 80, max_tokens=4))
    await gateway.submit(peer.address, gateway.request("other", [5] * 8, model="another"))
    await gateway.submit(peer.address, gateway.request("good", [5] * 8, max_tokens=4))
    await gateway.all_done()
    assert "64" in gateway.answers["long"].failed
    assert "another" in gateway.answers["other"].returned
    assert len(gateway.answers["good"].tokens) == 4


async def test_guides_prefixes_and_the_memory_plan(
    packed: Packed, start_worker: StartWorker, gateway: GatewayClient, reference: Reference
) -> None:
    worker = await start_worker("a")
    await worker.assign(packed, context=64)
    await worker.feed(packed)
    await worker.until(serving)
    address = (await worker.peer()).address
    await gateway.connect(address)
    wrong = gateway.request("wrong", [5] * 8)
    wrong.sampling.guide.regex = "(ab"
    guided = gateway.request("guided", PROMPTS[0], max_tokens=20)
    guided.sampling.guide.choice = '["yes", "no"]'
    await gateway.submit(address, wrong)
    await gateway.submit(address, guided)
    await gateway.all_done()
    assert "regex" in gateway.answers["wrong"].failed
    text = Tokenizer.from_buffer(packed.files["tokenizer.json"]).decode(gateway.answers["guided"].tokens)
    assert text in ("yes", "no") and gateway.answers["guided"].finished
    beginning = [7] * 32
    for index in range(2):
        await gateway.submit(address, gateway.request(f"r{index}", [*beginning, index + 8], max_tokens=6))
        await gateway.all_done()
        assert gateway.answers[f"r{index}"].tokens == reference([*beginning, index + 8], 6)
    replica = (await worker.until(lambda status: status.replica.load.requests_running == 0)).replica
    assert replica.load.prefix_tokens_hit == 32
    assert replica.load.prefix_tokens_asked >= 2 * 33
    assert replica.load.kv_pages_cached > 0 and replica.load.kv_pages_used == 0
    memory = replica.memory
    assert memory.kv_pages == replica.load.kv_pages_total and memory.kv_page_tokens == 16
    assert memory.parameter_bytes >= packed.manifest.nbytes
    assert memory.parameter_bytes + memory.kv_bytes + memory.workspace_bytes <= memory.device_bytes


async def test_live_scale_up_hands_over_and_changes_no_token(
    packed: Packed, start_worker: StartWorker, gateway: GatewayClient, reference: Reference
) -> None:
    source = await start_worker("source", egress_bytes_per_s=12_000_000, cpu_share=0.06)
    target = await start_worker("target", cpu_share=0.06)
    await source.assign(packed)
    await source.feed(packed)
    await source.until(serving)
    await target.assign(packed)
    peers = {"source": await source.peer(), "target": await target.peer()}
    for peer in peers.values():
        await gateway.connect(peer.address)
    for index, prompt in enumerate(PROMPTS):
        await gateway.submit(peers["source"].address, gateway.request(f"r{index}", prompt, max_tokens=10))
    await target.feed(packed, upstreams=[peers["source"]], live_source=peers["source"])
    await gateway.all_done(120)
    for index, prompt in enumerate(PROMPTS):
        answer = gateway.answers[f"r{index}"]
        assert answer.finished, answer
        assert answer.tokens == reference(prompt, 10)
    status = await source.status()
    assert status.replica.load.handoffs_given > 0
    assert status.replica.load.handoffs_taken > 0
    assert any(layers > 0 for answer in gateway.answers.values() for layers in answer.layers_done)
    after = await target.until(serving)
    assert after.replica.timeline.HasField("first_token_at")
    assert after.replica.timeline.HasField("first_layer_at")


@pytest.mark.parametrize("victim", ["source", "target"])
async def test_death_in_the_middle_loses_nothing(
    packed: Packed, start_worker: StartWorker, gateway: GatewayClient, reference: Reference, victim: str
) -> None:
    workers = {
        "source": await start_worker("source", egress_bytes_per_s=6_000_000, cpu_share=0.06),
        "target": await start_worker("target", cpu_share=0.06),
    }
    for worker in workers.values():
        await worker.assign(packed)
    await workers["source"].feed(packed)
    await workers["source"].until(serving)
    peers = {name: await worker.peer() for name, worker in workers.items()}
    for peer in peers.values():
        await gateway.connect(peer.address)
    for index, prompt in enumerate(PROMPTS[:12]):
        await gateway.submit(peers["source"].address, gateway.request(f"r{index}", prompt, max_tokens=8))
    await workers["target"].feed(packed, upstreams=[peers["source"]], live_source=peers["source"])
    await workers["target"].until(lambda s: s.replica.layers_resident >= 2)
    workers[victim].kill()
    survivor = "target" if victim == "source" else "source"
    await gateway.until_broken(peers[victim].address)
    if victim == "source":  # the operator would name the disk as the next upstream
        await workers["target"].feed(packed, generation=2)
    for request_id, answer in gateway.answers.items():
        if not answer.finished and answer.owner != peers[survivor].address:
            prompt = PROMPTS[int(request_id[1:])]
            answer.returned = ""
            again = gateway.request(
                request_id, prompt, max_tokens=8, attempt=2, generated=tuple(answer.tokens)
            )
            await gateway.submit(peers[survivor].address, again)
    await gateway.all_done(120)
    for index, prompt in enumerate(PROMPTS[:12]):
        assert gateway.answers[f"r{index}"].tokens == reference(prompt, 8)


async def test_draining_gives_requests_back_and_stopping_frees_the_worker(
    packed: Packed, start_worker: StartWorker, gateway: GatewayClient
) -> None:
    worker = await start_worker("a", cpu_share=0.2)
    await worker.assign(packed)
    await worker.feed(packed)
    await worker.until(serving)
    peer = await worker.peer()
    await gateway.connect(peer.address)
    for index, prompt in enumerate(PROMPTS):
        await gateway.submit(peer.address, gateway.request(f"r{index}", prompt, max_tokens=100))
    await worker.control.BeginDrain(
        worker_pb2.BeginDrainRequest(drain=agent_pb2.DrainReplicaRequest(replica_id="a", grace_ms=300))
    )
    await gateway.all_done()
    assert all(answer.finished or answer.returned for answer in gateway.answers.values())
    await worker.until(lambda s: s.replica.state == agent_pb2.REPLICA_STATE_DRAINED)
    await worker.control.UnassignReplica(worker_pb2.UnassignReplicaRequest(replica_id="a"))
    assert not (await worker.status()).HasField("replica")
    await worker.assign(packed)
    assert (await worker.status()).replica.layers_resident == 0


async def test_refusals_say_why(packed: Packed, start_worker: StartWorker) -> None:
    worker = await start_worker("a")
    await worker.assign(packed)
    await worker.assign(packed)
    with pytest.raises(grpc.aio.AioRpcError) as other:
        await worker.control.AssignReplica(
            worker_pb2.AssignReplicaRequest(
                replica=agent_pb2.StartReplicaRequest(replica_id="b", model="tiny"),
                manifest_json=packed.manifest.to_json(),
            )
        )
    assert other.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await worker.control.BeginTransfer(
            worker_pb2.BeginTransferRequest(
                transfer=agent_pb2.StartTransferRequest(replica_id="nobody", transfer_id="t")
            )
        )
    assert unknown.value.code() == grpc.StatusCode.NOT_FOUND


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file stands for."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


async def test_a_warm_worker_keeps_nothing_of_the_replicas_that_it_had(
    packed: Packed, start_worker: StartWorker, gateway: GatewayClient
) -> None:
    worker = await start_worker("a")
    seen = []
    for index in range(10):
        await worker.assign(packed)
        await worker.feed(packed)
        await worker.until(serving)
        address = (await worker.peer()).address
        if not index:
            await gateway.connect(address)
        await gateway.submit(address, gateway.request(f"r{index}", PROMPTS[0], max_tokens=4))
        await gateway.all_done()
        await worker.control.UnassignReplica(
            worker_pb2.UnassignReplicaRequest(replica_id=worker.name), timeout=30
        )
        seen.append(anonymous_bytes(worker.process.pid))
    # The first replicas leave caches and compiled kernels, and a heap grows by a step now and then: what every one
    # leaves is a growth at most of them.
    grown = [after - before for before, after in pairwise(seen[1:])]
    assert statistics.median(grown) < packed.manifest.nbytes / 8, [each >> 20 for each in seen]
