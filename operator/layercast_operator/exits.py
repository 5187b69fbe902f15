"""Where chains may go on: the open ends of a multicast plan, found in logarithmic time.

Groups of targets come in descending bandwidth, so the rate that is asked of an end only falls and an end that was
fast enough once stays so. Ends wait in one heap until they are; then they are ranked by preference, once for all
and once for their leaf. Ends that were used are skipped when they come to the top.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from heapq import heappop, heappush

from layercast_operator.flows import Member

# Ends that are at least so fast are equals, and leaf and length decide: within the 1.25 that the plan may cost.
RATE_TOLERANCE = 0.9


@dataclass(slots=True, eq=False)
class Exit:
    """Copies of one logical node at which a chain may go on, each over its own NIC."""

    members: list[Member]
    supply: float
    """What is there to send: a shard can come from each copy, a chain brings what it brings."""
    rate: float
    """What can leave here, over all its NICs."""
    open: bool = True


_Ranked = list[tuple[tuple[int, int, float], int, Exit]]


@dataclass(slots=True)
class Exits:
    """All exits, open or used, and how many flows each node sends."""

    closed: Collection[str] = ()
    """Nodes that should not send."""
    sending: Counter[str] = field(default_factory=Counter)
    _fastest: list[tuple[float, int, Exit]] = field(default_factory=list)
    _waiting: list[tuple[float, int, Exit]] = field(default_factory=list)
    _ready: _Ranked = field(default_factory=list)
    _near: dict[str, _Ranked] = field(default_factory=dict)
    _added: int = 0

    def add(self, members: list[Member]) -> Exit | None:
        """Open an exit at `members` if their nodes have a NIC left."""
        free = self.free_lanes(members)
        if not free:
            return None
        head = members[0]
        supply = head.rate if head.hops else min(m.rate for m in members) * len(free)
        rate = min(supply, sum(m.nic for m in free))
        found = Exit(members, supply, rate)
        self._added += 1  # also breaks ties: exits are opened in a settled order
        heappush(self._fastest, (-rate, self._added, found))
        heappush(self._waiting, (-rate, self._added, found))
        return found

    def free_lanes(self, members: list[Member]) -> list[Member]:
        """Members that can send one flow more, each over a NIC of its own."""
        taken: Counter[str] = Counter()
        lanes: list[Member] = []
        for member in members:
            if self.has_lane(member.node, member.nics - taken[member.node]):
                taken[member.node] += 1
                lanes.append(member)
        return lanes

    def has_lane(self, node: str, nics: int) -> bool:
        """Whether one of `nics` NICs of a node may send and does not yet."""
        return self.sending[node] < nics and node not in self.closed

    def best(self, leaf: str, rate_wanted: float) -> Exit | None:
        """The exit for a group that can take `rate_wanted`: fast enough, by kind, same leaf, short, fast."""
        while self._fastest and not self._usable(self._fastest[0][2]):
            heappop(self._fastest)
        if not self._fastest:
            return None
        enough = RATE_TOLERANCE * min(-self._fastest[0][0], rate_wanted)
        while self._waiting and -self._waiting[0][0] >= enough:
            _, number, found = heappop(self._waiting)
            head = found.members[0]
            entry = ((head.rank, head.hops, -found.rate), number, found)
            heappush(self._ready, entry)
            heappush(self._near.setdefault(head.leaf, []), entry)
        anywhere = self._top(self._ready)
        near = self._top(self._near.get(leaf, []))
        if near is not None and anywhere is not None and near.members[0].rank <= anywhere.members[0].rank:
            return near
        return anywhere

    def use(self, found: Exit, lanes: list[Member]) -> None:
        """Send a flow from each of `lanes`; what is left of the exit stays open."""
        found.open = False
        self.sending.update(lane.node for lane in lanes)
        left = [m for m in found.members if m not in lanes]
        if left:
            self.add(left)

    def _top(self, heap: _Ranked) -> Exit | None:
        while heap and not self._usable(heap[0][2]):
            heappop(heap)
        return heap[0][2] if heap else None

    def _usable(self, found: Exit) -> bool:
        return found.open and bool(self.free_lanes(found.members))
