"""When a worker counts as warming, usable, silent or hung, and how long a dead one rests before its restart.

Pure: values in, a verdict out; `workers` does what it says.
"""

from __future__ import annotations

from dataclasses import dataclass

from layercast.agent.v1alpha1 import agent_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """How patient an agent is with its workers."""

    poll_interval_s: float = 0.1
    """Pause between two questions for a worker's status."""

    idle_interval_s: float = 5.0
    """The same while a warm worker has no replica: nothing changes there but by command, or by its end."""

    poll_deadline_s: float = 1.0
    """How long one answer may take."""

    silent_s: float = 5.0
    """A warm worker that is silent for this long is shown as dead."""

    hung_s: float = 30.0
    """One that is silent for this long is killed and started again."""

    warming_s: float = 180.0
    """How long imports and first kernels may take before the worker is killed and started again."""

    restart_delay_s: float = 0.2
    """Pause before the first restart; doubled by each further death."""

    restart_delay_max_s: float = 30.0
    """Longest pause between restarts."""

    healthy_s: float = 60.0
    """A life of this length forgets the deaths before it."""

    log_bytes_max: int = 16 * 1024 * 1024
    """A log that is larger when a worker starts is moved aside (one older file is kept)."""


DEFAULT_LIMITS = WorkerLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a living process is taken for."""

    state: agent_pb2.WorkerState.ValueType
    error: str = ""
    kill: bool = False


def judge(*, warm: bool, assigned: bool, age_s: float, silent_s: float, limits: WorkerLimits) -> Verdict:
    """Whether a running worker is warming, usable, silent or hung.

    `age_s` is the time since its start; `silent_s` is the time spent since its last answer on questions that
    it did not answer. The latter does not grow while the agent itself is stopped: a paused machine kills nobody.
    """
    if not warm:
        if age_s > limits.warming_s:
            reason = f"worker is not warm after {limits.warming_s:g} s"
            return Verdict(state=agent_pb2.WORKER_STATE_DEAD, error=reason, kill=True)
        return Verdict(state=agent_pb2.WORKER_STATE_WARMING)
    if silent_s > limits.silent_s:
        reason = f"worker has not answered for {silent_s:.1f} s"
        return Verdict(state=agent_pb2.WORKER_STATE_DEAD, error=reason, kill=silent_s > limits.hung_s)
    return Verdict(state=agent_pb2.WORKER_STATE_ASSIGNED if assigned else agent_pb2.WORKER_STATE_IDLE)


def restart_delay_s(deaths: int, limits: WorkerLimits) -> float:
    """Pause before the restart after `deaths` deaths in a row (1 or more): doubled each time, bounded."""
    return min(limits.restart_delay_max_s, limits.restart_delay_s * 2.0 ** min(deaths - 1, 30))


def describe_exit(returncode: int) -> str:
    """How a process ended, in words."""
    return f"worker died: signal {-returncode}" if returncode < 0 else f"worker exited with code {returncode}"
