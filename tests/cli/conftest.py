"""A made-up run with known numbers, and the status files of a made-up cluster."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from layercast_cli.records import (
    BURST,
    LOW,
    REFERENCE,
    STEADY,
    DemoRecord,
    ReplicaSample,
    RequestRecord,
    Sample,
)
from layercast_cli.status import Scale, ScaleReplica

ZERO = 1_700_000_000.0
LAYERS = 30
DECIDED, FIRST_TOKEN, COMPLETE = 53.0, 54.5, 61.0


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short one: clusters keep Unix sockets in it, whose paths have room for 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="lc-") as folder:
        yield Path(folder)


def make_request(index: int, *, phase: str, at: float, ttft_s: float, **changes: Any) -> RequestRecord:
    token_at = tuple(ZERO + at + ttft_s + 0.05 * step for step in range(4))
    values: dict[str, Any] = {
        "index": index,
        "phase": phase,
        "prompt": index % 3,
        "sent_at": ZERO + at,
        "ended_at": token_at[-1] + 0.01,
        "token_at": token_at,
        "text": f"answer {index % 3}",
        "finish_reason": "length",
    }
    return RequestRecord(**(values | changes))


def make_scale() -> Scale:
    def replica(number: int, late_s: float) -> ScaleReplica:
        return ScaleReplica(
            replica_id=f"smollm2-{number}",
            node=f"node-{number}",
            source=f"node-{number - 1}/cpu:0",
            assigned_at=ZERO + DECIDED + 0.05,
            first_segment_at=ZERO + DECIDED + 0.4 + late_s,
            first_layer_at=ZERO + DECIDED + 0.6 + late_s,
            first_token_at=ZERO + FIRST_TOKEN + late_s,
            complete_at=ZERO + COMPLETE + late_s,
            bytes_per_s=67.5e6,
        )

    return Scale(
        decided_at=ZERO + DECIDED,
        replicas_from=1,
        replicas_to=3,
        reason="3.4 s of prompts wait, at most 3.0 s are allowed",
        rule="queue-seconds",
        policy="live",
        replicas=(replica(1, 0.0), replica(2, 0.5)),
    )


def make_sample(at: float) -> Sample:
    def layers(begin: float, end: float, gone: float) -> int:
        if at < begin or at >= gone:
            return 0
        return min(LAYERS, int(LAYERS * (at - begin) / (end - begin)))

    spans = ((-9.0, -1.0, 999.0), (DECIDED, COMPLETE, 110.0), (DECIDED, COMPLETE + 0.5, 98.0))
    replicas = tuple(
        ReplicaSample(
            replica_id=f"smollm2-{number}",
            node=f"node-{number}",
            state="serving" if layers(*span) == LAYERS else "live",
            layers_resident=layers(*span),
            layers_total=LAYERS,
            source="" if number == 0 else f"node-{number - 1}/cpu:0",
            bytes_per_s=67.5e6,
        )
        for number, span in enumerate(spans)
        if span[0] <= at < span[2]
    )
    queue = max(0.0, (at - 50) * 1.4) if at < 60 else max(0.0, 14 - (at - 60) * 1.5)
    serving = sum(1 for each in replicas if each.layers_resident == LAYERS)
    return Sample(
        at=ZERO + at,
        phase=STEADY,
        sent=0,
        requests_waiting=float(int(queue)),
        requests_in_flight=float(int(queue) + 2),
        handoffs=max(0.0, min(11.0, at - DECIDED)),
        desired=3 if at >= DECIDED else 1,
        serving=serving,
        replicas=replicas,
    )


@pytest.fixture
def run() -> DemoRecord:
    """1 → 3 replicas, decided 53 s after the first request, first token 1.5 s and complete 8 s later."""
    chance = random.Random(7)
    requests: list[RequestRecord] = []

    def send(phase: str, begin: float, end: float, rate: float, slow: float) -> None:
        at = begin
        while at < end:
            ttft = 0.4 + chance.random() * 0.4 + slow * max(0.0, min(1.0, (at - 51) / 8))
            requests.append(make_request(len(requests), phase=phase, at=at, ttft_s=ttft))
            at += chance.expovariate(rate)

    send(REFERENCE, 0, 28, 0.8, 0)
    send(STEADY, 28, 50, 0.4, 0)
    send(BURST, 50, 72, 2.5, 5.0)
    send(LOW, 72, 115, 0.3, 0)
    return DemoRecord(
        settings={"policy": "live", "agents": 3, "seed": 1},
        started_at=ZERO - 20,
        ended_at=ZERO + 116,
        capacity=1.0,
        wanted_replicas=3,
        phase_at={REFERENCE: ZERO, STEADY: ZERO + 28, BURST: ZERO + 50, LOW: ZERO + 72},
        reference={0: "answer 0", 1: "answer 1", 2: "answer 2"},
        requests=tuple(requests),
        samples=tuple(make_sample(step / 4) for step in range(464)),
        scales=(make_scale(),),
    )
