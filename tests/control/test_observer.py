"""What the observer says of an agent that does not answer."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, cast

import pytest

from layercast_operator.agents import AgentCalls
from layercast_operator.errors import AgentCallError
from layercast_operator.metrics import Metrics
from layercast_operator.observer import PROBLEMS_MAX, Observer, ObserverLimits

CLOSED = ("the connection was closed", "CANCELLED")
FOREIGN = ("CERTIFICATE_VERIFY_FAILED", "UNAVAILABLE")


class FailingCalls:
    """Polls that fail for the given reasons in turn, the last one for ever; some polls later they are `over`."""

    def __init__(self, *problems: tuple[str, str]) -> None:
        self.problems = list(problems)
        self.polls = 0
        self.over = asyncio.Event()

    async def set_addresses(self, agents: object) -> None:
        """There is nothing to connect to."""

    async def get_status(self, node: str, **_: object) -> Any:
        problem, code = self.problems[min(self.polls, len(self.problems) - 1)]
        self.polls += 1
        if self.polls == len(self.problems) + 3:
            self.over.set()
        raise AgentCallError(problem, node=node, code=code)


async def told(caplog: pytest.LogCaptureFixture, *problems: tuple[str, str]) -> list[str]:
    """What the log says of an agent, some polls after the last new problem."""
    calls = FailingCalls(*problems)
    observer = Observer(
        calls=cast(AgentCalls, calls),
        metrics=Metrics(),
        clock=time.monotonic,
        wake=asyncio.Event(),
        limits=ObserverLimits(poll_s=0.001),
    )
    with caplog.at_level(logging.WARNING, logger="layercast_operator.observer"):
        await observer.set_cluster({"node-1": "127.0.0.1:1"}, ())
        async with asyncio.timeout(10):
            await calls.over.wait()
        await observer.close()
    return [record.__dict__["problem"] for record in caplog.records]


async def test_each_problem_of_a_silence_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """An agent was replaced by a foreign one while it was asked: what has to be mended is the second problem."""
    lines = await told(caplog, CLOSED, FOREIGN, CLOSED, FOREIGN)
    assert lines == [f"node-1: {problem} ({code})" for problem, code in (CLOSED, FOREIGN)]


async def test_a_problem_that_is_always_another_does_not_fill_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines = await told(caplog, *((f"problem {n}", "UNKNOWN") for n in range(3 * PROBLEMS_MAX)))
    assert lines == [f"node-1: problem {n} (UNKNOWN)" for n in range(PROBLEMS_MAX)]
