"""Layers that run here for requests which another replica leads, and the KV that they leave behind.

An execution pipeline (`pipelines`) sends hidden states from stage to stage; the KV of a stage's layers stays at that
stage, under the name of a session. A request that is about to move here (`migration`) leaves its KV under such a name
too, piece by piece, and then becomes an ordinary request on the same pages. Pages come from the engine's own cache, so
sessions and ordinary requests never hold the same ones. Not thread-safe: the engine's thread owns it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from layercast_agent.engine.attention import BatchPlan, Span
from layercast_agent.engine.kv import KVCache
from layercast_agent.engine.model import LayeredModel
from layercast_agent.errors import NoCapacityError, PeerError

SESSIONS_MAX = 64
"""Requests of others at once: each holds pages until its leader ends it."""


@dataclass(slots=True, kw_only=True)
class Session:
    """One request's KV here. `rows` counts, for each layer, the positions from 0 on whose KV is here."""

    pages: list[int]
    rows: dict[int, int] = field(default_factory=dict)

    def held(self, layers: Iterable[int]) -> int:
        """Positions whose KV is here in all of these layers."""
        return min((self.rows.get(layer, 0) for layer in layers), default=0)


class UnknownSessionError(PeerError):
    """The KV of that session is not here (any more): the leader starts it anew."""


class Stages:
    """All sessions of one engine."""

    def __init__(self, *, model: LayeredModel, kv: KVCache) -> None:
        self._model = model
        self._kv = kv
        self._sessions: dict[str, Session] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._sessions

    def __len__(self) -> int:
        return len(self._sessions)

    @torch.inference_mode()
    def run(
        self, name: str, hidden: torch.Tensor, *, first: int, last: int, start: int, positions_max: int
    ) -> torch.Tensor:
        """Runs layers [first, last) on hidden states [count, hidden size] of positions from `start` on.

        NoCapacityError when no page is free, UnknownSessionError when positions before `start` were not run here,
        AgentError when a layer is not attached. The leader then ends the session.
        """
        session = self._open(name, range(first, last), start=start, positions_max=positions_max)
        count = hidden.shape[0]
        batch = BatchPlan.of(self._kv, [Span(start=start, count=count, pages=session.pages)])
        result = self._model.run_layers(first, last, hidden.to(self._model.device), batch)
        session.rows.update(dict.fromkeys(range(first, last), start + count))
        return result

    def write(
        self, name: str, kv: torch.Tensor, *, first: int, last: int, start: int, positions_max: int
    ) -> None:
        """Stores K and V of layers [first, last) of positions from `start` on, computed elsewhere.

        `kv` is uint8 on the host, [last - first, 2, positions, kv heads, head dim] in bytes. PeerError when it is not
        of that shape; else as `run`.
        """
        shape = self._model.shape
        row_bytes = (last - first) * self._kv.row_bytes
        if row_bytes <= 0 or kv.numel() % row_bytes:
            raise PeerError(f"{kv.numel()} bytes are no KV of {last - first} layers")
        rows = kv.view(shape.dtype).view(last - first, 2, -1, shape.kv_heads, shape.head_dim)
        session = self._open(name, range(first, last), start=start, positions_max=positions_max)
        if start + rows.shape[2] > len(session.pages) * self._kv.page_size:
            raise PeerError(f"session {name} was opened for fewer positions")
        self._kv.import_rows(session.pages, rows, first=first, start=start)
        session.rows.update(dict.fromkeys(range(first, last), start + rows.shape[2]))

    def take(self, name: str) -> tuple[list[int], int]:
        """Ends a session but keeps its pages for the caller; how many positions they have in all layers.

        UnknownSessionError when there is none of that name.
        """
        session = self._sessions.pop(name, None)
        if session is None:
            raise UnknownSessionError(f"session {name} is not here")
        return session.pages, session.held(range(self._model.shape.layers))

    def read(self, name: str, *, first: int, last: int, positions: int) -> torch.Tensor:
        """A copy of K and V: uint8 on the host, [last - first, 2, positions, kv heads, head dim] in bytes.

        UnknownSessionError when some of it was not computed here.
        """
        session = self._sessions.get(name)
        if session is None or session.held(range(first, last)) < positions:
            raise UnknownSessionError(f"the KV of session {name} is not here")
        kv = self._kv.export_rows(session.pages, first=first, last=last, start=0, stop=positions)
        return kv.contiguous().flatten().view(torch.uint8).cpu()

    def end(self, name: str) -> None:
        """Frees a session; unknown ones succeed."""
        session = self._sessions.pop(name, None)
        if session is not None:
            self._kv.allocator.free(session.pages)

    def _open(self, name: str, layers: Iterable[int], *, start: int, positions_max: int) -> Session:
        session = self._sessions.get(name)
        if session is None:
            if start > 0:
                raise UnknownSessionError(f"session {name} does not begin at position {start}")
            if len(self._sessions) >= SESSIONS_MAX:
                raise NoCapacityError(f"{SESSIONS_MAX} requests of other replicas are executed here already")
            pages = -(-positions_max // self._kv.page_size)
            session = self._sessions[name] = Session(pages=self._kv.allocator.allocate(pages))
        if start > session.held(layers):
            raise UnknownSessionError(f"session {name} does not have {start} positions here")
        return session
