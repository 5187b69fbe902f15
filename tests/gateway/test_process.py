"""The real process: exit codes, signals, and one sentence for what is wrong."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from tests.gateway.conftest import MODEL, World, accepted, finished, tokens, within

pytestmark = pytest.mark.processes


async def spawn(world: World, *flags: str) -> asyncio.subprocess.Process:
    command = (
        "-m",
        "layercast_gateway",
        "--operator",
        world.operator.address,
        "--log-format",
        "json",
        *flags,
    )
    return await asyncio.create_subprocess_exec(sys.executable, *command, stderr=asyncio.subprocess.PIPE)


@asynccontextmanager
async def running(world: World, *flags: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A gateway process and its address; killed at the end when it still runs."""
    process = await spawn(world, "--listen", "127.0.0.1:0", *flags)
    try:
        yield process, (await log_line(process, "gateway listens"))["address"]
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def log_line(process: asyncio.subprocess.Process, sentence: str) -> dict[str, str]:
    assert process.stderr is not None
    while line := await within(process.stderr.readline()):
        if (entry := json.loads(line))["message"] == sentence:
            return dict(entry)
    raise AssertionError(f"the process ended without saying: {sentence}")


@pytest.mark.parametrize("stream", [True, False])
async def test_sigterm_finishes_what_is_in_flight(world: World, stream: bool) -> None:
    worker = await world.worker("Hello world!", automatic=False)
    await world.operator.publish((worker, "SERVING"))
    async with running(world) as (process, address):
        await within(worker.connected.wait())
        client = openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)
        world.clients.append(client)
        answer = asyncio.create_task(client.completions.create(model=MODEL, prompt="x", stream=stream))
        request = await worker.submit()
        worker.send(accepted(request), tokens(request, 0, worker.reply[:2]))
        process.send_signal(signal.SIGTERM)
        await log_line(process, "gateway is shutting down")
        async with world.session().get(f"http://{address}/readyz") as ready:
            assert ready.status == 503 and "shutting down" in await ready.text()
        with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
            await client.completions.create(model=MODEL, prompt="x")
        assert (caught.value.status_code, caught.value.response.headers["Retry-After"]) == (503, "1")
        worker.send(tokens(request, 2, worker.reply[2:]), finished(request))
        result: Any = await within(answer)
        parts = [c.choices[0].text async for c in result] if stream else [result.choices[0].text]
        assert "".join(parts) == "Hello world!"
        assert await within(process.wait()) == 0


async def test_a_lame_duck_still_takes_requests(world: World) -> None:
    """Proxies go on sending until they have seen that it is not ready: those requests must not fail."""
    worker = await world.worker(automatic=True)
    await world.operator.publish((worker, "SERVING"))
    async with running(world, "--lame-duck-s", "2") as (process, address):
        await within(worker.connected.wait())
        client = openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)
        world.clients.append(client)
        process.send_signal(signal.SIGTERM)
        await log_line(process, "gateway is shutting down")
        async with world.session().get(f"http://{address}/readyz") as ready:
            assert ready.status == 503 and ready.headers["Connection"] == "close"
        late = await within(client.completions.create(model=MODEL, prompt="x"))
        assert late.choices[0].text == "Hello world!"
        assert await within(process.wait()) == 0


async def test_sigterm_ends_what_does_not_finish(world: World) -> None:
    worker = await world.worker(automatic=False)
    await world.operator.publish((worker, "SERVING"))
    async with running(world, "--drain-grace-s", "0.2") as (process, address):
        await within(worker.connected.wait())
        client = openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)
        world.clients.append(client)
        answer = asyncio.create_task(client.completions.create(model=MODEL, prompt="x"))
        await worker.submit()
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            await within(answer)
        assert await within(process.wait()) == 0


async def test_port_in_use_is_one_sentence(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        process = await spawn(world, "--listen", listen)
        _, errors = await within(process.communicate())
    assert process.returncode == 2
    assert re.fullmatch(f"layercast-gateway: --listen {listen}: the port is in use.\n", errors.decode())


async def test_wrong_setting_is_one_sentence(world: World) -> None:
    process = await spawn(world)
    _, errors = await within(process.communicate())
    assert process.returncode == 2
    assert errors.decode().startswith("layercast-gateway: --listen ") and errors.count(b"\n") == 1
