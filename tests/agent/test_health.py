"""The verdicts on a worker, and the rest before its restart, as tables."""

from __future__ import annotations

import pytest
from layercast.agent.v1alpha1 import agent_pb2 as pb

from layercast_agent.health import WorkerLimits, describe_exit, judge, restart_delay_s

LIMITS = WorkerLimits(silent_s=5, hung_s=30, warming_s=180, restart_delay_s=0.2, restart_delay_max_s=30)


@pytest.mark.parametrize(
    ("warm", "assigned", "age_s", "silent_s", "state", "error", "kill"),
    [
        (False, False, 0, 0, pb.WORKER_STATE_WARMING, "", False),
        (False, False, 180, 100, pb.WORKER_STATE_WARMING, "", False),
        (False, False, 181, 0, pb.WORKER_STATE_DEAD, "worker is not warm after 180 s", True),
        (True, False, 9, 0, pb.WORKER_STATE_IDLE, "", False),
        (True, True, 9, 5, pb.WORKER_STATE_ASSIGNED, "", False),
        (True, True, 99, 5.1, pb.WORKER_STATE_DEAD, "worker has not answered for 5.1 s", False),
        (True, False, 99, 31, pb.WORKER_STATE_DEAD, "worker has not answered for 31.0 s", True),
    ],
)
def test_verdicts(
    *,
    warm: bool,
    assigned: bool,
    age_s: float,
    silent_s: float,
    state: pb.WorkerState.ValueType,
    error: str,
    kill: bool,
) -> None:
    verdict = judge(warm=warm, assigned=assigned, age_s=age_s, silent_s=silent_s, limits=LIMITS)
    assert (verdict.state, verdict.error, verdict.kill) == (state, error, kill)


def test_rest_before_a_restart_doubles_and_is_bounded() -> None:
    rests = [restart_delay_s(deaths, LIMITS) for deaths in (1, 2, 3, 4, 8, 9, 10_000)]
    assert rests == pytest.approx([0.2, 0.4, 0.8, 1.6, 25.6, 30, 30])


def test_exits_in_words() -> None:
    assert describe_exit(-9) == "worker died: signal 9"
    assert describe_exit(3) == "worker exited with code 3"
