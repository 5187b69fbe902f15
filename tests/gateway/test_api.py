"""The official openai client, unchanged, over real HTTP and real gRPC: both endpoints, streaming and not."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from tests.gateway.conftest import MODEL, World, accepted, failed, tokens

from layercast_gateway.gateway import Gateway

USER: Any = [{"role": "user", "content": "Hi"}]


async def test_chat_answers_with_text_and_usage(world: World) -> None:
    worker = await world.worker("Hello world! 日本語 🎉")
    client = await world.serving(worker)
    answer = await client.chat.completions.create(model=MODEL, messages=USER)
    request = await worker.submit()
    assert answer.choices[0].message.content == "Hello world! 日本語 🎉"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
    assert answer.usage.completion_tokens == len(worker.reply)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tuple(request.prompt_token_ids) == world.text.encode(prompt)
    assert request.sampling.temperature == 1.0
    assert request.sampling.max_tokens == 512 - len(request.prompt_token_ids)
    assert tuple(request.sampling.stop_token_ids) == world.text.stop_token_ids
    assert request.attempt == 1
    assert request.gateway_id == worker.hellos[0]


async def test_chat_streams_the_same_text(world: World) -> None:
    client = await world.serving(await world.worker("naïve café 漢字🚀🚀 日本語"))
    stream = await client.chat.completions.create(
        model=MODEL, messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == "naïve café 漢字🚀🚀 日本語"
    assert len([t for t in texts if t]) > 3
    assert not any("\ufffd" in t for t in texts)
    assert len(world.text.encode("漢字🚀")) > 6  # characters that lie in several tokens each
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 3


async def test_stream_ends_with_done_and_says_no_usage_unasked(world: World) -> None:
    await world.serving(await world.worker("Hello"))
    url = f"http://{world.gateways[0].address}/v1/chat/completions"
    body = {"model": MODEL, "messages": USER, "stream": True}
    async with world.session().post(url, json=body) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        lines = (await response.text()).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert not any("usage" in json.loads(line.removeprefix("data: ")) for line in lines[:-2])


async def test_completion_of_text_list_and_token_ids(world: World) -> None:
    worker = await world.worker(" world!")
    client = await world.serving(worker)
    ids = list(world.text.encode("Hello"))
    for prompt, count in (("Hello", 1), (["Hello", "the quick"], 2), (ids, 1), ([ids, ids], 2)):
        answer = await client.completions.create(model=MODEL, prompt=prompt)
        assert [choice.text for choice in answer.choices] == [" world!"] * count
        assert [choice.index for choice in answer.choices] == list(range(count))
    assert tuple((await worker.submit()).prompt_token_ids) == tuple(ids)


async def test_completion_echo_and_default_length(world: World) -> None:
    worker = await world.worker("one two three " * 20, end=False)
    client = await world.serving(worker)
    answer = await client.completions.create(model=MODEL, prompt="Hello ", echo=True)
    assert answer.choices[0].text.startswith("Hello one two")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 16
    stream = await client.completions.create(model=MODEL, prompt="Hello ", echo=True, stream=True)
    assert "".join([c.choices[0].text async for c in stream]) == answer.choices[0].text


async def test_n_choices_have_independent_seeds(world: World) -> None:
    worker = await world.worker("Hello")
    client = await world.serving(worker)
    answer = await client.chat.completions.create(model=MODEL, messages=USER, n=3, seed=7, top_p=0.5)
    assert [choice.message.content for choice in answer.choices] == ["Hello"] * 3
    requests = [await worker.submit() for _ in range(3)]
    seeds = {request.sampling.seed for request in requests}
    assert len(seeds) == 3 and 7 in seeds
    again = await client.chat.completions.create(model=MODEL, messages=USER, n=3, seed=7, stream=True)
    indexes = {chunk.choices[0].index async for chunk in again}
    assert indexes == {0, 1, 2}
    assert {(await worker.submit()).sampling.seed for _ in range(3)} == seeds
    assert requests[0].sampling.top_p == 0.5


async def test_sampling_fields_reach_the_worker(world: World) -> None:
    worker = await world.worker("Hello")
    client = await world.serving(worker)
    await client.chat.completions.create(
        model=MODEL, messages=USER, temperature=0, max_completion_tokens=5, seed=-1, extra_body={"top_k": 4}
    )
    sampling = (await worker.submit()).sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.top_k) == (0, 5, 4)
    assert sampling.seed == 2**64 - 1


async def test_logprobs_in_both_shapes(world: World) -> None:
    client = await world.serving(await world.worker("Hello 日本"))
    chat = await client.chat.completions.create(model=MODEL, messages=USER, logprobs=True, top_logprobs=2)
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    content = chat.choices[0].logprobs.content
    assert bytes(b for entry in content for b in entry.bytes or []).decode() == "Hello 日本"
    assert all(len(entry.top_logprobs) == 2 and entry.logprob < 0 for entry in content)
    plain = await client.completions.create(model=MODEL, prompt="x", logprobs=1)
    logprobs = plain.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
    assert logprobs.text_offset[0] == 0 and logprobs.text_offset == sorted(logprobs.text_offset)
    assert len(logprobs.tokens) == len(logprobs.token_logprobs or []) == len(logprobs.top_logprobs or [])
    stream = await client.chat.completions.create(model=MODEL, messages=USER, logprobs=True, stream=True)
    streamed = [e async for c in stream if c.choices[0].logprobs for e in c.choices[0].logprobs.content or []]
    assert [e.token for e in streamed] == [e.token for e in content]


@pytest.mark.parametrize("stop", ["STOP", ["END", "STOP"]])
async def test_stop_string_cuts_over_token_borders_and_cancels(world: World, stop: str | list[str]) -> None:
    reply = "one two STOP three" + " fox" * 50
    worker = await world.worker(reply, end=False, automatic=False)
    client = await world.serving(worker)
    asked = asyncio.create_task(
        client.chat.completions.create(model=MODEL, messages=USER, stop=stop, stream=True)
    )
    request = await worker.submit()
    for step in worker.events_of(request)[:-40]:
        worker.send(*step)
    chunks = [chunk async for chunk in await asked]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "one two "
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert (await worker.cancel()).request_id == request.request_id


async def test_models(world: World) -> None:
    client = await world.serving(await world.worker())
    assert [m.id async for m in await client.models.list()] == [MODEL]
    model = await client.models.retrieve(MODEL)
    assert (model.id, model.created, model.owned_by) == (MODEL, 1_700_000_000, "layercast")
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        await client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


async def test_unknown_model_is_404_in_openais_shape(world: World) -> None:
    client = await world.serving(await world.worker())
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="other", messages=USER)
    assert caught.value.body == {
        "message": "The model `other` does not exist.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


async def test_prompt_too_long_names_the_numbers(world: World) -> None:
    client = await world.serving(await world.worker())
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens") as caught:
        await client.completions.create(model=MODEL, prompt=[5] * 600)
    assert caught.value.code == "context_length_exceeded"
    assert "600 in the prompt" in str(caught.value)
    with pytest.raises(openai.BadRequestError, match="you requested 513 tokens"):
        await client.completions.create(model=MODEL, prompt=[5] * 500, max_tokens=13)


async def test_wrong_bodies_are_answered_and_lose_nothing(world: World) -> None:
    client = await world.serving(await world.worker("Hello"), body_bytes_max=4096)
    gateway, path = world.gateways[0], "/v1/chat/completions"
    status, body, _ = await world.post(gateway, path, b'{"model": "tiny",, }')
    assert status == 400 and "byte 17" in body["error"]["message"]
    status, body, _ = await world.post(gateway, path, b"x" * 5000)
    assert status == 413 and "4096 bytes" in body["error"]["message"]
    status, body, _ = await world.post(gateway, "/v1/nothing", b"")
    assert status == 404 and body["error"]["type"] == "invalid_request_error"
    status, body, headers = await world.post(gateway, "/v1/models", b"")
    assert status == 405 and "GET" in headers["Allow"]
    with pytest.raises(openai.BadRequestError, match="a user speaks first"):
        await client.chat.completions.create(model=MODEL, messages=[{"role": "assistant", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match="outside the vocabulary"):
        await client.completions.create(model=MODEL, prompt=[10**6])
    assert (await client.chat.completions.create(model=MODEL, messages=USER)).choices[
        0
    ].message.content == "Hello"
    _, metrics = await world.get(gateway, "/metrics")
    assert 'layercast_gateway_requests_total{code="400",model="unknown"} 1.0' in metrics
    assert 'layercast_gateway_requests_total{code="200",model="tiny"} 1.0' in metrics


async def test_rejection_by_a_replica_reaches_the_client(world: World) -> None:
    worker = await world.worker(automatic=False)
    client = await world.serving(worker)
    answer = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=USER))
    worker.send(failed(await worker.submit(), client_fault=True))
    with pytest.raises(openai.BadRequestError, match="out of luck"):
        await answer


async def test_metrics_health_and_readiness(world: World) -> None:
    gateway = await world.gateway()
    assert (await world.get(gateway, "/healthz"))[0] == 200
    status, body = await world.get(gateway, "/readyz")
    assert status == 503 and "no routing table" in json.loads(body)["reason"]
    status, body, headers = await world.post(gateway, "/v1/completions", b'{"model":"tiny","prompt":"x"}')
    assert status == 503 and headers["Retry-After"] == "5"
    await world.operator.publish(message="scaled to zero")
    await world.until(gateway, lambda d: d.table is not None)
    status, body = await world.get(gateway, "/readyz")
    assert status == 200 and "no model has a serving replica" in json.loads(body)["reason"]
    _, metrics = await world.get(gateway, "/metrics")
    for name in ("prompt_tokens_waiting", "requests_waiting", "requests_in_flight"):
        assert f'layercast_gateway_{name}{{model="tiny"}} 0.0' in metrics
    for name in (
        "replays_total",
        "handoffs_total",
        "tokens_total",
        "ttft_seconds_count",
        "tbt_seconds_count",
    ):
        assert f'layercast_gateway_{name}{{model="tiny"}} 0.0' in metrics
    worker = await world.worker("Hello world!")
    await world.operator.publish((worker, "SERVING"))
    await world.until(gateway, lambda d: d.available(MODEL).serving == 1)
    status, body = await world.get(gateway, "/readyz")
    assert json.loads(body)["models"] == {MODEL: {"serving": 1, "coming": 0}}
    await world.client(gateway).chat.completions.create(model=MODEL, messages=USER)
    _, metrics = await world.get(gateway, "/metrics")
    assert f'layercast_gateway_tokens_total{{model="tiny"}} {float(len(worker.reply))}' in metrics
    assert 'layercast_gateway_ttft_seconds_count{model="tiny"} 1.0' in metrics
    assert f'layercast_gateway_tbt_seconds_count{{model="tiny"}} {float(len(worker.reply) - 1)}' in metrics


async def test_an_endpoint_picker_is_told_queue_running_and_kv_use(world: World) -> None:
    workers = [await world.worker(automatic=False) for _ in range(2)]
    client = await world.serving(*workers)
    (gateway,) = world.gateways
    assert await pool_metrics(world, gateway) == {"waiting": 0.0, "running": 0.0, "kv": 0.0}
    opening = [
        asyncio.create_task(client.chat.completions.create(model=MODEL, messages=USER, stream=True))
        for _ in workers
    ]
    requests = [await worker.submit() for worker in workers]
    assert await pool_metrics(world, gateway) == {"waiting": 2.0, "running": 0.0, "kv": 0.0}
    for worker, request, used in zip(workers, requests, (3, 1), strict=True):
        worker.send(accepted(request), tokens(request, 0, worker.reply[:1]), kv=(used, 8))
    for each in opening:
        await anext(aiter(await each))
    assert await pool_metrics(world, gateway) == {"waiting": 0.0, "running": 2.0, "kv": 0.25}
    await workers[1].die()
    await world.until(gateway, lambda d: d.replicas.kv_utilization == 3 / 8)


async def pool_metrics(world: World, gateway: Gateway) -> dict[str, float]:
    """What a picker reads, by its names in short."""
    status, text = await world.get(gateway, "/metrics/inference-pool")
    assert status == 200
    samples = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line[0] != "#"}
    assert samples.keys() == {
        "vllm:num_requests_waiting",
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
    }
    return {
        "waiting": samples["vllm:num_requests_waiting"],
        "running": samples["vllm:num_requests_running"],
        "kv": samples["vllm:kv_cache_usage_perc"],
    }
