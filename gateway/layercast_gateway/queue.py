# ruff: noqa: A005
"""Requests of one model that wait for a replica: bounded, and first come, first served.

The order is by arrival at the gateway, so a request that comes back from a replica (returned, or lost with it)
stands in front of those that arrived after it. Only new arrivals can be refused: what was accepted once is never
dropped for lack of room. Places can be reserved before a request is complete, because counting its tokens may have
to wait for the model's tokenizer. Pure: no clock, no waiting.
"""

from __future__ import annotations

import bisect

from layercast_gateway.errors import QueueFullError


class RequestQueue:
    """Ids of waiting requests by (arrival time, id); at most `requests_max` of them and of reserved places."""

    def __init__(self, *, requests_max: int) -> None:
        self._requests_max = requests_max
        self._reserved = 0
        self._order: list[tuple[float, str]] = []
        self._arrived_at: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._order)

    @property
    def reserved(self) -> int:
        """Places that are kept for requests which are still being read."""
        return self._reserved

    def reserve(self, places: int) -> None:
        """Keeps places for new requests, all or none; QueueFullError when there are not as many."""
        waiting = len(self._order) + self._reserved
        if waiting + places > self._requests_max:
            raise QueueFullError(
                f"{waiting} requests wait already and at most {self._requests_max} may; try again later."
            )
        self._reserved += places

    def release(self, places: int) -> None:
        """Gives reserved places back, used or not."""
        assert places <= self._reserved, "places were reserved before"
        self._reserved -= places

    def put(self, request_id: str, *, arrived_at: float) -> None:
        """Enqueues a request whose place was reserved, or one that was accepted before and came back."""
        assert request_id not in self._arrived_at, "a request waits once"
        self._arrived_at[request_id] = arrived_at
        bisect.insort(self._order, (arrived_at, request_id))

    def head(self) -> str | None:
        """The request that is served next."""
        return self._order[0][1] if self._order else None

    def remove(self, request_id: str) -> bool:
        """Takes a request out; False when it does not wait here."""
        arrived_at = self._arrived_at.pop(request_id, None)
        if arrived_at is None:
            return False
        del self._order[bisect.bisect_left(self._order, (arrived_at, request_id))]
        return True

    def ids(self) -> tuple[str, ...]:
        """All waiting requests in order."""
        return tuple(request_id for _, request_id in self._order)


class Admission:
    """Places in a model's queue for requests that are still being read."""

    def __init__(self, queue: RequestQueue, places: int) -> None:
        queue.reserve(places)
        self._queue = queue
        self._left = places

    def use(self) -> None:
        """One of the places is taken by a real request now."""
        assert self._left > 0, "places are reserved before"
        self._left -= 1
        self._queue.release(1)

    def close(self) -> None:
        """Gives back the places that were not used."""
        self._queue.release(self._left)
        self._left = 0
