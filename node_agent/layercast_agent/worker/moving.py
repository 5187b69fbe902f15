"""Moves running requests to other replicas (`migration` decides), one task a request. On the asyncio thread only.

A request that decodes elsewhere begins to move with its prompt: the KV of each chunk goes over as groups of layers
leave it, while the engine computes the layers and chunks behind them (`follow`).

The source keeps generating while rounds bring what is known to the target, under a session there. At the end it stops
the request, and the target takes it with all its tokens and computes what is still missing. Whatever fails before that
leaves the request where it is; whatever fails after it sends the request to its gateway, which replays it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import grpc
import torch
from layercast.peer.v1alpha1 import peer_pb2 as pb

from layercast_agent.engine.engine import Engine
from layercast_agent.engine.moves import Follower, Piece
from layercast_agent.engine.sequence import Sequence
from layercast_agent.errors import AgentError
from layercast_agent.migration import LAST_TOKENS_MAX, Moved, RoundCosts, Step, by_tokens, next_step
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

PIECES_MAX = 32
"""Pieces that may wait for a slow link, some chunks of a prompt; what comes after them is brought in rounds."""

SILENCE_S = 0.5
"""How often it is looked whether a request whose prompt waits for its turn is still here."""


@dataclass(slots=True, kw_only=True)
class _Route:
    """A move under way: `held` counts for each layer the positions that are at the target."""

    seq: Sequence
    to: pb.Peer
    session: str
    held: list[int]
    by_kv: bool
    """The target is spared the computation even where that would be faster."""


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
        self.bytes_sent = 0
        self.moved = 0
        self.last_pause_s = 0.0
        self.pauses = Compared()
        self._pause = Mean()
        self._moving: set[str] = set()
        self._listening: dict[str, asyncio.Queue[Piece | None]] = {}

    def listen(self, seq: Sequence) -> None:
        """Keep the KV of a prompt from its first step on, until `move` or `forget`. Before it enters the engine."""
        pieces = self._listening[seq.request_id] = asyncio.Queue()
        follower = _into(pieces, asyncio.get_running_loop())
        self._desk.tell(lambda engine: engine.moves.follow(seq.request_id, follower))

    def forget(self, seq: Sequence) -> None:
        """Whatever was kept for the request; unknown ones succeed."""
        self._listening.pop(seq.request_id, None)
        self._desk.tell(lambda engine: engine.moves.unfollow(seq.request_id))

    async def move(self, seq: Sequence, to: pb.Peer, *, from_prompt: bool = False) -> bool:
        """Whether the request is the other replica's now. It is where it was otherwise, ended, or at its gateway.

        `from_prompt`: it begins here and decodes there.
        """
        if seq.sampling.logprobs:
            return False  # its tokens so far would have to be told again with theirs
        if seq.request_id in self._moving:
            return False  # somebody else sees to it
        session = f"{self._me.peer_id}/m/{seq.request_id}/{seq.attempt}"
        route = _Route(seq=seq, to=to, session=session, held=[0] * self._layers, by_kv=from_prompt)
        self._moving.add(seq.request_id)
        try:
            if from_prompt:
                await self._follow(route)
            held = await self._bring(route)
            if held is None:
                await self._stages.end_at(to, session)
                return False
            return await self._hand_over(seq, to, session, held)
        except AgentError as error:
            log.info("a request cannot move", extra={"request": seq.request_id, "reason": str(error)})
            await self._stages.end_at(to, session)
            return False
        finally:
            self._moving.discard(seq.request_id)

    async def _follow(self, route: _Route) -> None:
        """Brings the KV of a prompt while it is computed; returns with its last piece."""
        seq = route.seq
        if seq.request_id not in self._listening:
            self.listen(seq)
        pieces = self._listening[seq.request_id]
        try:
            while self._desk.holds(seq):
                try:
                    async with asyncio.timeout(SILENCE_S):
                        piece = await pieces.get()
                except TimeoutError:
                    continue
                if piece is None:
                    return
                await self._forward(route, piece)
        finally:
            self.forget(seq)

    async def _forward(self, route: _Route, piece: Piece) -> None:
        held = min(route.held[piece.first : piece.last])
        if held < piece.start:
            # Found in the prefix cache, or computed before anybody followed.
            await self._rows(route, first=piece.first, last=piece.last, start=held, stop=piece.start)
        await self._send(
            route, piece.kv, first=piece.first, last=piece.last, start=piece.start, stop=piece.stop
        )

    async def _bring(self, route: _Route) -> int | None:
        """Rounds until the rest is small; positions at the target. None when the request ended meanwhile."""
        seq = route.seq
        begun = min(route.held)
        moved = Moved(computed=0, held=begun, prefilling=True)
        while self._desk.holds(seq):
            progress = await self._desk.ask(lambda engine: engine.moves.progress(seq.request_id))
            if progress is None:
                return None
            moved = replace(moved, computed=progress.computed, prefilling=progress.prefilling)
            # Whoever decodes is not given what it has no pages for: a session there, however small, says that it has.
            rest_max = 0 if route.by_kv and moved.held == 0 else LAST_TOKENS_MAX
            match next_step(moved, last_tokens_max=rest_max):
                case Step.LAST:
                    return moved.held
                case Step.WAIT:
                    await asyncio.sleep(WAIT_S)
                case Step.ROUND:
                    stop = min(moved.computed, moved.held + ROUND_TOKENS_MAX)
                    await self._round(route, moved.held, stop)
                    moved = replace(moved, held=stop)
                    if stop == moved.computed and not moved.prefilling:  # else a piece of a longer round
                        moved = replace(moved, rounds=moved.rounds + 1, last_round=stop - begun)
                        begun = stop
        return None

    async def _round(self, route: _Route, start: int, stop: int) -> None:
        costs = RoundCosts(
            positions=stop - start,
            row_bytes=self._row_bytes * self._layers,
            bytes_per_s=self.bytes_per_s,
            prefill_tokens_per_s=self._look().prefill_tokens_per_s,
        )
        if not route.by_kv and by_tokens(costs):
            request = self._extension(route, start)
            request.token_ids.extend(route.seq.tokens(start, stop))
            await self._stages.extend_at(route.to, request)
            return
        await self._rows(route, first=0, last=self._layers, start=start, stop=stop)

    async def _rows(self, route: _Route, *, first: int, last: int, start: int, stop: int) -> None:
        """KV that is complete here."""
        seq = route.seq
        state = await self._desk.ask(
            lambda engine: engine.moves.rows(seq.request_id, first=first, last=last, start=start, stop=stop)
        )
        await self._send(route, state, first=first, last=last, start=start, stop=stop)

    async def _send(
        self, route: _Route, kv: torch.Tensor, *, first: int, last: int, start: int, stop: int
    ) -> None:
        with self._stages.lent(kv) as (region, crc32):
            request = self._extension(route, start)
            request.first_layer, request.last_layer = first, last
            request.crc32 = crc32
            request.state.CopyFrom(region)
            began = time.monotonic()
            await self._stages.extend_at(route.to, request)
        rate = kv.numel() / max(time.monotonic() - began, 1e-6)
        self.bytes_per_s += (rate - self.bytes_per_s) * (0.3 if self.bytes_per_s else 1.0)
        self.bytes_sent += kv.numel()
        route.held[first:last] = [stop] * (last - first)

    def _extension(self, route: _Route, start: int) -> pb.ExtendSessionRequest:
        seq = route.seq
        return pb.ExtendSessionRequest(
            session=route.session,
            digest=self._digest,
            start=start,
            positions_max=min(self._positions_max, len(seq.prompt) + seq.sampling.max_tokens),
            giver=self._me,
        )

    async def _hand_over(self, seq: Sequence, to: pb.Peer, session: str, held: int) -> bool:
        """The last pause: from here on the request runs nowhere until the target has it."""
        began = time.monotonic()
        stopped = await self._desk.ask(lambda engine: _stop(engine, seq))
        if not stopped or not self._desk.holds(seq):
            await self._stages.end_at(to, session)
            return False
        handoff = pb.Handoff(
            request=wire.request_of(seq, model=self._desk.model), positions=held, session=session
        )
        handoff.request.ClearField("decode_at")  # it is there then, or wherever a drain sent it
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
        self._desk.disown(seq)
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


def _into(pieces: asyncio.Queue[Piece | None], loop: asyncio.AbstractEventLoop) -> Follower:
    """Brings what a follower is told, on the engine's thread, to the event loop; no more than may wait."""

    def follower(piece: Piece | None) -> bool:
        # The size is another thread's, so the bound may be passed by a piece or two.
        if piece is not None and pieces.qsize() >= PIECES_MAX:
            piece = None
        with contextlib.suppress(RuntimeError):  # the process is ending and its event loop is closed
            loop.call_soon_threadsafe(pieces.put_nowait, piece)
        return piece is not None

    return follower
