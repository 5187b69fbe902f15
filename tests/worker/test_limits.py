"""What a replica's engine may do comes with the request that starts it."""

from __future__ import annotations

import pytest
from tests.worker.conftest import Packed
from tests.worker.inprocess import Worker

pytestmark = [pytest.mark.timeout(60)]


@pytest.mark.parametrize(("told", "used"), [(0, 128), (24, 24)])
async def test_a_step_has_as_many_tokens_as_was_told_or_as_the_device_likes(
    packed: Packed, told: int, used: int
) -> None:
    worker = Worker("w")
    try:
        await worker.start(packed.manifest, packed.files, step_tokens_max=told)
        assert worker.replica.loop.view.step_tokens_max == used
    finally:
        await worker.kill()
