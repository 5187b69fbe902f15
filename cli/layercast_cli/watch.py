"""Looks at a running cluster a few times a second while the demo runs, and remembers what it saw."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import aiohttp

from layercast_cli.gateway_metrics import GatewayMetrics, parse_metrics
from layercast_cli.records import ReplicaSample, Sample
from layercast_cli.status import ReplicaStatus, Scale, ServiceStatus

INTERVAL_S = 0.25
# More than any run takes: four a second for half an hour.
SAMPLES_MAX = 7200


class Watch:
    """Samples of the operator's status and the gateway's metrics. For one event loop.

    `read_status` reads the status file, `sent` counts requests so far, `broken` tells of dead processes.
    `phase` is set by whoever drives the demand."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        metrics_url: str,
        model: str,
        read_status: Callable[[], ServiceStatus | None],
        sent: Callable[[], int],
        on_sample: Callable[[Sample], None] = lambda _sample: None,
    ) -> None:
        self.phase = ""
        self.samples: list[Sample] = []
        self.scales: dict[float, Scale] = {}
        self.handoffs = 0.0
        self.replays = 0.0
        self._session = session
        self._metrics_url = metrics_url
        self._model = model
        self._read_status = read_status
        self._sent = sent
        self._on_sample = on_sample
        self._changed = asyncio.Condition()

    @property
    def last(self) -> Sample | None:
        """The newest sample."""
        return self.samples[-1] if self.samples else None

    async def run(self) -> None:
        """Looks until cancelled."""
        while len(self.samples) < SAMPLES_MAX:
            await self.look()
            await asyncio.sleep(INTERVAL_S)

    async def look(self) -> Sample:
        """Takes one sample and wakes those who wait."""
        status, metrics = self._read_status(), await self._metrics()
        for scale in status.scales if status is not None else ():
            # Entries fill up while replicas arrive, and old ones fall out of the operator's list: keep the
            # newest.
            self.scales[scale.decided_at] = scale
        if metrics is not None:
            self.handoffs = max(self.handoffs, metrics.handoffs)
            self.replays = max(self.replays, metrics.replays)
        sample = make_sample(time.time(), self.phase, self._sent(), status, metrics)
        self.samples.append(sample)
        self._on_sample(sample)
        async with self._changed:
            self._changed.notify_all()
        return sample

    async def wait_for(self, reached: Callable[[Sample], bool], *, deadline_s: float) -> bool:
        """Waits until a sample has `reached`; False when time is up first."""
        try:
            async with asyncio.timeout(deadline_s), self._changed:
                await self._changed.wait_for(lambda: self.last is not None and reached(self.last))
        except TimeoutError:
            return False
        return True

    async def _metrics(self) -> GatewayMetrics | None:
        try:
            async with (
                asyncio.timeout(2.0),
                self._session.get(self._metrics_url) as response,
            ):
                return parse_metrics(await response.text(), self._model) if response.status == 200 else None
        except (aiohttp.ClientError, OSError, ValueError):
            # TimeoutError is an OSError. The gateway may be restarting: this sample goes without.
            return None


def make_sample(
    at: float, phase: str, sent: int, status: ServiceStatus | None, metrics: GatewayMetrics | None
) -> Sample:
    """What was seen at `at` (unix seconds)."""
    return Sample(
        at=at,
        phase=phase,
        sent=sent,
        requests_waiting=metrics.requests_waiting if metrics is not None else None,
        requests_in_flight=metrics.requests_in_flight if metrics is not None else None,
        handoffs=metrics.handoffs if metrics is not None else None,
        desired=status.desired if status is not None else 0,
        serving=status.serving if status is not None else 0,
        replicas=tuple(_replica(each) for each in status.replicas) if status is not None else (),
    )


def _replica(status: ReplicaStatus) -> ReplicaSample:
    return ReplicaSample(
        replica_id=status.replica_id,
        node=status.node,
        state=status.state,
        layers_resident=status.layers_resident,
        layers_total=status.layers_total,
        source=status.source,
        bytes_per_s=status.bytes_per_s,
    )
