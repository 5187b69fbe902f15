"""A star instead of chains: every target reads from a complete copy, nobody forwards. Pure.

The baseline beside the multicast: "+Network" in the ladder of BlitzScale (OSDI'25, section 6.4), where parameters come
over the network but sources share their sending direction among all targets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from layercast_operator.chains import Chains
from layercast_operator.exits import Exits
from layercast_operator.flows import Member, copy_member, settle, target_member
from layercast_operator.sources import Sources, rank_of
from layercast_operator.topology import Running, Target


def grow_star(*, sources: Sources, targets: Sequence[Target], running: Sequence[Running]) -> Chains:
    """Each of `targets` below the copy of the best kind that has the fewest readers, those `running` counted."""
    chains = Chains(closed=sources.closed, below={}, exits=Exits(closed=sources.closed))
    copies = [copy_member(holder, rank_of(holder)) for holder in sources.roots]
    readers = Counter(entry.upstream for entry in running)
    best = [copy for copy in copies if copy.rank == copies[0].rank]
    for target in sorted(targets, key=lambda each: each.peer.peer_id):
        name = target.peer.peer_id
        if not best:
            chains.unfed.append(name)
            continue
        copy = min(best, key=lambda each: readers[each.peer.peer_id])
        readers[copy.peer.peer_id] += 1
        chains.planned.append(target_member(target, copy, copy.rate))
    chains.members = [*_reading(running, copies), *chains.planned]
    settle(chains.members)
    return chains


def _reading(running: Sequence[Running], copies: Sequence[Member]) -> list[Member]:
    """Those that read a copy already: they share its sending direction."""
    by_id = {copy.peer.peer_id: copy for copy in copies}
    return [
        target_member(entry.target, by_id[entry.upstream], by_id[entry.upstream].rate)
        for entry in running
        if entry.upstream in by_id
    ]
