"""Which part of a checkpoint each of several new replicas loads first, so that together they soon have all of it.

With k targets that read from k places (each its own disk, or a holder each), every one starts with another k-th of the
bytes: after 1/k of the time the model is there once, spread over the targets, and an execution pipeline serves (λScale,
arXiv 2502.09922, k-way transmission; digest B4, B5). λScale deals stripes j, j + k, j + 2k, ...; here the parts are
runs of neighbouring layers, because every change of the stage costs an activation's way over the network. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence


def orders(segment_bytes: Sequence[int], ways: int) -> list[tuple[int, ...]]:
    """For each of `ways` targets, all segments in the order in which it wants them; the first one leads.

    `segment_bytes` are those of embed, layer 0 .. L-1, head. The leader's part is embed, head and the first layers, in
    such a way that the largest part is as small as it can be; after its part each goes on with what follows, round
    and round. The sum of what has arrived after 1/k of the time is then nearly everything.
    """
    count = len(segment_bytes)
    parts = split(segment_bytes, ways)
    result = []
    for index, part in enumerate(parts):
        ends = (0, count - 1) if index == 0 else ()
        own = (*ends, *part)
        start = part[-1] + 1 if part else 1
        following = [1 + (start - 1 + step) % (count - 2) for step in range(count - 2)]
        rest = [segment for segment in (*following, 0, count - 1) if segment not in own]
        result.append((*own, *rest))
    return result


def late_order(segment_bytes: Sequence[int], ways: int) -> tuple[int, ...]:
    """All segments in the order of one more target, that comes when `ways` load in `orders` already.

    It goes towards them: the last layer of each part, then those before, so that it has what the others would have
    last. At a fraction f of the first load the model is then there after (1 + f)/2 of it where one loaded alone.
    See `complements` for when that is worth it.
    """
    parts = split(segment_bytes, ways)
    longest = max(len(part) for part in parts)
    layers = [part[-1 - back] for back in range(longest) for part in parts if back < len(part)]
    return (*layers, 0, len(segment_bytes) - 1)


def complements(fraction: float, ways: int) -> bool:
    """Whether who comes at this fraction of the others' load rather complements them than loads in order.

    `ways` cover the model after 1/ways of their load; with one more, each has its part of what is missing by then:
    first tokens come (1/ways - f)/(ways + 1) of a load earlier. The price is paid when the leader is complete: for f
    of a load the late one still loads, and as a live target it executes from the first layer on, which it has last.
    """
    return (1 / ways - fraction) / (ways + 1) > fraction


def split(segment_bytes: Sequence[int], ways: int) -> list[range]:
    """Runs of layer segments for each target, in order; the largest part is as small as possible.

    The first target has embed and head besides. A part may be empty when there are more targets than layers or when
    the embedding alone is more than a share.
    """
    ends = segment_bytes[0] + segment_bytes[-1]
    layers = segment_bytes[1:-1]
    low, high = max([*layers, ends]), ends + sum(layers)
    while low < high:
        middle = (low + high) // 2
        if _filled(layers, ends, ways, middle) is None:
            low = middle + 1
        else:
            high = middle
    parts = _filled(layers, ends, ways, high)
    assert parts is not None, "everything fits into one part"
    return parts


def covered_bytes(segment_bytes: Sequence[int], ways: int) -> int:
    """Bytes that each target must have received until all of them together have everything."""
    ends = segment_bytes[0] + segment_bytes[-1]
    sizes = [sum(segment_bytes[segment] for segment in part) for part in split(segment_bytes, ways)]
    return max(sizes[0] + ends, *sizes[1:]) if len(sizes) > 1 else sizes[0] + ends


def _filled(layers: Sequence[int], ends: int, ways: int, most: int) -> list[range] | None:
    """Fills one part after the other up to `most` bytes; None when `ways` parts are not enough."""
    parts, at = [], 0
    for index in range(ways):
        used, start = (ends if index == 0 else 0), at
        while at < len(layers) and used + layers[at] <= most:
            used += layers[at]
            at += 1
        parts.append(range(1 + start, 1 + at))
    return parts if at == len(layers) else None
