"""One answer while it is produced: tokens in, pieces of final text out.

A `Choice` is told its tokens as they arrive and puts `Piece`s into the queue of its request. It stands between the
dispatcher, which knows tokens and replicas, and the HTTP handler, which knows clients: text is cut at a stop string
the moment it appears, however slowly the client reads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
from layercast.engine.v1alpha1 import engine_pb2

from layercast_gateway.detokenize import Detokenizer, StopMatcher
from layercast_gateway.errors import GatewayError
from layercast_gateway.replay import EndReason
from layercast_gateway.tokenizer import ModelText

CONTEXT_TOKENS = 8
"""Last tokens of a prompt that decide how the text behind it is written (a leading space)."""

PACE_S = 0.008
"""Least time between two writes to one client. Each is a call of the kernel, a third of what a token costs; nobody
reads 125 times a second, and a token that comes later than so after the one before does not wait at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log-probability of a token or of a candidate, natural logarithm."""

    token: bytes
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TextToken:
    """One token of the text with its alternatives, best first."""

    offset: int
    """Where its text starts, in characters of the answer."""
    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """News of one choice. Exactly one piece of a choice has `finish_reason` or `error`: its last.

    One is made for every token, and a frozen dataclass takes fifteen times as long to make.
    """

    index: int
    text: str = ""
    tokens: tuple[TextToken, ...] = ()
    finish_reason: str | None = None
    error: GatewayError | None = None

    @property
    def last(self) -> bool:
        """Nothing follows."""
        return self.finish_reason is not None or self.error is not None


class Pieces:
    """What the choices of one request have to say, in the order of arrival, until it is taken; bounded."""

    def __init__(
        self,
        most: int,
        *,
        wake_early: bool = True,
        pace_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Whoever takes is woken by every piece, or with `wake_early` false by the last one of a choice only.

        Two takes are at least `pace_s` apart, so what comes faster is taken together.
        """
        self._most = most
        self._wake_early = wake_early
        self._pace_s = pace_s
        self._clock = clock
        self._taken_at = -pace_s
        self._pieces: list[Piece] = []
        self._ready = False
        self._woken: asyncio.Future[None] | None = None

    def put(self, piece: Piece) -> None:
        """Adds news. QueueFull: more than can come of the request."""
        if len(self._pieces) >= self._most:
            raise asyncio.QueueFull
        self._pieces.append(piece)
        if not (self._wake_early or piece.last):
            return
        self._ready = True
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)
        self._woken = None

    async def take(self) -> list[Piece]:
        """All news since the last call, at least one; one task may wait at a time."""
        if not self._ready:
            self._woken = asyncio.get_running_loop().create_future()
            await self._woken
        if self._pace_s:
            early_s = self._taken_at + self._pace_s - self._clock()
            if early_s > 0:
                await asyncio.sleep(early_s)
            self._taken_at = self._clock()
        taken, self._pieces, self._ready = self._pieces, [], False
        return taken


class Choice:
    """The text of one choice. `token_count` is what usage counts: every token that belongs to the answer."""

    def __init__(
        self,
        *,
        index: int,
        text: ModelText,
        prompt: Sequence[int],
        continues_prompt: bool,
        stops: Sequence[str],
        pieces: Pieces,
        stop_token_ids: Sequence[int] = (),
        min_tokens: int = 0,
    ) -> None:
        """`continues_prompt` is true when the answer is one text with the prompt, as in a completion.

        `stop_token_ids` end this request beside the model's own ends and are no more text than those. Stop strings
        are not looked for in the first `min_tokens` tokens.
        """
        self._index = index
        self._text = text
        self._ends = frozenset((*text.stop_token_ids, *stop_token_ids))
        self._min_tokens = min_tokens
        self._detokenizer = Detokenizer(
            text.decode,
            before=prompt[-CONTEXT_TOKENS:] if continues_prompt and not text.joins_bytes else (),
            alone=text.decode_alone,
        )
        self._matcher = StopMatcher(stops) if stops else None
        self._pieces = pieces
        self._seen = 0
        self._released = 0
        self._waiting: list[TextToken] = []
        self.token_count = 0

    def on_tokens(self, token_ids: Sequence[int], logprobs: Sequence[engine_pb2.TokenLogprobs]) -> bool:
        """Takes new tokens; True when a stop string ended the text, so that nothing more is wanted."""
        texts: list[str] = []
        for position, token_id in enumerate(token_ids):
            self.token_count += 1
            if token_id in self._ends:
                continue  # the end is a sign, not a part of the text
            if position < len(logprobs):
                self._waiting.append(self._text_token(token_id, logprobs[position]))
            new = self._detokenizer.feed(token_id)
            self._seen += len(new)
            if self._matcher is None or self.token_count <= self._min_tokens:
                texts.append(new)
                continue
            cut = self._matcher.feed(new)
            texts.append(cut.text)
            if cut.stopped_by is not None:
                self._put("".join(texts), finish_reason=EndReason.STOP.value)
                return True
        self._put("".join(texts))
        return False

    def on_end(self, reason: EndReason) -> None:
        """The request ended well; what was held back is final now."""
        text = self._detokenizer.flush()
        if self._matcher is not None:
            cut = self._matcher.feed(text)
            if cut.stopped_by is not None:
                self._put(cut.text, finish_reason=EndReason.STOP.value)
                return
            text = cut.text + self._matcher.flush()
        self._put(text, finish_reason=reason.value, everything=True)

    def on_error(self, error: GatewayError) -> None:
        """The request ended without success."""
        self._pieces.put(Piece(index=self._index, error=error))

    def _put(self, text: str, *, finish_reason: str | None = None, everything: bool = False) -> None:
        self._released += len(text)
        ready: tuple[TextToken, ...] = ()
        if self._waiting:
            ready = tuple(t for t in self._waiting if everything or t.offset < self._released)
            self._waiting = self._waiting[len(ready) :]
        if text or ready or finish_reason is not None:
            self._pieces.put(Piece(index=self._index, text=text, tokens=ready, finish_reason=finish_reason))

    def _text_token(self, token_id: int, logprobs: engine_pb2.TokenLogprobs) -> TextToken:
        chosen = TokenLogprob(token=self._text.token_bytes(token_id), logprob=logprobs.logprob)
        top = tuple(
            TokenLogprob(token=self._text.token_bytes(c.token_id), logprob=c.logprob) for c in logprobs.top
        )
        return TextToken(offset=self._seen, chosen=chosen, top=top)


def pieces_max(*, choices: int, max_tokens: int) -> int:
    """Size of a request's queue that can never overflow: a piece for each token and one for each end."""
    return choices * (max_tokens + 1)
