"""Demand for the demo: real prompts through the OpenAI HTTP API, streamed, each token's arrival written down.

Open loop: requests are sent when their time has come, whether or not earlier ones are answered, as real
users do. Arrivals are a Poisson process from a fixed seed, so two runs ask the same questions at the same
moments."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import aiohttp

from layercast_cli.records import RequestRecord

DONE = "[DONE]"
SSE_DATA = b"data:"
ERROR_BODY_CHARS = 200
# How late a phase may notice that it shall end.
STOP_INTERVAL_S = 0.1


class AnswerError(Exception):
    """The server answered something that is not the whole answer; the text says what."""


class Traffic:
    """Sends requests to one model of one gateway and keeps a record of each. For one event loop."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        url: str,
        model: str,
        prompts: Sequence[str],
        max_tokens: int,
        seed: int,
        requests_max: int,
        in_flight_max: int = 256,
        deadline_s: float = 120.0,
        system: str | None = None,
    ) -> None:
        """`requests_max` bounds all requests of this object together, `deadline_s` each of them.

        `system` is the system message before each prompt; None leaves it to the model's chat template.
        """
        self.records: list[RequestRecord] = []
        self.sent = 0
        self._session = session
        self._url = f"{url}/v1/chat/completions"
        self._model = model
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._random = random.Random(seed)
        self._order: list[int] = []
        self._requests_max = requests_max
        self._room = asyncio.Semaphore(in_flight_max)
        self._deadline_s = deadline_s
        self._before = [] if system is None else [{"role": "system", "content": system}]
        self._tasks: set[asyncio.Task[RequestRecord]] = set()

    @property
    def in_flight(self) -> int:
        """Requests that have been sent and not yet ended."""
        return self.sent - len(self.records)

    async def ask(self, prompt: int, *, phase: str, max_tokens: int | None = None) -> RequestRecord:
        """Sends one request and waits for its end; a failure is a record with an error, never an
        exception."""
        index, self.sent = self.sent, self.sent + 1
        sent_at = time.time()
        token_at: list[float] = []
        pieces: list[str] = []
        finish, error = "", ""
        try:
            async with asyncio.timeout(self._deadline_s):
                async for text, reason in self._stream(self._body(prompt, max_tokens or self._max_tokens)):
                    if text:
                        token_at.append(time.time())
                        pieces.append(text)
                    finish = reason or finish
            error = "" if finish else "the stream ended before the answer did"
        except TimeoutError:
            error = f"no complete answer within {self._deadline_s:.0f} s"
        except (AnswerError, aiohttp.ClientError, OSError, ValueError) as problem:
            error = f"{type(problem).__name__}: {problem}"
        record = RequestRecord(
            index=index,
            phase=phase,
            prompt=prompt,
            sent_at=sent_at,
            ended_at=time.time(),
            token_at=tuple(token_at),
            text="".join(pieces),
            finish_reason=finish,
            error=error,
        )
        self.records.append(record)
        return record

    async def few_at_a_time(
        self, prompts: Sequence[int], *, phase: str, concurrency: int, max_tokens: int | None = None
    ) -> list[RequestRecord]:
        """Asks each of `prompts` once, at most `concurrency` together; the records in the order of
        `prompts`."""
        room = asyncio.Semaphore(concurrency)

        async def one(prompt: int) -> RequestRecord:
            async with room:
                return await self.ask(prompt, phase=phase, max_tokens=max_tokens)

        return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))

    async def poisson(
        self, *, phase: str, rate: float, seconds: float, stop: Callable[[], bool] = lambda: False
    ) -> int:
        """Sends `rate` requests a second for `seconds`, or until `stop()` or the bound on requests.

        Returns how many were sent; does not wait for their answers (see `finish`).
        """
        started, count, due = time.monotonic(), 0, 0.0
        while self.sent < self._requests_max and not stop():
            due += self._random.expovariate(rate)
            if due > seconds:
                break
            if not await _until(started + due, stop=stop):
                break
            await self._room.acquire()
            self.start(self._next_prompt(), phase=phase).add_done_callback(lambda _: self._room.release())
            # The task has not run yet: `sent` counts it only once it has.
            await asyncio.sleep(0)
            count += 1
        await _until(started + seconds, stop=stop)
        return count

    def start(self, prompt: int, *, phase: str, max_tokens: int | None = None) -> asyncio.Task[RequestRecord]:
        """Sends one request without waiting for it (see `finish`)."""
        task = asyncio.create_task(self.ask(prompt, phase=phase, max_tokens=max_tokens))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def finish(self) -> None:
        """Waits until every request has ended; bounded, for each request is."""
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    def _next_prompt(self) -> int:
        """Every prompt once in shuffled order, then again in another order."""
        if not self._order:
            self._order = list(range(len(self._prompts)))
            self._random.shuffle(self._order)
        return self._order.pop()

    def _body(self, prompt: int, max_tokens: int) -> dict[str, Any]:
        return {
            "model": self._model,
            "messages": [*self._before, {"role": "user", "content": self._prompts[prompt]}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "stream": True,
        }

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[tuple[str, str]]:
        """(text, finish reason) of each event, both may be empty."""
        async with self._session.post(self._url, json=body) as response:
            if response.status != 200:
                words = (await response.text())[:ERROR_BODY_CHARS]
                raise AnswerError(f"HTTP {response.status}: {words}")
            async for line in response.content:
                if not line.startswith(SSE_DATA):
                    continue
                data = line.removeprefix(SSE_DATA).strip().decode()
                if data == DONE:
                    return
                yield parse_event(data)
        raise AnswerError("the connection ended before the answer did")


async def _until(moment: float, *, stop: Callable[[], bool]) -> bool:
    """Waits for `moment` (monotonic seconds) or `stop()`; True when the moment came first."""
    while (left := moment - time.monotonic()) > 0:
        if stop():
            return False
        await asyncio.sleep(min(left, STOP_INTERVAL_S))
    return not stop()


def parse_event(data: str) -> tuple[str, str]:
    """(text, finish reason) of one `chat.completion.chunk`; AnswerError when the server reports an error."""
    event = json.loads(data)
    if "error" in event:
        raise AnswerError(str(event["error"].get("message", event["error"])))
    choices = event.get("choices") or []
    if not choices:
        return "", ""
    text = (choices[0].get("delta") or {}).get("content") or ""
    return str(text), str(choices[0].get("finish_reason") or "")
