"""The demo's demand: reference answers at rest, a steady stream, a burst, then little until the policy has shrunk.

Drives a running cluster from outside, as clients would, and returns the record of all that happened.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from layercast_cli.errors import ClusterError
from layercast_cli.local import LocalCluster
from layercast_cli.prompts import PROMPTS
from layercast_cli.records import BURST, LOW, REFERENCE, STEADY, DemoRecord, Sample
from layercast_cli.traffic import Traffic
from layercast_cli.watch import Watch


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandPlan:
    """How much is asked, when. Rates are multiples of one replica's measured capacity.

    `burst_tail_s` is how long the burst goes on after all wanted replicas serve. The burst ends early then, and the
    low phase when one replica is left; `..._s_max` bound both.
    """

    reference_concurrency: int = 4
    steady_s: float = 20.0
    steady_rate: float = 0.4
    burst_s_max: float = 42.0
    burst_rate: float = 4.0
    burst_tail_s: float = 5.0
    low_s_max: float = 58.0
    low_rate: float = 0.3
    requests_max: int = 400
    request_deadline_s: float = 120.0


# Fewer requests than this a second show nothing on a slow machine, more teach nothing on a fast one.
RATE_MIN, RATE_MAX = 0.1, 20.0


def demand_plan(seconds: float) -> DemandPlan:
    """The phases of a run with `seconds` of demand."""
    return DemandPlan(steady_s=seconds / 6, burst_s_max=seconds * 0.35, low_s_max=seconds / 2)


def rate_of(capacity: float, share: float) -> float:
    """Requests a second: `share` of `capacity`, within what is useful to show."""
    return min(RATE_MAX, max(RATE_MIN, capacity * share))


@dataclass(slots=True, kw_only=True)
class Drive:
    """One run of the demand against one cluster."""

    cluster: LocalCluster
    model: str
    plan: DemandPlan
    wanted_replicas: int
    seed: int
    max_tokens: int
    settings: Mapping[str, Any]
    on_sample: Callable[[Sample, Traffic], None]

    async def run(self) -> DemoRecord:
        """All phases. Raises ClusterError when a process does not stay up."""
        started_at = time.time()
        connector = aiohttp.TCPConnector(limit=0)
        # Each request has its own deadline; aiohttp's default of five minutes in all would only hide it.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            traffic = self._traffic(session)
            watch = self._watch(session, traffic)
            try:
                async with asyncio.TaskGroup() as group:
                    looking = group.create_task(watch.run())
                    record = await self._phases(traffic, watch, started_at)
                    looking.cancel()
            except* ClusterError as problems:
                raise ClusterError(str(problems.exceptions[0])) from problems
        return record

    async def _phases(self, traffic: Traffic, watch: Watch, started_at: float) -> DemoRecord:
        phase_at: dict[str, float] = {}

        def begin(phase: str) -> None:
            watch.phase = phase
            phase_at[phase] = time.time()

        begin(REFERENCE)
        reference, capacity = await self._reference(traffic)
        self.cluster.edit(self.model, start_scaling)
        begin(STEADY)
        steady = rate_of(capacity, self.plan.steady_rate)
        await traffic.poisson(phase=STEADY, rate=steady, seconds=self.plan.steady_s)
        begin(BURST)
        await self._burst(traffic, watch, capacity)
        begin(LOW)
        low = rate_of(capacity, self.plan.low_rate)
        await traffic.poisson(
            phase=LOW, rate=low, seconds=self.plan.low_s_max, stop=lambda: shrunk(watch.last)
        )
        await traffic.finish()
        await watch.look()
        return DemoRecord(
            settings=self.settings,
            started_at=started_at,
            ended_at=time.time(),
            capacity=capacity,
            wanted_replicas=self.wanted_replicas,
            phase_at=phase_at,
            reference=reference,
            requests=tuple(sorted(traffic.records, key=lambda each: each.index)),
            samples=tuple(watch.samples),
            scales=tuple(watch.scales.values()),
        )

    async def _reference(self, traffic: Traffic) -> tuple[dict[int, str], float]:
        """(answer by prompt, requests a second of one replica)."""
        began = time.monotonic()
        records = await traffic.few_at_a_time(
            range(len(PROMPTS)), phase=REFERENCE, concurrency=self.plan.reference_concurrency
        )
        elapsed = time.monotonic() - began
        answers = {each.prompt: each.text for each in records if each.ok}
        if not answers:
            raise ClusterError(f"no reference answer came back; the first request said: {records[0].error}")
        return answers, len(answers) / elapsed

    async def _burst(self, traffic: Traffic, watch: Watch, capacity: float) -> None:
        """More than one replica can serve, until all wanted replicas have served for a while."""
        reached_at: float | None = None

        def enough() -> bool:
            nonlocal reached_at
            sample = watch.last
            if reached_at is None and sample is not None and sample.serving >= self.wanted_replicas:
                reached_at = time.monotonic()
            return reached_at is not None and time.monotonic() - reached_at >= self.plan.burst_tail_s

        rate = rate_of(capacity, self.plan.burst_rate)
        await traffic.poisson(phase=BURST, rate=rate, seconds=self.plan.burst_s_max, stop=enough)

    def _traffic(self, session: aiohttp.ClientSession) -> Traffic:
        return Traffic(
            session,
            url=self.cluster.gateway_url,
            model=self.model,
            prompts=PROMPTS,
            max_tokens=self.max_tokens,
            seed=self.seed,
            requests_max=self.plan.requests_max,
            deadline_s=self.plan.request_deadline_s,
        )

    def _watch(self, session: aiohttp.ClientSession, traffic: Traffic) -> Watch:
        def on_sample(sample: Sample) -> None:
            problem = self.cluster.broken()
            if problem:
                raise ClusterError(problem)
            self.on_sample(sample, traffic)

        return Watch(
            session,
            metrics_url=f"{self.cluster.gateway_url}/metrics",
            model=self.model,
            read_status=lambda: self.cluster.status(self.model),
            sent=lambda: traffic.sent,
            on_sample=on_sample,
        )


def start_scaling(service: dict[str, Any]) -> None:
    """Lets the policy act: while the reference answers were made it only recommended."""
    service["spec"]["scaling"]["mode"] = "Auto"


def shrunk(sample: Sample | None) -> bool:
    """One replica is left and no other is on its way or leaving."""
    return sample is not None and sample.serving == 1 and sample.desired == 1 and len(sample.replicas) == 1
