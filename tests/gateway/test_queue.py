"""The queue keeps its bound and its order whatever comes and goes."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from layercast_gateway.errors import QueueFullError
from layercast_gateway.queue import Admission, RequestQueue

MOST = 4


class QueueMachine(RuleBasedStateMachine):
    """Arrivals, dispatches of the head, and returns of what was dispatched, against a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = RequestQueue(requests_max=MOST)
        self.waiting: list[tuple[float, str]] = []
        self.dispatched: list[tuple[float, str]] = []
        self.count = 0

    @rule(arrived_at=st.integers(0, 5), places=st.integers(1, 3))
    def arrive(self, arrived_at: int, places: int) -> None:
        """All of a request's choices are accepted, or none."""
        if len(self.waiting) + places > MOST:
            with pytest.raises(QueueFullError):
                Admission(self.queue, places)
            return
        admission = Admission(self.queue, places)
        for _ in range(places):
            admission.use()
            self.count += 1
            self.queue.put(f"r{self.count:04}", arrived_at=float(arrived_at))
            self.waiting.append((float(arrived_at), f"r{self.count:04}"))
        admission.close()

    @precondition(lambda self: self.waiting)
    @rule()
    def dispatch(self) -> None:
        """The earliest goes."""
        earliest = min(self.waiting)
        assert self.queue.head() == earliest[1]
        assert self.queue.remove(earliest[1])
        self.waiting.remove(earliest)
        self.dispatched.append(earliest)

    @precondition(lambda self: self.dispatched)
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        """Never refused, and back at its place."""
        entry = data.draw(st.sampled_from(self.dispatched))
        self.dispatched.remove(entry)
        self.queue.put(entry[1], arrived_at=entry[0])
        self.waiting.append(entry)

    @invariant()
    def in_order(self) -> None:
        """By arrival, then by id."""
        assert self.queue.ids() == tuple(request_id for _, request_id in sorted(self.waiting))
        assert len(self.queue) == len(self.waiting)
        assert self.queue.reserved == 0


TestQueue = QueueMachine.TestCase


def test_unused_places_are_given_back() -> None:
    queue = RequestQueue(requests_max=3)
    admission = Admission(queue, 3)
    with pytest.raises(QueueFullError, match="3 requests wait already and at most 3 may"):
        Admission(queue, 1)
    admission.use()
    queue.put("a", arrived_at=1.0)
    admission.close()
    assert queue.reserved == 0
    Admission(queue, 2).close()
    assert not queue.remove("unknown")
