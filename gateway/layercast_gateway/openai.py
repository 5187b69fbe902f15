"""Requests of the OpenAI API: what is accepted, and what a client is told about the rest.

A body becomes a `GenerationRequest`, the same value for both endpoints. A field that would change the meaning of the
request and is not supported is refused by name; a field that only annotates it (`user`, `metadata`, ...) is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import msgspec

from layercast_gateway.errors import ClientError, UnsupportedFieldError

CHOICES_MAX = 8
STOPS_MAX = 16
STOP_CHARACTERS_MAX = 1024
PROMPTS_MAX = 64
TOP_LOGPROBS_CHAT_MAX = 20
LOGPROBS_COMPLETION_MAX = 5
COMPLETION_MAX_TOKENS_DEFAULT = 16
"""OpenAI's default for /v1/completions; a chat answer may fill the context."""

_POSITION = re.compile(r"\(byte (\d+)\)")
_PATH = re.compile(r" - at `\$\.?(.*)`$")

# Fields that change the answer, with the values that leave it as it is. Anything else is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "use_beam_search": (False,),
    "web_search_options": (),
}


class StreamOptions(msgspec.Struct, kw_only=True):
    """`stream_options` of both endpoints."""

    include_usage: bool | None = None


class _SharedFields(msgspec.Struct, kw_only=True):
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None


class Message(msgspec.Struct, kw_only=True):
    """One message of a conversation."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


class ChatBody(_SharedFields, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class CompletionBody(_SharedFields, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[Any]
    logprobs: int | None = None
    echo: bool | None = None


class ApiKind(Enum):
    """Which endpoint was called."""

    CHAT = "chat"
    COMPLETION = "completion"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What a client wants, checked but for what depends on the model."""

    kind: ApiKind
    model: str
    messages: tuple[dict[str, str], ...] = ()
    """Of a chat: role and content of each message."""
    prompts: tuple[str | tuple[int, ...], ...] = ()
    """Of a completion: each a text or token ids."""
    choices: int
    """Answers to each prompt (`n`)."""
    stops: tuple[str, ...]
    seed: int | None
    temperature: float
    top_p: float
    top_k: int
    """0 means all."""
    max_tokens: int | None
    """None means as many as fit the context."""
    logprobs: bool
    top_logprobs: int
    echo: bool
    stream: bool
    include_usage: bool
    """Only with `stream`; otherwise usage is always told."""


_Body = TypeVar("_Body", ChatBody, CompletionBody)


def parse_chat(body: bytes) -> GenerationRequest:
    """The request of a chat body. ClientError names the position or the field that is wrong."""
    fields = _decode(body, ChatBody)
    if not fields.messages:
        raise ClientError("`messages` must not be empty.", param="messages")
    top_logprobs = _within("top_logprobs", fields.top_logprobs, 0, TOP_LOGPROBS_CHAT_MAX) or 0
    if fields.top_logprobs is not None and not fields.logprobs:
        raise ClientError("`top_logprobs` needs `logprobs` to be true.", param="top_logprobs")
    limit_name = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
    limit = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
    return GenerationRequest(
        kind=ApiKind.CHAT,
        messages=tuple(_message(index, message) for index, message in enumerate(fields.messages)),
        max_tokens=_within(limit_name, limit, 1, None),
        logprobs=bool(fields.logprobs),
        top_logprobs=top_logprobs,
        echo=False,
        **_shared(fields),
    )


def parse_completion(body: bytes) -> GenerationRequest:
    """The request of a completion body. ClientError names the position or the field that is wrong."""
    fields = _decode(body, CompletionBody)
    top_logprobs = _within("logprobs", fields.logprobs, 0, LOGPROBS_COMPLETION_MAX)
    if fields.echo and fields.logprobs is not None:
        raise UnsupportedFieldError("logprobs", hint="It cannot be combined with `echo`.")
    limit = COMPLETION_MAX_TOKENS_DEFAULT if fields.max_tokens is None else fields.max_tokens
    return GenerationRequest(
        kind=ApiKind.COMPLETION,
        prompts=_prompts(fields.prompt),
        max_tokens=_within("max_tokens", limit, 1, None),
        logprobs=top_logprobs is not None,
        top_logprobs=top_logprobs or 0,
        echo=bool(fields.echo),
        **_shared(fields),
    )


def _decode(body: bytes, body_type: type[_Body]) -> _Body:
    try:
        raw = msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        found = _POSITION.search(str(error))
        position = int(found[1]) if found else len(body)
        detail = _POSITION.sub("", str(error)).strip()
        raise ClientError(
            f"The body is not valid JSON at byte {position}: {detail}.", code="invalid_json"
        ) from error
    except RecursionError as error:
        raise ClientError("The body is nested too deeply.", code="invalid_json") from error
    if isinstance(raw, dict):
        _refuse_unsupported(raw)
    try:
        return msgspec.convert(raw, body_type)
    except msgspec.ValidationError as error:
        found = _PATH.search(str(error))
        param = found[1] if found else None
        raise ClientError(f"The request is wrong: {error}.", param=param, code="invalid_type") from error


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    for name in sorted(raw.keys() & NEUTRAL.keys()):
        value = raw[name]
        same_type = (n for n in NEUTRAL[name] if isinstance(value, bool) == isinstance(n, bool))
        if name == "best_of" and value == (raw.get("n") or 1):
            continue  # all candidates are returned: the plain meaning of n
        if value is not None and value not in same_type:
            raise UnsupportedFieldError(name)


def _shared(fields: ChatBody | CompletionBody) -> dict[str, Any]:
    temperature = _within("temperature", fields.temperature, 0, 2)
    top_p = _within("top_p", fields.top_p, 0, 1)
    if top_p == 0:
        raise ClientError("`top_p` must be above 0.", param="top_p")
    top_k = _within("top_k", fields.top_k, -1, 2**31)
    if fields.stream_options is not None and not fields.stream:
        raise ClientError("`stream_options` needs `stream` to be true.", param="stream_options")
    usage = fields.stream_options is not None and bool(fields.stream_options.include_usage)
    return {
        "model": fields.model,
        "choices": _within("n", fields.n, 1, CHOICES_MAX) or 1,
        "stops": _stops(fields.stop),
        "seed": _within("seed", fields.seed, -(2**63), 2**64 - 1),
        "temperature": 1.0 if temperature is None else temperature,
        "top_p": 1.0 if top_p is None else top_p,
        "top_k": max(top_k or 0, 0),
        "stream": bool(fields.stream),
        "include_usage": usage,
    }


_Number = TypeVar("_Number", int, float)


def _within(name: str, value: _Number | None, least: int, most: int | None) -> _Number | None:
    if value is None or (least <= value and (most is None or value <= most)):
        return value
    wanted = f"between {least} and {most}" if most is not None else f"at least {least}"
    raise ClientError(f"`{name}` is {value}; it must be {wanted}.", param=name, code="invalid_value")


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > STOPS_MAX:
        raise ClientError(f"`stop` has {len(stops)} strings; at most {STOPS_MAX} are allowed.", param="stop")
    if any(not text or len(text) > STOP_CHARACTERS_MAX for text in stops):
        wanted = f"Each string of `stop` must have 1 to {STOP_CHARACTERS_MAX} characters."
        raise ClientError(wanted, param="stop")
    return tuple(stops)


def _message(index: int, message: Message) -> dict[str, str]:
    where = f"messages[{index}]"
    if message.role not in ("system", "developer", "user", "assistant"):
        raise UnsupportedFieldError(f"{where}.role", hint=f"The role `{message.role}` is not known.")
    for name in ("tool_calls", "function_call"):
        if getattr(message, name):
            raise UnsupportedFieldError(f"{where}.{name}")
    # `developer` is the newer name of `system`; templates know only the latter.
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": _content(f"{where}.content", message.content)}


def _content(where: str, content: str | Sequence[dict[str, Any]] | None) -> str:
    if content is None:
        raise ClientError(f"`{where}` must be a text.", param=where)
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        if part.get("type") != "text":
            raise UnsupportedFieldError(f"{where}[{index}].type", hint="Only parts of type `text` are.")
        if not isinstance(part.get("text"), str):
            raise ClientError(f"`{where}[{index}].text` must be a string.", param=f"{where}[{index}].text")
        texts.append(part["text"])
    return "".join(texts)


def _prompts(prompt: str | list[Any]) -> tuple[str | tuple[int, ...], ...]:
    """A text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return (prompt,)
    if not prompt:
        raise ClientError("`prompt` must not be empty.", param="prompt")
    if _are_ids(prompt):
        return (tuple(prompt),)
    if len(prompt) > PROMPTS_MAX:
        raise ClientError(
            f"`prompt` has {len(prompt)} prompts; at most {PROMPTS_MAX} are allowed.", param="prompt"
        )
    prompts: list[str | tuple[int, ...]] = []
    for index, entry in enumerate(prompt):
        if isinstance(entry, str):
            prompts.append(entry)
        elif isinstance(entry, list) and entry and _are_ids(entry):
            prompts.append(tuple(entry))
        else:
            wanted = f"`prompt[{index}]` must be a text or a list of token ids."
            raise ClientError(wanted, param=f"prompt[{index}]")
    return tuple(prompts)


def _are_ids(entries: Sequence[Any]) -> bool:
    return all(isinstance(e, int) and not isinstance(e, bool) and 0 <= e < 2**32 for e in entries)
