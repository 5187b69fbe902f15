"""The workers of the routing table: a stream to each, and what was last learned about it.

Streams are opened to replicas in every state, because a replica that loads may announce that it owns a request. A
worker that left the table keeps its stream until its requests are done.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from layercast.engine.v1alpha1 import engine_pb2

from layercast_gateway.router import Candidate
from layercast_gateway.routes import ModelRoute, RouteTable
from layercast_gateway.tls import Tls
from layercast_gateway.upstream import StreamEvents, WorkerStream

AVOID_S = 2.0
"""How long a replica that was lost is avoided while another one serves."""

HOLD_FIRST_S = 0.1
HOLD_MOST_S = 2.0
"""How long a replica that gave a request back is given none: doubling while it goes on, to be sure of progress."""


@dataclass(frozen=True, slots=True)
class Occupation:
    """Requests that count against a worker: without a token in their attempt, and all."""

    unstarted: int = 0
    in_flight: int = 0


@dataclass(slots=True)
class _Worker:
    stream: WorkerStream
    listed: bool = True
    models: set[str] = field(default_factory=set)
    """Every model that it was listed for since its stream exists."""
    avoid_until: float = 0.0
    hold_until: float = 0.0
    hold_next_s: float = HOLD_FIRST_S


class Replicas:
    """Streams by worker address. Times are monotonic seconds."""

    def __init__(self, *, gateway_id: str, events: StreamEvents, tls: Tls | None = None) -> None:
        self._tls = tls
        self._gateway_id = gateway_id
        self._events = events
        self._workers: dict[str, _Worker] = {}

    def follow(self, table: RouteTable) -> set[str]:
        """Opens a stream to every new worker of the table; returns the addresses that just left it."""
        listed = {endpoint.address for route in table.values() for endpoint in route.endpoints}
        for address in listed - self._workers.keys():
            stream = WorkerStream(
                address=address, gateway_id=self._gateway_id, events=self._events, tls=self._tls
            )
            self._workers[address] = _Worker(stream)
        left = {address for address, w in self._workers.items() if w.listed and address not in listed}
        for address, worker in self._workers.items():
            worker.listed = address in listed
        for route in table.values():
            for endpoint in route.endpoints:
                self._workers[endpoint.address].models.add(route.model)
        return left

    def models(self, address: str) -> Collection[str]:
        """Models whose requests may be at a worker."""
        worker = self._workers.get(address)
        return worker.models if worker is not None else ()

    def candidates(
        self, route: ModelRoute, occupations: Mapping[str, Occupation] | None = None
    ) -> list[Candidate]:
        """The endpoints of a model as the router wants them."""
        nothing = Occupation()
        found = []
        for endpoint in route.endpoints:
            worker = self._workers[endpoint.address]
            occupation = (occupations or {}).get(endpoint.address, nothing)
            found.append(
                Candidate(
                    replica_id=endpoint.replica_id,
                    address=endpoint.address,
                    state=endpoint.state,
                    role=endpoint.role,
                    connected=worker.stream.connected,
                    unstarted=occupation.unstarted,
                    in_flight=occupation.in_flight,
                    avoid_until=worker.avoid_until,
                    hold_until=worker.hold_until,
                )
            )
        return found

    def send(self, address: str, command: engine_pb2.GenerateRequest) -> bool:
        """As WorkerStream.send; False for a worker that is not known."""
        worker = self._workers.get(address)
        return worker is not None and worker.stream.send(command)

    def avoid(self, address: str, *, now: float) -> None:
        """It was lost, or did not answer."""
        if worker := self._workers.get(address):
            worker.avoid_until = now + AVOID_S

    def hold(self, address: str, *, now: float) -> None:
        """It gave a request back."""
        worker = self._workers.get(address)
        if worker is None or worker.hold_until > now:
            return  # one drain gives back many at once
        worker.hold_until = now + worker.hold_next_s
        worker.hold_next_s = min(worker.hold_next_s * 2, HOLD_MOST_S)

    def trust(self, address: str) -> None:
        """It produced a token: whatever was wrong is over."""
        if worker := self._workers.get(address):
            worker.hold_next_s = HOLD_FIRST_S

    def streams(self, route: ModelRoute) -> list[WorkerStream]:
        """Streams to the endpoints of a model."""
        return [self._workers[endpoint.address].stream for endpoint in route.endpoints]

    @property
    def kv_utilization(self) -> float:
        """Used part, 0 to 1, of the KV memory of all listed workers that are connected; 0 without any."""
        uses = [w.stream.kv for w in self._workers.values() if w.listed and w.stream.connected]
        return sum(use.used for use in uses) / max(1, sum(use.total for use in uses))

    @property
    def retired(self) -> bool:
        """Some workers left the table and still have a stream."""
        return any(not worker.listed for worker in self._workers.values())

    async def close_unused(self, used: Collection[str]) -> None:
        """Closes streams to workers that left the table and hold none of our requests (`used` are those that do)."""
        gone = [address for address, w in self._workers.items() if not w.listed and address not in used]
        for stream in [self._workers.pop(address).stream for address in gone]:
            await stream.close()

    async def close(self) -> None:
        """Closes every stream."""
        workers, self._workers = self._workers, {}
        for worker in workers.values():
            await worker.stream.close()
