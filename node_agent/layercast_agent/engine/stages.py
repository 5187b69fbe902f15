"""Layers that run here for requests which another replica leads, and the KV that they leave behind.

An execution pipeline (`pipelines`) sends hidden states from stage to stage; the KV of a stage's layers stays at that
stage, under the name of a session. Pages come from the engine's own cache, so a pipeline and ordinary requests never
hold the same ones. Not thread-safe: the engine's thread owns it.
"""

from __future__ import annotations

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
    """One request's KV here. `positions` counts those whose KV is complete in the layers that were run."""

    pages: list[int]
    positions: int = 0
    layers: set[int] = field(default_factory=set)


class UnknownSessionError(PeerError):
    """The KV of that session is not here (any more): the leader starts it anew."""


class Stages:
    """All sessions of one engine."""

    def __init__(self, *, model: LayeredModel, kv: KVCache) -> None:
        self._model = model
        self._kv = kv
        self._sessions: dict[str, Session] = {}

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
        session = self._open(name, start=start, positions_max=positions_max)
        count = hidden.shape[0]
        batch = BatchPlan.of(self._kv, [Span(start=start, count=count, pages=session.pages)])
        result = self._model.run_layers(first, last, hidden.to(self._model.device), batch)
        session.layers.update(range(first, last))
        session.positions = start + count
        return result

    def read(self, name: str, *, first: int, last: int, positions: int) -> torch.Tensor:
        """A copy of K and V: uint8 on the host, [last - first, 2, positions, kv heads, head dim] in bytes.

        UnknownSessionError when some of it was not computed here.
        """
        session = self._sessions.get(name)
        if (
            session is None
            or session.positions < positions
            or not session.layers.issuperset(range(first, last))
        ):
            raise UnknownSessionError(f"the KV of session {name} is not here")
        kv = self._kv.export_layers(session.pages, positions, last)[first:]
        return kv.contiguous().flatten().view(torch.uint8).cpu()

    def end(self, name: str) -> None:
        """Frees a session; unknown ones succeed."""
        session = self._sessions.pop(name, None)
        if session is not None:
            self._kv.allocator.free(session.pages)

    def _open(self, name: str, *, start: int, positions_max: int) -> Session:
        session = self._sessions.get(name)
        if session is None:
            if start > 0:
                raise UnknownSessionError(f"session {name} does not begin at position {start}")
            if len(self._sessions) >= SESSIONS_MAX:
                raise NoCapacityError(f"{SESSIONS_MAX} requests of other replicas are executed here already")
            pages = -(-positions_max // self._kv.page_size)
            session = self._sessions[name] = Session(pages=self._kv.allocator.allocate(pages))
        if start > session.positions:
            raise UnknownSessionError(f"session {name} has {session.positions} positions here, not {start}")
        return session
