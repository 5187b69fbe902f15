"""/metrics, /healthz and /readyz of an agent, each answered from one observation of the node.

A thread serves HTTP and asks the asyncio thread for the status; so a scrape sees one consistent moment, and an
agent whose asyncio thread hangs is not healthy. Counters are kept where they are counted and read here.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from layercast.agent.v1alpha1 import agent_pb2 as pb
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)

ANSWER_S = 2.0
"""How long the asyncio thread may take; shorter than every scraper's and probe's own limit."""

SHUTDOWN_POLL_S = 0.5

USABLE = (pb.WORKER_STATE_IDLE, pb.WORKER_STATE_ASSIGNED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One moment of the node."""

    status: pb.GetStatusResponse
    restarts: Mapping[str, int]
    """Restarts of the worker of each device since the agent's start."""

    certificate_expires_at: float | None = None
    """Unix seconds; None without TLS."""


def ready(status: pb.GetStatusResponse) -> bool:
    """Whether the node can take a replica or has one: at least one worker is warm and answers."""
    return any(device.worker_state in USABLE for device in status.devices)


def families(seen: Observation) -> Iterator[Metric]:
    """What an observation says in metrics."""
    restarts = CounterMetricFamily(
        "layercast_agent_worker_restarts", "Workers started again after their end.", labels=["device"]
    )
    for device_id, count in seen.restarts.items():
        restarts.add_metric([device_id], count)
    yield restarts
    yield _by_state(
        "layercast_agent_workers",
        "Workers by state.",
        pb.WorkerState,
        Counter(device.worker_state for device in seen.status.devices),
    )
    yield _by_state(
        "layercast_agent_replicas",
        "Replicas by state.",
        pb.ReplicaState,
        Counter(replica.state for replica in seen.status.replicas),
    )
    yield _by_state(
        "layercast_agent_checkpoints",
        "Checkpoints by state.",
        pb.CheckpointState,
        Counter(checkpoint.state for checkpoint in seen.status.checkpoints),
    )
    yield from _disk(seen.status)
    pool = seen.status.host_pool
    yield GaugeMetricFamily(
        "layercast_agent_host_pool_bytes", "Host memory for copies of checkpoints.", value=pool.capacity_bytes
    )
    yield GaugeMetricFamily(
        "layercast_agent_host_pool_used_bytes", "Host memory that copies take.", value=pool.used_bytes
    )
    yield _by_state(
        "layercast_agent_host_copies",
        "Copies in host memory by state.",
        pb.HostCopyState,
        Counter(copy.state for copy in pool.copies),
    )
    if seen.certificate_expires_at is not None:
        expiry = GaugeMetricFamily(
            "layercast_certificate_expiry_timestamp_seconds",
            "When the certificate of this process ends.",
            labels=["role"],
        )
        expiry.add_metric(["agent"], seen.certificate_expires_at)
        yield expiry
    yield from _reads(seen.status)
    yield from _arriving(seen.status.replicas)
    yield from _memory(seen.status.replicas)
    yield from _foreseen(seen.status.replicas)


def _disk(status: pb.GetStatusResponse) -> Iterator[Metric]:
    """How full and how fast the node's disk is."""
    on_disk = {c.digest: sum(c.segment_bytes) for c in status.checkpoints if c.on_disk}
    yield GaugeMetricFamily(
        "layercast_agent_disk_checkpoint_bytes", "Packed checkpoints on disk.", value=sum(on_disk.values())
    )
    yield GaugeMetricFamily(
        "layercast_agent_disk_capacity_bytes",
        "What packed checkpoints may take; 0: as much as the disk has.",
        value=status.store.capacity_bytes,
    )
    yield CounterMetricFamily(
        "layercast_agent_disk_checkpoints_removed",
        "Packed checkpoints that made room for others.",
        value=status.store.checkpoints_removed,
    )
    yield GaugeMetricFamily(
        "layercast_agent_disk_bytes_per_second",
        "Read rate of the store, measured at start; 0 until then.",
        value=status.disk_bytes_per_s,
    )


def _reads(status: pb.GetStatusResponse) -> Iterator[Metric]:
    """Which way parameters come, and why not the fastest one."""
    used = GaugeMetricFamily(
        "layercast_agent_rdma", "1: peers are read by RDMA; 0: they are not.", labels=["device", "reason"]
    )
    missed = GaugeMetricFamily(
        "layercast_agent_rdma_missed", "1: RDMA was demanded and cannot be used.", labels=["device"]
    )
    read = CounterMetricFamily(
        "layercast_agent_parameter_read_bytes",
        "Verified parameter bytes by transport, of the worker of each device and of the host pool (`host`).",
        labels=["device", "transport"],
    )
    for device in status.devices:
        if device.HasField("reads"):
            used.add_metric([device.device_id, device.reads.rdma_reason], device.reads.rdma)
            missed.add_metric([device.device_id], device.reads.rdma_missed)
    places = {device.device_id: device.reads.read_bytes for device in status.devices}
    for place, counts in (*places.items(), ("host", status.host_pool.read_bytes)):
        for transport, nbytes in sorted(counts.items()):
            read.add_metric([place, transport], nbytes)
    yield from (used, missed, read)


def _arriving(replicas: Iterable[pb.Replica]) -> Iterator[Metric]:
    """How far and how fast parameters arrive."""
    arrived = GaugeMetricFamily(
        "layercast_agent_replica_resident_bytes", "Verified parameter bytes.", labels=["replica", "device"]
    )
    rate = GaugeMetricFamily(
        "layercast_agent_transfer_bytes_per_second",
        "Parameters that arrive, by replica and by what kind of source they come from; 0 once all are there.",
        labels=["replica", "source"],
    )
    for replica in replicas:
        transfer = replica.transfer
        arrived.add_metric([replica.replica_id, replica.device_id], transfer.done_bytes)
        under_way = transfer.done_bytes < transfer.total_bytes
        source = "disk" if transfer.upstream in ("", "disk") else "peer"
        rate.add_metric([replica.replica_id, source], transfer.bytes_per_s if under_way else 0)
    yield arrived
    yield rate


def _foreseen(replicas: Iterable[pb.Replica]) -> Iterator[Metric]:
    """What replicas expected of themselves, and what it was: two summaries with the same counts."""
    labels = ["replica", "what"]
    predicted = SummaryMetricFamily(
        "layercast_agent_replica_predicted_seconds",
        "How long steps and pauses were expected to take.",
        labels=labels,
    )
    actual = SummaryMetricFamily(
        "layercast_agent_replica_actual_seconds",
        "How long the steps and pauses took whose predictions are counted.",
        labels=labels,
    )
    for replica in replicas:
        for each in replica.load.comparisons:
            where = [replica.replica_id, each.what]
            predicted.add_metric(where, each.count, each.predicted_s)
            actual.add_metric(where, each.count, each.actual_s)
    yield from (predicted, actual)


def _memory(replicas: Iterable[pb.Replica]) -> Iterator[Metric]:
    """How replicas use the memory of their devices."""
    labels = ["replica", "device"]
    planned = GaugeMetricFamily(
        "layercast_agent_replica_memory_bytes",
        "The device's memory as it was planned.",
        labels=[*labels, "use"],
    )
    pages = GaugeMetricFamily(
        "layercast_agent_replica_kv_pages", "KV pages; used and cached overlap.", labels=[*labels, "state"]
    )
    prefix = CounterMetricFamily(
        "layercast_agent_replica_prefix_tokens", "Tokens of admitted prompts.", labels=[*labels, "result"]
    )
    preempted = CounterMetricFamily(
        "layercast_agent_replica_preemptions", "Requests that lost their KV pages for a time.", labels=labels
    )
    moved = CounterMetricFamily(
        "layercast_agent_replica_requests_moved",
        "Requests that went on at another replica with their KV.",
        labels=labels,
    )
    sent = CounterMetricFamily(
        "layercast_agent_replica_kv_sent_bytes", "KV that was brought to other replicas.", labels=labels
    )
    for replica in replicas:
        where = [replica.replica_id, replica.device_id]
        memory, load = replica.memory, replica.load
        planned.add_metric([*where, "parameters"], memory.parameter_bytes)
        planned.add_metric([*where, "kv"], memory.kv_bytes)
        planned.add_metric([*where, "workspace"], memory.workspace_bytes)
        pages.add_metric([*where, "total"], load.kv_pages_total)
        pages.add_metric([*where, "used"], load.kv_pages_used)
        pages.add_metric([*where, "cached"], load.kv_pages_cached)
        prefix.add_metric([*where, "hit"], load.prefix_tokens_hit)
        prefix.add_metric([*where, "computed"], load.prefix_tokens_asked - load.prefix_tokens_hit)
        preempted.add_metric(where, load.preemptions)
        moved.add_metric(where, load.requests_moved)
        sent.add_metric(where, load.kv_bytes_sent)
    yield from (planned, pages, prefix, preempted, moved, sent)


def _by_state(name: str, text: str, states: Any, counts: Mapping[int, int]) -> GaugeMetricFamily:
    """One sample a state, also for those with none, so that a series does not end when a state is left."""
    family = GaugeMetricFamily(name, text, labels=["state"])
    prefix = states.DESCRIPTOR.values_by_number[0].name.removesuffix("UNSPECIFIED")
    for number, value in states.DESCRIPTOR.values_by_number.items():
        if number:
            family.add_metric([value.name.removeprefix(prefix).lower()], counts.get(number, 0))
    return family


class _Observed(Collector):
    """Turns an observation into metrics at each scrape."""

    def __init__(self, observe: Callable[[], Observation]) -> None:
        self._observe = observe

    def collect(self) -> Iterator[Metric]:
        return families(self._observe())

    def describe(self) -> Iterator[Metric]:
        return iter(())  # names depend on nothing; an empty answer keeps registration from observing


class MetricsServer:
    """Serves the three paths on a thread of its own."""

    def __init__(
        self,
        *,
        address: tuple[str, int],
        observe: Callable[[], Observation],
        loop: asyncio.AbstractEventLoop,
        answer_s: float = ANSWER_S,
    ) -> None:
        """Binds at once: OSError when the port is in use. `observe` is called on `loop`'s thread."""

        def ask() -> Observation:
            answer: Future[Observation] = Future()
            loop.call_soon_threadsafe(lambda: answer.set_result(observe()))
            return answer.result(answer_s)

        registry = CollectorRegistry()
        registry.register(_Observed(ask))
        ProcessCollector(registry=registry)
        handler = type("Handler", (_Handler,), {"ask": staticmethod(ask), "registry": registry})
        self._server = ThreadingHTTPServer(address, handler)
        self._server.daemon_threads = True
        self._thread = Thread(
            target=self._server.serve_forever, args=(SHUTDOWN_POLL_S,), name="metrics", daemon=True
        )

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._server.server_port

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stops answering and frees the port. Blocking, briefly; call it from another thread than the loop's."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    """GET /metrics, /healthz, /readyz."""

    ask: Callable[[], Observation]
    registry: CollectorRegistry

    def do_GET(self) -> None:
        """Answers one request; 503 when the node does not answer in time."""
        path = self.path.partition("?")[0]
        try:
            if path == "/metrics":
                self._answer(200, generate_latest(self.registry), CONTENT_TYPE_LATEST)
            elif path == "/healthz":
                self.ask()
                self._answer(200, b"ok\n")
            elif path == "/readyz":
                good = ready(self.ask().status)
                self._answer(200 if good else 503, b"ok\n" if good else b"no worker is warm\n")
            else:
                self._answer(404, b"there are /metrics, /healthz and /readyz\n")
        except TimeoutError:
            self._answer(503, b"the agent does not answer\n")

    def _answer(self, status: int, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name is the library's)
        """One line a probe would drown the decisions."""
        log.debug("http request", extra={"request": format % args})
