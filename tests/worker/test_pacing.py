"""A CPU share keeps a device at a fixed speed."""

from hypothesis import given
from hypothesis import strategies as st

from layercast_agent.worker.pacing import ComputeShare


def test_a_full_share_never_pauses() -> None:
    assert ComputeShare(1.0).after(cpu_s=5.0, wall_s=5.0) == 0.0


def test_half_a_share_pauses_as_long_as_it_worked() -> None:
    assert ComputeShare(0.5).after(cpu_s=0.1, wall_s=0.1) == 0.1


def test_waiting_for_a_core_counts_as_time_that_passed() -> None:
    share = ComputeShare(0.5)
    assert share.after(cpu_s=0.1, wall_s=0.2) == 0.0


def test_idle_time_is_not_saved_up() -> None:
    share = ComputeShare(0.5)
    share.after(cpu_s=0.0, wall_s=10.0)
    assert share.after(cpu_s=0.1, wall_s=0.1) == 0.1


@given(st.lists(st.floats(0.001, 0.1), min_size=1, max_size=50), st.floats(0.1, 0.9))
def test_the_duty_cycle_is_the_share(turns: list[float], share_of_core: float) -> None:
    share = ComputeShare(share_of_core)
    used = passed = 0.0
    for turn in turns:
        pause = share.after(cpu_s=turn, wall_s=turn)
        share.paused(pause)
        used += turn
        passed += turn + pause
    assert used <= share_of_core * passed * (1 + 1e-6) + share.debt_s + 1e-9 or any(
        turn / share_of_core - turn >= ComputeShare.DEBT_MAX_S for turn in turns
    )
