"""How soon a service without a replica answers, when k receivers load different parts first and serve together.

    python -m bench.zero [--load-s 30] [--receivers 2,3]

Real processes on this machine: operator, gateway, agents with one worker each. Every agent has SmolLM2-135M-Instruct in
fp32 on its own disk, which is slowed down so that one complete load takes `--load-s` (`layercast-agent
--disk-bytes-per-s`). The service is at zero; then k replicas are asked for and requests arrive at the same moment.

`load` is measured in the same way with one replica and the policy stop-the-world: from the wish to the last byte.
`first token` is from the wish to the first piece of text that a client sees. Answers are compared with those of the one
complete replica. Prints a table; the last line is JSON. What was proposed for λScale (arXiv 2502.09922, k-way
transmission and execution pipelines): after 1/k of the load the receivers together have the model.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from layercast.agent.v1alpha1 import agent_pb2, agent_pb2_grpc

from bench import report
from layercast_cli.demo import sigterm_interrupts
from layercast_cli.errors import CliError, ClusterError
from layercast_cli.local import LocalCluster
from layercast_cli.model import ensure_model, float32_bytes
from layercast_cli.modelfile import document_of
from layercast_cli.programs import ClusterSettings
from layercast_cli.settings import default_model_dir
from layercast_cli.traffic import Traffic

MODEL = "zero"
DEADLINE_S = 180.0
LOOK_S = 0.02
PROMPTS = (
    "Count the planets of the solar system and name the largest one.",
    "Which animals live in the sea and breathe air?",
    "Write two sentences about a ship at night.",
    "What is the sum of seven and eight?",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start from zero; seconds since the replicas were asked for."""

    receivers: int
    policy: str
    first_token_s: float
    first_complete_s: float
    last_complete_s: float
    answers: tuple[str, ...]


def service(model_dir: Path, *, policy: str) -> dict[str, Any]:
    """A service at zero. Its bounds leave the number to whoever edits it."""
    spec = {
        "model": {"source": f"file://{model_dir}", "revision": "", "dtype": "float32"},
        "replicas": 1,
        "serving": {"contextLength": 512, "batchSize": 16},
        "drain": {"graceSeconds": 1},
    }
    return document_of(MODEL, spec)


def measure(settings: ClusterSettings, *, receivers: int, policy: str, tokens: int) -> Start:
    """One cluster, warm, at zero; then `receivers` replicas. Raises ClusterError."""
    with LocalCluster(settings) as running:
        running.wait_ready(MODEL, deadline_s=DEADLINE_S)
        asyncio.run(_ask(running, prompts=PROMPTS[:1], tokens=2))
        _scale(running, 0)
        running.wait(MODEL, lambda status: not status.replicas, deadline_s=DEADLINE_S, what="come to zero")
        asyncio.run(_on_every_disk(running))
        return asyncio.run(_start(running, receivers=receivers, policy=policy, tokens=tokens))


def _scale(running: LocalCluster, replicas: int) -> None:
    running.edit(MODEL, lambda document: document["spec"].update(replicas=replicas))


async def _on_every_disk(running: LocalCluster) -> None:
    """Until every agent tells that its disk has the checkpoint."""
    assert running.layout is not None
    deadline = time.monotonic() + DEADLINE_S
    for node in running.layout.nodes:
        async with grpc.aio.insecure_channel(node.address) as channel:
            stub = agent_pb2_grpc.AgentServiceStub(channel)
            while True:
                answer = await stub.GetStatus(agent_pb2.GetStatusRequest(), timeout=5)
                if any(checkpoint.on_disk for checkpoint in answer.checkpoints):
                    break
                if time.monotonic() > deadline:
                    raise ClusterError(f"{node.name} did not pack the checkpoint")
                await asyncio.sleep(0.2)


async def _start(running: LocalCluster, *, receivers: int, policy: str, tokens: int) -> Start:
    began = time.time()
    _scale(running, receivers)
    asking = asyncio.create_task(_ask(running, prompts=PROMPTS, tokens=tokens))
    complete: dict[str, float] = {}
    while len(complete) < receivers:
        status = running.status(MODEL)
        for replica in status.replicas if status is not None else ():
            if replica.state.lower() == "serving":
                complete.setdefault(replica.replica_id, time.time() - began)
        if time.time() - began > DEADLINE_S or running.broken():
            raise ClusterError(f"the replicas did not become complete; {running.broken()}")
        await asyncio.sleep(LOOK_S)
    records = await asking
    first = min(record.token_at[0] for record in records) - began
    return Start(
        receivers=receivers,
        policy=policy,
        first_token_s=first,
        first_complete_s=min(complete.values()),
        last_complete_s=max(complete.values()),
        answers=tuple(record.text for record in records),
    )


async def _ask(running: LocalCluster, *, prompts: Sequence[str], tokens: int) -> list[Any]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        traffic = Traffic(
            session,
            url=running.gateway_url,
            model=MODEL,
            prompts=prompts,
            max_tokens=tokens,
            seed=0,
            requests_max=1000,
            deadline_s=DEADLINE_S,
        )
        records = await traffic.few_at_a_time(range(len(prompts)), phase="zero", concurrency=len(prompts))
    broken = [record.error for record in records if not record.ok]
    if broken:
        raise ClusterError(f"a request failed: {broken[0]}")
    return records


def run(flags: argparse.Namespace) -> dict[str, object]:
    """The table; what the JSON line has."""
    model_dir = ensure_model(flags.model_dir, report=print)
    rate = round(float32_bytes(model_dir) / flags.load_s)
    print(report.hardware())
    print(
        f"SmolLM2-135M-Instruct in fp32, each disk at {rate / 1e6:.1f} MB/s, {len(PROMPTS)} requests at once"
    )
    plans = [(1, "stop-the-world"), *((k, "live") for k in flags.receivers)]
    starts = []
    for receivers, policy in plans:
        settings = ClusterSettings(
            state_dir=flags.state_dir / f"{receivers}",
            services=(service(model_dir, policy=policy),),
            agents=receivers,
            policy=policy,
            disk_bytes_per_s=rate,
            host_pool_bytes=0,
        )
        starts.append(measure(settings, receivers=receivers, policy=policy, tokens=flags.tokens))
    alone = starts[0]
    rows = [
        [
            f"{start.receivers}, {start.policy}",
            *(f"{s:.2f}" for s in (start.first_token_s, start.first_complete_s, start.last_complete_s)),
            f"{start.first_token_s / alone.first_complete_s:.2f}",
            str(sum(a != b for a, b in zip(start.answers, alone.answers, strict=True))),
        ]
        for start in starts
    ]
    header = [
        "receivers",
        "first token s",
        "first complete s",
        "last complete s",
        "of the load",
        "mismatched",
    ]
    print(report.table(header, rows))
    values: dict[str, object] = {"load_s": alone.first_complete_s}
    for start in starts[1:]:
        values[f"first_token_over_load_k{start.receivers}"] = start.first_token_s / alone.first_complete_s
    values["mismatched"] = sum(int(row[-1]) for row in rows)
    return values


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 1 when an answer differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.zero", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--load-s", type=float, default=30.0, help="how long one complete load takes (%(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each answer (%(default)s)")
    parser.add_argument(
        "--receivers",
        default=(2, 3),
        type=lambda text: tuple(int(part) for part in text.split(",")),
        help="numbers of receivers (2,3)",
    )
    parser.add_argument("--model-dir", type=Path, default=default_model_dir())
    parser.add_argument("--state-dir", type=Path, default=Path("out/zero"))
    flags = parser.parse_args(arguments)
    try:
        with sigterm_interrupts():
            values = run(flags)
    except CliError as error:
        print(error, file=sys.stderr)
        return 2
    print(report.last_line(values))
    return 1 if values["mismatched"] else 0


if __name__ == "__main__":
    sys.exit(main())
