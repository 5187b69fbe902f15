"""Moves running requests to other replicas (`migration` decides), one task a request. On the asyncio thread only.

The source keeps generating while rounds bring what is known to the target, under a session there. At the end it stops
the request, and the target takes it with all its tokens and computes what is still missing. Whatever fails before that
leaves the request where it is; whatever fails after it sends the request to its gateway, which replays it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

import grpc
from layercast.peer.v1alpha1 import peer_pb2 as pb

from layercast_agent.engine.engine import Engine
from layercast_agent.engine.sequence import Sequence
from layercast_agent.errors import AgentError
from layercast_agent.migration import Moved, RoundCosts, Step, by_tokens, next_step
from layercast_agent.worker import wire
from layercast_agent.worker.desk import RequestDesk
from layercast_agent.worker.engine_loop import LoopView
from layercast_agent.worker.rates import Compared, Mean
from layercast_agent.worker.stage_host import STAGE_DEADLINE_S, StageHost

log = logging.getLogger(__name__)

ROUND_TOKENS_MAX = 512
"""Positions a round: the target's other requests wait for a computed round as for a chunk of a prompt."""

WAIT_S = 0.005
"""How often the progress of a prompt is looked at."""


class Mover:
    """Moves requests of one replica away."""

    def __init__(
        self,
        *,
        me: pb.Peer,
        digest: str,
        layers: int,
        row_bytes: int,
        positions_max: int,
        desk: RequestDesk,
        stages: StageHost,
        look: Callable[[], LoopView],
    ) -> None:
        """`row_bytes` is the KV of one position in one layer, `positions_max` the longest sequence."""
        self._me = me
        self._digest = digest
        self._layers = layers
        self._row_bytes = row_bytes
        self._positions_max = positions_max
        self._desk = desk
        self._stages = stages
        self._look = look
        self.bytes_per_s = 0.0
        self.moved = 0
        self.last_pause_s = 0.0
        self.pauses = Compared()
        self._pause = Mean()

    async def move(self, seq: Sequence, to: pb.Peer) -> bool:
        """Whether the request is the other replica's now. It is where it was otherwise, ended, or at its gateway."""
        if seq.sampling.logprobs:
            return False  # its tokens so far would have to be told again with theirs
        session = f"{self._me.peer_id}/m/{seq.request_id}/{seq.attempt}"
        try:
            held = await self._bring(seq, to, session)
            if held is None:
                await self._stages.end_at(to, session)
                return False
            return await self._hand_over(seq, to, session, held)
        except AgentError as error:
            log.info("a request cannot move", extra={"request": seq.request_id, "reason": str(error)})
            await self._stages.end_at(to, session)
            return False

    async def _bring(self, seq: Sequence, to: pb.Peer, session: str) -> int | None:
        """Rounds until the rest is small; positions at the target. None when the request ended meanwhile."""
        moved, begun = Moved(computed=0, held=0, prefilling=True), 0
        while self._desk.owned.get(seq.request_id) is seq:
            progress = await self._desk.ask(lambda engine: engine.moves.progress(seq.request_id))
            if progress is None:
                return None
            moved = replace(moved, computed=progress.computed, prefilling=progress.prefilling)
            match next_step(moved):
                case Step.LAST:
                    return moved.held
                case Step.WAIT:
                    await asyncio.sleep(WAIT_S)
                case Step.ROUND:
                    stop = min(moved.computed, moved.held + ROUND_TOKENS_MAX)
                    await self._round(seq, to, session, moved.held, stop)
                    moved = replace(moved, held=stop)
                    if stop == moved.computed and not moved.prefilling:  # else a piece of a longer round
                        moved = replace(moved, rounds=moved.rounds + 1, last_round=stop - begun)
                        begun = stop
        return None

    async def _round(self, seq: Sequence, to: pb.Peer, session: str, start: int, stop: int) -> None:
        costs = RoundCosts(
            positions=stop - start,
            row_bytes=self._row_bytes * self._layers,
            bytes_per_s=self.bytes_per_s,
            prefill_tokens_per_s=self._look().prefill_tokens_per_s,
        )
        request = pb.ExtendSessionRequest(
            session=session,
            digest=self._digest,
            start=start,
            positions_max=min(self._positions_max, len(seq.prompt) + seq.sampling.max_tokens),
            giver=self._me,
        )
        if by_tokens(costs):
            request.token_ids.extend(seq.tokens(start, stop))
            await self._stages.extend_at(to, request)
            return
        state = await self._desk.ask(
            lambda engine: engine.moves.rows(
                seq.request_id, first=0, last=self._layers, start=start, stop=stop
            )
        )
        with self._stages.lent(state) as (region, crc32):
            request.last_layer = self._layers
            request.crc32 = crc32
            request.state.CopyFrom(region)
            began = time.monotonic()
            await self._stages.extend_at(to, request)
        rate = state.numel() / max(time.monotonic() - began, 1e-6)
        self.bytes_per_s += (rate - self.bytes_per_s) * (0.3 if self.bytes_per_s else 1.0)

    async def _hand_over(self, seq: Sequence, to: pb.Peer, session: str, held: int) -> bool:
        """The last pause: from here on the request runs nowhere until the target has it."""
        began = time.monotonic()
        stopped = await self._desk.ask(lambda engine: _stop(engine, seq))
        if not stopped or self._desk.owned.get(seq.request_id) is not seq:
            await self._stages.end_at(to, session)
            return False
        handoff = pb.Handoff(
            request=wire.request_of(seq, model=self._desk.model), positions=held, session=session
        )
        request = pb.OfferHandoffsRequest(source=self._me, handoffs=[handoff])
        try:
            answer = await self._stages.stub(to).OfferHandoffs(request, timeout=STAGE_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            log.warning(
                "a move was not answered", extra={"request": seq.request_id, "reason": error.details()}
            )
            answer = pb.OfferHandoffsResponse()
        if seq.request_id not in answer.accepted_request_ids:
            self._desk.give_back([seq], reason=f"{to.peer_id} did not take it over")
            return False
        self._desk.disown(seq.request_id)
        self.moved += 1
        self.last_pause_s = time.monotonic() - began
        self.pauses = self.pauses.with_one(predicted_s=self._pause.seconds, actual_s=self.last_pause_s)
        self._pause = self._pause.after(self.last_pause_s)
        log.info(
            "a request moved",
            extra={"request": seq.request_id, "to": to.peer_id, "pause_s": round(self.last_pause_s, 4)},
        )
        return True


def _stop(engine: Engine, seq: Sequence) -> bool:
    """Takes a request out of the engine, between two of its tokens; False when it is not in it any more."""
    if engine.moves.progress(seq.request_id) is None:
        return False
    engine.release(seq)
    return True
