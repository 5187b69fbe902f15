"""Answers of the OpenAI API: bodies, server-sent events and errors, as plain JSON values.

One `AnswerShape` a request knows the fields that repeat in every chunk. Nothing here waits or decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from layercast_gateway.errors import GatewayError
from layercast_gateway.generation import Piece, TextToken, TokenLogprob
from layercast_gateway.openai import ApiKind

EVENT_DONE = b"data: [DONE]\n\n"

TEXT_MARK = "\0text\0"
"""Stands for the text of a chunk until it is known; neither a model's name nor an id has such characters."""

Json = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class ChoiceText:
    """A whole choice, gathered from its pieces."""

    text: str = ""
    tokens: list[TextToken] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        """Appends the next piece."""
        self.text += piece.text
        self.tokens.extend(piece.tokens)
        self.finish_reason = piece.finish_reason


def encode(value: Json | str) -> bytes:
    """JSON in UTF-8."""
    return msgspec.json.encode(value)


def event(value: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(value) + b"\n\n"


def error_body(error: GatewayError) -> Json:
    """OpenAI's error object."""
    return {
        "error": {
            "message": error.message,
            "type": error.error_type,
            "param": error.param,
            "code": error.code,
        }
    }


def model_body(*, name: str, created_unix_s: int) -> Json:
    """One entry of /v1/models."""
    return {"id": name, "object": "model", "created": created_unix_s, "owned_by": "layercast"}


def usage_body(*, prompt_tokens: int, completion_tokens: int) -> Json:
    """Token counts; the prompt of several choices counts once."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerShape:
    """Writes the answers of one request."""

    kind: ApiKind
    answer_id: str
    model: str
    created_unix_s: int
    logprobs: bool
    include_usage: bool
    _frames: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    """Of each choice: what stands before and behind the text of a chunk that has nothing but text."""

    def body(self, choices: Sequence[ChoiceText], usage: Json) -> Json:
        """The answer of a request that does not stream."""
        object_name = "chat.completion" if self.kind is ApiKind.CHAT else "text_completion"
        return {
            **self._head(object_name),
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": usage,
        }

    def opening(self, index: int, echo: str) -> bytes:
        """The first event of a choice: the role of a chat, the prompt of an echoed completion, else nothing."""
        if self.kind is ApiKind.CHAT:
            return self._chunk(index, {"delta": {"role": "assistant", "content": ""}, "logprobs": None}, None)
        if echo:
            return self._chunk(index, {"text": echo, "logprobs": None}, None)
        return b""

    def chunk(self, piece: Piece) -> bytes:
        """The events of one piece. The end of a chat is an event of its own, without content."""
        if piece.finish_reason is None and not self.logprobs:
            frame = self._frames.get(piece.index) or self._frame(piece.index)
            return frame[0] + encode(piece.text) + frame[1]
        logprobs = self._logprobs(piece.tokens)
        if self.kind is ApiKind.COMPLETION:
            return self._text_chunk(piece.index, piece.text, logprobs, piece.finish_reason)
        events = b""
        if piece.text or piece.tokens:
            events = self._text_chunk(piece.index, piece.text, logprobs, None)
        if piece.finish_reason is not None:
            events += self._chunk(piece.index, {"delta": {}, "logprobs": None}, piece.finish_reason)
        return events

    def closing(self, usage: Json) -> bytes:
        """The end of a stream that went well, with usage when it was asked for."""
        if not self.include_usage:
            return EVENT_DONE
        return event({**self._head(self._chunk_object()), "choices": [], "usage": usage}) + EVENT_DONE

    def _head(self, object_name: str) -> Json:
        return {
            "id": self.answer_id,
            "object": object_name,
            "created": self.created_unix_s,
            "model": self.model,
            "system_fingerprint": None,
        }

    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self.kind is ApiKind.CHAT else "text_completion"

    def _chunk(self, index: int, content: Json, finish_reason: str | None) -> bytes:
        choice = {"index": index, **content, "finish_reason": finish_reason}
        usage = {"usage": None} if self.include_usage else {}
        return event({**self._head(self._chunk_object()), "choices": [choice], **usage})

    def _text_chunk(self, index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> bytes:
        said: Json = {"text": text} if self.kind is ApiKind.COMPLETION else {"delta": {"content": text}}
        return self._chunk(index, {**said, "logprobs": logprobs}, finish_reason)

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        head, _, tail = self._text_chunk(index, TEXT_MARK, None, None).partition(encode(TEXT_MARK))
        self._frames[index] = head, tail
        return head, tail

    def _choice(self, index: int, choice: ChoiceText) -> Json:
        logprobs = self._logprobs(choice.tokens)
        rest = {"index": index, "logprobs": logprobs, "finish_reason": choice.finish_reason}
        if self.kind is ApiKind.CHAT:
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            return {**rest, "message": message}
        return {**rest, "text": choice.text}

    def _logprobs(self, tokens: Sequence[TextToken]) -> Json | None:
        if not self.logprobs:
            return None
        if self.kind is ApiKind.CHAT:
            return {"content": [_chat_logprob(token) for token in tokens], "refusal": None}
        return {
            "tokens": [_token_text(token.chosen) for token in tokens],
            "token_logprobs": [token.chosen.logprob for token in tokens],
            "top_logprobs": [{_token_text(t): t.logprob for t in token.top} for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


class EventStream:
    """The events of one stream, from whatever pieces there are at a time."""

    def __init__(self, shape: AnswerShape, echoes: Sequence[str]) -> None:
        """One entry of `echoes` a choice, empty without an echo."""
        self._shape = shape
        self._echoes = echoes
        self._opened: set[int] = set()
        self.running = len(echoes)
        """Choices that have not ended; 0 after an error."""
        self.error: GatewayError | None = None
        """What ended the stream behind the events that were given out."""

    def take(self, pieces: Iterable[Piece]) -> bytes:
        """The events of these pieces, up to an error."""
        events = []
        for piece in pieces:
            if piece.error is not None:
                self.error, self.running = piece.error, 0
                break
            if piece.index not in self._opened:
                self._opened.add(piece.index)
                events.append(self._shape.opening(piece.index, self._echoes[piece.index]))
            events.append(self._shape.chunk(piece))
            self.running -= piece.last
        return b"".join(events)


def _chat_logprob(token: TextToken) -> Json:
    return {**_logprob(token.chosen), "top_logprobs": [_logprob(candidate) for candidate in token.top]}


def _logprob(token: TokenLogprob) -> Json:
    return {"token": _token_text(token), "logprob": token.logprob, "bytes": list(token.token)}


def _token_text(token: TokenLogprob) -> str:
    return token.token.decode("utf-8", "replace")
