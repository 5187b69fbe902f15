"""Prefill/decode disaggregation at the replica that computes prompts: who goes on where (DistServe, OSDI'24).

A request that names where it decodes moves there while its prompt is computed (`moving`): with its first token it is
almost there. A replica that decodes may be full, or gone: then the request goes on here, and it is tried again. Every
replica can do everything, so nothing waits for another. On the asyncio thread only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from layercast.peer.v1alpha1 import peer_pb2

from layercast_agent.engine.sequence import DecodePlace, Sequence
from layercast_agent.worker.desk import RequestDesk
from layercast_agent.worker.moving import Mover

AGAIN_S = 0.5
"""Rest after a move that came to nothing."""

TRIES_MAX = 20
"""A request that nobody took for so long has most of its tokens: it stays."""


class Onward:
    """Sends requests of one replica to where they decode, told by its desk."""

    def __init__(
        self, *, desk: RequestDesk, mover: Mover, spawn: Callable[[Coroutine[None, None, None]], None]
    ) -> None:
        self._desk = desk
        self._mover = mover
        self._spawn = spawn
        desk.on_own = self.begun

    def begun(self, seq: Sequence) -> None:
        """A request is this replica's from now on."""
        place = seq.decode_at
        if place is not None and place.replica_id != self._desk.replica_id and seq.sampling.max_tokens > 1:
            if not seq.sampling.logprobs:
                self._mover.listen(seq)
            self._spawn(self._send(seq, place))

    async def _send(self, seq: Sequence, place: DecodePlace) -> None:
        to = peer_pb2.Peer(peer_id=place.replica_id, address=place.address)
        try:
            for _ in range(TRIES_MAX):
                if not self._desk.holds(seq) or self._desk.refuses:
                    return  # a drain moves it by itself
                if await self._mover.move(seq, to, from_prompt=True):
                    return
                await asyncio.sleep(AGAIN_S)
        finally:
            self._mover.forget(seq)
