"""The preflight: when RDMA is used, and the sentence that says why not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from layercast_agent.rdma import MEMLOCK_BYTES_MIN, Fabric, Port, Rdma, judge, look

ACTIVE = Port(device="mlx5_0", number=1, state="ACTIVE")
DOWN = Port(device="mlx5_1", number=1, state="DOWN")
GOOD = Fabric(ports=(ACTIVE, DOWN), memlock_bytes=None, library=True)


def test_everything_is_there() -> None:
    for asked in (Rdma.AUTO, Rdma.REQUIRE):
        verdict = judge(GOOD, asked)
        assert verdict.use and not verdict.loud
        assert verdict.reason == "RDMA by mlx5_0:1"
    assert judge(replace(GOOD, memlock_bytes=MEMLOCK_BYTES_MIN), Rdma.AUTO).use
    assert not judge(GOOD, Rdma.OFF).use


@pytest.mark.parametrize(
    ("fabric", "words"),
    [
        (replace(GOOD, ports=()), "no RDMA device"),
        (replace(GOOD, ports=(DOWN,)), "mlx5_1:1 is DOWN"),
        (replace(GOOD, memlock_bytes=8 << 20), "only 8388608 bytes may be locked"),
        (replace(GOOD, library=False), "NIXL is not installed"),
    ],
)
def test_what_is_missing_is_named_and_loud_when_demanded(fabric: Fabric, words: str) -> None:
    remark, demand = judge(fabric, Rdma.AUTO), judge(fabric, Rdma.REQUIRE)
    assert not remark.use and not demand.use
    assert words in remark.reason and remark.reason == demand.reason
    assert demand.loud and not remark.loud


def test_ports_are_read_as_the_kernel_writes_them(tmp_path: Path) -> None:
    for device, number, state in (("mlx5_1", 1, "1: DOWN"), ("mlx5_0", 2, "4: ACTIVE")):
        folder = tmp_path / device / "ports" / str(number)
        folder.mkdir(parents=True)
        (folder / "state").write_text(state + "\n")
    assert look(tmp_path).ports == (
        Port(device="mlx5_0", number=2, state="ACTIVE"),
        Port(device="mlx5_1", number=1, state="DOWN"),
    )
    assert look(tmp_path / "none").ports == ()
