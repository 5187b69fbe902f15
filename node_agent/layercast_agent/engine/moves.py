"""What an engine does for requests that move between replicas while they run (`migration` decides).

At the source: how far a request is, and copies of KV that nobody writes any more, for a request that decodes elsewhere
as soon as some layers of a chunk of its prompt are done. At the target: KV under the name of a
session (`stages`), read or computed from tokens, until the request comes and goes on with those pages. Not thread-safe:
the engine's thread owns it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import torch

from layercast_agent.engine.attention import to_device
from layercast_agent.engine.kv import KVCache
from layercast_agent.engine.model import LayeredModel
from layercast_agent.engine.scheduler import Scheduler, Work
from layercast_agent.engine.sequence import Sequence
from layercast_agent.engine.stages import Stages
from layercast_agent.errors import AgentError, PeerError

LAYER_GROUPS = 4
"""A chunk's KV leaves in so many pieces: the last can only be sent after the chunk, the others while it is computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """KV of layers [first, last) at positions [start, stop), as `Moves.rows` gives it."""

    first: int
    last: int
    start: int
    stop: int
    kv: torch.Tensor


Follower = Callable[[Piece | None], bool]
"""Told of each piece on the engine's thread, and of None when the prefix is complete. False: it wants no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Of a request: positions with KV in all layers, and whether more than the next token is missing."""

    computed: int
    prefilling: bool


class Moves:
    """Both ends of a move, of one engine. `add` queues a request there."""

    def __init__(
        self,
        *,
        model: LayeredModel,
        kv: KVCache,
        scheduler: Scheduler,
        stages: Stages,
        add: Callable[[Sequence], None],
    ) -> None:
        self._model = model
        self._kv = kv
        self._scheduler = scheduler
        self._stages = stages
        self._add = add
        self._followers: dict[str, Follower] = {}

    # At the source

    def progress(self, request_id: str) -> Progress | None:
        """How far a request is; one that waits has nothing yet. None when there is none of that id."""
        seq = self._scheduler.find(request_id)
        if seq is None:
            return None
        waits = seq in self._scheduler.waiting
        return Progress(computed=0 if waits else seq.computed, prefilling=waits or seq.prefilling)

    def rows(self, request_id: str, *, first: int, last: int, start: int, stop: int) -> torch.Tensor:
        """A copy of K and V of layers [first, last) at positions [start, stop) of a running request.

        uint8 on the host, [last - first, 2, stop - start, kv heads, head dim] in bytes. PeerError when it does not run
        here, or those positions are not computed.
        """
        running = (seq for seq in self._scheduler.running if seq.request_id == request_id)
        seq = next(running, None)
        if seq is None or not 0 <= start <= stop <= seq.computed:
            raise PeerError(f"positions {start} to {stop} of request {request_id} are not here")
        kv = self._kv.export_rows(seq.pages, first=first, last=last, start=start, stop=stop)
        return kv.contiguous().flatten().view(torch.uint8).cpu()

    def follow(self, request_id: str, follower: Follower) -> None:
        """From now on, until the prefix is complete, the KV of a request's chunks is copied out as it is computed."""
        self._followers[request_id] = follower

    def unfollow(self, request_id: str) -> None:
        """Unknown ones succeed."""
        self._followers.pop(request_id, None)

    def cuts(self, first: int, last: int, works: Ordered[Work]) -> list[tuple[int, int]]:
        """Into which ranges layers [first, last) of a step are to be cut: one range where nobody follows."""
        if not any(self._is_followed(work) for work in works):
            return [(first, last)]
        each = -(-self._kv.layers // LAYER_GROUPS)
        bounds = [first, *(layer for layer in range(each, last, each) if layer > first), last]
        return list(itertools.pairwise(bounds))

    def ran(self, first: int, last: int, works: Iterable[Work]) -> None:
        """Layers [first, last) of a step are done: their KV goes to those who follow."""
        for work in works:
            if not self._is_followed(work):
                continue
            seq = work.seq
            kv = self._kv.export_rows(seq.pages, first=first, last=last, start=work.start, stop=work.stop)
            rows = kv.contiguous().flatten().view(torch.uint8).cpu()
            piece = Piece(first=first, last=last, start=work.start, stop=work.stop, kv=rows)
            if not self._followers[seq.request_id](piece):
                self.unfollow(seq.request_id)

    def completed(self, seq: Sequence) -> None:
        """The prefix of a request is complete: what follows is a token at a time."""
        follower = self._followers.pop(seq.request_id, None)
        if follower is not None:
            follower(None)

    def _is_followed(self, work: Work) -> bool:
        """The step of a single token is not worth a piece."""
        return work.count > 1 and work.seq.request_id in self._followers

    # At the target

    @torch.inference_mode()
    def extend(self, name: str, token_ids: Ordered[int], *, start: int, positions_max: int) -> None:
        """Computes the KV of tokens from position `start` on into a session. Raises as `Stages.run`."""
        ids = to_device(torch.tensor(token_ids, dtype=torch.int64), self._model.device)
        layers = self._model.shape.layers
        hidden = self._model.embed(ids)
        self._stages.run(name, hidden, first=0, last=layers, start=start, positions_max=positions_max)

    def settle(self, seq: Sequence, name: str) -> int:
        """Queues a request on the pages of its session; returns for how many positions there is nothing to do.

        What the session lacks is computed here, everything when there is none of that name. Raises as `Engine.add`;
        then the session is ended too.
        """
        pages, held = self._stages.take(name) if name in self._stages else ([], 0)
        if len(pages) * self._kv.page_size < seq.prefix_length:
            self._kv.allocator.free(pages)
            pages, held = [], 0
        try:
            self._add(seq)
        except AgentError:
            self._kv.allocator.free(pages)
            raise
        seq.pages = pages
        seq.computed = min(held, seq.prefix_length - 1)
        return seq.computed
