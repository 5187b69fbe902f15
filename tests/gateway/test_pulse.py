"""The pulse wakes who waits, and never swallows the end of a task."""

from __future__ import annotations

import asyncio

from layercast_gateway.pulse import Pulse


async def _wait_for_ever(pulse: Pulse) -> None:
    while True:
        await pulse.wait(1.0)


async def test_a_cancellation_that_comes_together_with_a_change_is_not_lost() -> None:
    """asyncio.wait_for of Python 3.11 would lose it, and a shutdown would hang."""
    pulse = Pulse()
    task = asyncio.create_task(_wait_for_ever(pulse))
    await asyncio.sleep(0)
    pulse.fire()
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=5)
    assert done == {task}
    assert task.cancelled()


async def test_a_change_wakes_everybody_and_a_timeout_ends_the_wait() -> None:
    pulse = Pulse()
    waiting = [asyncio.create_task(pulse.wait(10.0)) for _ in range(3)]
    await asyncio.sleep(0)
    pulse.fire()
    async with asyncio.timeout(5):
        await asyncio.gather(*waiting)
        await pulse.wait(0.01)
