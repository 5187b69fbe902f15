"""The binomial pipeline: a schedule in ticks in which everybody who has something sends in every tick.

λScale (arXiv 2502.09922; digest B3). Of n nodes, node 0 has all b blocks. The first 2^l (l = floor(log2 n)) are the
vertices of a hypercube; each further node stands beside one vertex and both act as one logical node. In tick t a
vertex talks along dimension t mod l: node 0 sends block min(t, b), the others the highest block they have, one of a
pair sends while the other receives, and the one who receives passes on what the other misses. Nobody sends or
receives more than one block in a tick. For n = 2^l everybody has everything after b + l - 1 ticks, which is optimal;
pairs take one tick more.

A chain of n nodes needs b + n - 2 such ticks but no barrier between them, so it may cut the checkpoint finely. The
schedule pays a round of control messages each tick, hence it is for many nodes and short checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Two round trips of control messages until every edge of a tick has reported (digest B3), on a network of a site.
TICK_BARRIER_S = 1e-3
BLOCKS_MAX = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """One block from one node to another; nodes by index, 0 is the source."""

    sender: int
    receiver: int
    block: int


def ticks_needed(nodes: int, blocks: int) -> int:
    """Ticks until all of `nodes`, the source among them, have all of `blocks`."""
    if nodes < 2:
        return 0
    depth = nodes.bit_length() - 1
    pairs = nodes > 1 << depth
    return blocks + depth - 1 + (1 if pairs else 0)


def predicted_s(nodes: int, blocks: int, *, checkpoint_bytes: int, bytes_per_s: float) -> float:
    """Seconds of a schedule whose slowest node moves `bytes_per_s`; a tick ends for all together."""
    return ticks_needed(nodes, blocks) * (checkpoint_bytes / blocks / bytes_per_s + TICK_BARRIER_S)


def best_blocks(nodes: int, *, checkpoint_bytes: int, bytes_per_s: float) -> int:
    """How many blocks make the schedule shortest: few fill the pipeline slowly, many wait at barriers."""
    extra = max(ticks_needed(nodes, 1) - 1, 0)
    ideal = math.sqrt(extra * checkpoint_bytes / bytes_per_s / TICK_BARRIER_S)
    near = {min(max(math.floor(ideal) + more, 1), BLOCKS_MAX) for more in (0, 1)}
    return min(
        sorted(near),
        key=lambda b: predicted_s(nodes, b, checkpoint_bytes=checkpoint_bytes, bytes_per_s=bytes_per_s),
    )


def binomial_schedule(nodes: int, blocks: int) -> tuple[tuple[Send, ...], ...]:
    """All ticks of one group. The last ticks complete pairs."""
    if nodes < 2 or blocks < 1:
        return ()
    depth = nodes.bit_length() - 1
    vertices = 1 << depth
    teams = [[x, *([x + vertices - 1] if 1 <= x < nodes - vertices + 1 else [])] for x in range(vertices)]
    owned: list[set[int]] = [set(range(blocks)), *(set[int]() for _ in range(nodes - 1))]
    ticks: list[tuple[Send, ...]] = []
    while any(len(has) < blocks for has in owned):
        tick = _tick(len(ticks) + 1, teams, owned, depth=depth, blocks=blocks)
        for send in tick:
            owned[send.receiver].add(send.block)
        ticks.append(tick)
    return tuple(ticks)


def _tick(
    number: int, teams: list[list[int]], owned: list[set[int]], *, depth: int, blocks: int
) -> tuple[Send, ...]:
    """What every logical node does in one tick, from what it had before."""
    network: list[Send] = []
    inside: list[Send] = []
    speakers = [_speaker(team, owned) for team in teams]
    flip = 1 << (number % depth)
    for x, team in enumerate(teams):
        other = teams[x ^ flip]
        block = min(number, blocks) - 1 if x == 0 else max(owned[speakers[x]], default=-1)
        # The one who does not speak listens; alone, one does both.
        listener = other[-1] if other[0] == speakers[x ^ flip] else other[0]
        if block >= 0 and not any(block in owned[node] for node in other):
            network.append(Send(sender=speakers[x], receiver=listener, block=block))
        inside += [
            Send(sender=a, receiver=b, block=max(owned[a] - owned[b]))
            for a, b in zip(team, reversed(team), strict=True)
            if owned[a] - owned[b]
        ]
    return _each_once([*network, *inside])


def _speaker(team: list[int], owned: list[set[int]]) -> int:
    """Who of a team sends: who has its highest block, and if both do, who misses more and so gets some back."""
    return max(team, key=lambda node: (max(owned[node], default=-1), -len(owned[node])))


def _each_once(sends: list[Send]) -> tuple[Send, ...]:
    """The sends of a tick with nobody sending or receiving twice; the first listed go first."""
    kept: list[Send] = []
    senders: set[int] = set()
    receivers: set[int] = set()
    for send in sends:
        if send.sender not in senders and send.receiver not in receivers:
            senders.add(send.sender)
            receivers.add(send.receiver)
            kept.append(send)
    return tuple(kept)
