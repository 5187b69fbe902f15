"""Plays one list of arrivals against one local cluster under one policy, and writes down what happened."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from bench.live.arrivals import Shape
from bench.live.prompts import PromptBook

from layercast_cli.errors import ClusterError
from layercast_cli.local import LocalCluster
from layercast_cli.model import float32_bytes, reserve_bytes
from layercast_cli.modelfile import document_of
from layercast_cli.programs import ClusterSettings
from layercast_cli.records import RequestRecord, Sample
from layercast_cli.shares import usable_cores
from layercast_cli.status import Scale
from layercast_cli.traffic import Traffic
from layercast_cli.watch import Watch

MODEL = "bench"
READY_DEADLINE_S = 180.0
REQUEST_DEADLINE_S = 240.0
CALIBRATION_PROMPTS = 12
BATCH_SIZE = 16
CAPACITY_SLOTS = 24
"""Requests at once in the closed loop that finds a replica's capacity: a full batch, and some that wait for it."""
CAPACITY_REQUESTS = 96
COMPUTE = 0.45
"""The part of a small machine's cores that devices compute with. The rest moves parameters, which network cards do
elsewhere, and serves gateway, operator and clients: a device that loads is as fast as one that does not."""
CACHING = ("ttl-cache", "host-cache")
"""Policies that need host memory on every node. The others load from a replica's device, over the link."""
WARM_REQUESTS = 8
SYSTEM = ""
"""A message of the system before each prompt: the template's own would be most of a short prompt."""
SLOTS = 8
"""Requests at once while the answers are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all policies have in common. Rates in bytes a second, 0 is no limit."""

    model_dir: Path
    state_dir: Path
    agents: int
    tokens: int
    """Of an answer, median."""
    tokens_max: int
    context_length: int
    scale_down_s: float
    """How long demand must be low before a replica goes."""
    step_tokens: int = 0
    """Most tokens of one step; 0 is the device's own."""
    link_bytes_per_s: int = 0
    disk_bytes_per_s: int = 0
    host_pool_bytes: int = 1 << 30
    queue_s: tuple[float, float] = (0.5, 1.5)
    """The queue, in seconds of work, below and above which replicas are too many or too few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """One replica at rest: the right answers by prompt, and how fast it is.

    `ttft_s` and `tbt_s` are means of single requests; `prefill_s` is how long a prompt has the device, which sends the
    token and pauses then when it is paced. `capacity` is requests of the median length a second with a full batch.
    `template_tokens` are what the chat template adds to each prompt.
    """

    answers: Mapping[int, str]
    capacity: float
    ttft_s: float
    prefill_s: float
    tbt_s: float
    template_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """One policy's run. `started_at` is when the arrivals began (unix seconds)."""

    policy: str
    started_at: float
    ended_at: float
    requests: tuple[RequestRecord, ...]
    samples: tuple[Sample, ...]
    scales: tuple[Scale, ...]
    handoffs: float


def service(setting: Setting, *, policy: str, replicas: int, highest: int) -> dict[str, Any]:
    """The ModelService of a run. `replicas` == `highest` is a fixed number. Decisions wait until the run begins."""
    spec = {
        # fp32: only there is a greedy answer the same for every batch and every split between replicas.
        "model": {"source": f"file://{setting.model_dir}", "revision": "", "dtype": "float32"},
        "replicas": replicas,
        "scaling": {
            "min": replicas,
            "max": highest,
            "mode": "Recommend",
            "policy": policy,
            "targets": {
                "queueSeconds": {"low": setting.queue_s[0], "high": setting.queue_s[1]},
                "kvUtilization": {"low": 0.75, "high": 0.95},
                "prefillTokensPerSecond": 0,
            },
            "windows": {"scaleDownSeconds": setting.scale_down_s},
        },
        # A few prompts come again and again: known beginnings would make most of the work vanish.
        "serving": {
            "contextLength": setting.context_length,
            "batchSize": BATCH_SIZE,
            "stepTokens": setting.step_tokens,
            "prefixCaching": False,
        },
        "drain": {"graceSeconds": 20},
    }
    return document_of(MODEL, spec)


def cluster(setting: Setting, *, policy: str, replicas: int, highest: int) -> LocalCluster:
    """A cluster with that service; not started."""
    return LocalCluster(
        ClusterSettings(
            state_dir=setting.state_dir,
            services=(service(setting, policy=policy, replicas=replicas, highest=highest),),
            agents=setting.agents,
            link_bytes_per_s=setting.link_bytes_per_s,
            disk_bytes_per_s=setting.disk_bytes_per_s,
            reserve_bytes=reserve_bytes(float32_bytes(setting.model_dir)),
            cpu_share=cpu_share(len(usable_cores()), setting.agents),
            host_pool_bytes=setting.host_pool_bytes if policy in CACHING else 0,
            gateway_flags=("--queue-requests-max", "4096"),
            fresh=True,
        )
    )


def cpu_share(cores: int, agents: int) -> float | None:
    """Of one device, where there are too few cores for one each and one more; None leaves it to the cluster."""
    return round(COMPUTE * cores / agents, 3) if cores <= agents else None


def calibrate(setting: Setting, book: PromptBook) -> Calibration:
    """Measures one replica of a cluster that is otherwise like those of the runs."""
    running = cluster(setting, policy="stop-the-world", replicas=1, highest=1)
    with running:
        running.wait_ready(MODEL, deadline_s=READY_DEADLINE_S)
        return asyncio.run(_calibrate(running, setting, book))


async def _calibrate(running: LocalCluster, setting: Setting, book: PromptBook) -> Calibration:
    async with _session() as session:
        traffic = _traffic(session, running, setting, book)
        everything = range(len(book.texts))
        answers = await traffic.few_at_a_time(everything, phase="answers", concurrency=SLOTS)
        few = everything[:CALIBRATION_PROMPTS]
        single = await traffic.few_at_a_time(few, phase="single", concurrency=1, max_tokens=setting.tokens)
        prompts = await traffic.few_at_a_time(few, phase="prefill", concurrency=1, max_tokens=1)
        many = list(everything) * max(2, math.ceil(CAPACITY_REQUESTS / len(everything)))
        full = await traffic.few_at_a_time(
            many, phase="full", concurrency=CAPACITY_SLOTS, max_tokens=setting.tokens
        )
        template_tokens = await _prompt_tokens(session, running, book.texts[0]) - book.tokens[0]
    broken = [each for each in (*answers, *single, *prompts, *full) if not each.ok]
    if broken:
        raise ClusterError(f"a request of the calibration failed: {broken[0].error}")
    gaps = [gap for each in single for gap in each.tbt_s]
    return Calibration(
        answers={each.prompt: each.text for each in answers},
        capacity=_rate(sorted(each.ended_at for each in full), edge=CAPACITY_SLOTS),
        ttft_s=sum(each.ttft_s or 0.0 for each in single) / len(single),
        # One after the other: the next one waits out the pause.
        prefill_s=1 / _rate(sorted(each.ended_at for each in prompts), edge=1),
        tbt_s=sum(gaps) / max(1, len(gaps)),
        template_tokens=template_tokens,
    )


def _rate(ends: Sequence[float], *, edge: int) -> float:
    """Requests a second between the first and the last `edge` that ended: while as many ran as there should."""
    middle = ends[edge:-edge]
    return (len(middle) - 1) / (middle[-1] - middle[0])


async def _prompt_tokens(session: aiohttp.ClientSession, running: LocalCluster, text: str) -> int:
    """Tokens that the gateway counts for a chat with that one message."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 1}
    async with session.post(f"{running.gateway_url}/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        return int((await answer.json())["usage"]["prompt_tokens"])


def play(
    setting: Setting, book: PromptBook, shape: Shape, *, policy: str, replicas: int, highest: int
) -> Played:
    """One run. Raises ClusterError when a process does not stay up."""
    running = cluster(setting, policy=policy, replicas=replicas, highest=highest)
    with running:
        running.wait_ready(MODEL, deadline_s=READY_DEADLINE_S, serving=replicas)
        return asyncio.run(_play(running, setting, book, shape, policy=policy))


async def _play(
    running: LocalCluster, setting: Setting, book: PromptBook, shape: Shape, *, policy: str
) -> Played:
    async with _session() as session:
        traffic = _traffic(session, running, setting, book)
        watch = Watch(
            session,
            metrics_url=f"{running.gateway_url}/metrics",
            model=MODEL,
            read_status=lambda: running.status(MODEL),
            sent=lambda: traffic.sent,
        )
        # First steps are slow: what they say of a replica's speed is no reason to want another one.
        warm = [turn % len(book.texts) for turn in range(WARM_REQUESTS)]
        await traffic.few_at_a_time(warm, phase="warm", concurrency=2)
        running.edit(MODEL, lambda changed: changed["spec"]["scaling"].update(mode="Auto"))
        looking = asyncio.create_task(watch.run())
        started_at = time.time()
        try:
            await _send(traffic, book, shape, phase=policy)
            await traffic.finish()
            await watch.look()
        finally:
            looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await looking
    problem = running.broken()
    if problem:
        raise ClusterError(problem)
    return Played(
        policy=policy,
        started_at=started_at,
        ended_at=time.time(),
        requests=tuple(
            sorted((r for r in traffic.records if r.phase == policy), key=lambda each: each.index)
        ),
        samples=tuple(watch.samples),
        scales=tuple(watch.scales.values()),
        handoffs=watch.handoffs,
    )


async def _send(traffic: Traffic, book: PromptBook, shape: Shape, *, phase: str) -> None:
    """Each request when its time has come, whether or not earlier ones were answered."""
    began = time.monotonic()
    for turn, arrival in enumerate(shape.arrivals):
        await asyncio.sleep(max(0.0, began + arrival.at_s - time.monotonic()))
        prompt = book.pick(arrival.prompt_tokens, turn)
        traffic.start(prompt, phase=phase, max_tokens=arrival.output_tokens)
    await asyncio.sleep(max(0.0, began + shape.seconds - time.monotonic()))


def _session() -> aiohttp.ClientSession:
    # Each request has its own deadline; aiohttp's default of five minutes in all would only hide it.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)


def _traffic(
    session: aiohttp.ClientSession, running: LocalCluster, setting: Setting, book: PromptBook
) -> Traffic:
    return Traffic(
        session,
        url=running.gateway_url,
        model=MODEL,
        prompts=book.texts,
        max_tokens=setting.tokens_max,
        seed=0,
        requests_max=1 << 20,
        deadline_s=REQUEST_DEADLINE_S,
        system=SYSTEM,
    )
