"""Requests of the OpenAI API: what is accepted, and what a client is told about the rest.

A body becomes a `GenerationRequest`, the same value for both endpoints. A field that would change the meaning of the
request and is not supported is refused by name, and so is one that nobody knows; a field that only annotates the
request (`user`, `metadata`, ...) is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import msgspec

from layercast_gateway.errors import ClientError, UnsupportedFieldError
from layercast_gateway.sampling import Sampling, SamplingFields, parse_sampling, within

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

# Fields that change the answer and are not supported, with the values that leave it as it is. Anything else is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "guided_whitespace_pattern": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}

ANNOTATIONS = frozenset(
    (
        "guided_decoding_backend",
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "priority",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    )
)
"""Fields that do not change what a right answer is; whatever their value, they are ignored."""


class StreamOptions(msgspec.Struct, kw_only=True):
    """`stream_options` of both endpoints."""

    include_usage: bool | None = None


class _SharedFields(SamplingFields, kw_only=True):
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    stop: str | list[str] | None = None
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
    sampling: Sampling
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
    top_logprobs = within("top_logprobs", fields.top_logprobs, 0, TOP_LOGPROBS_CHAT_MAX) or 0
    if fields.top_logprobs is not None and not fields.logprobs:
        raise ClientError("`top_logprobs` needs `logprobs` to be true.", param="top_logprobs")
    limit_name = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
    limit = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
    return GenerationRequest(
        kind=ApiKind.CHAT,
        messages=tuple(_message(index, message) for index, message in enumerate(fields.messages)),
        max_tokens=_limit(limit_name, limit, fields),
        logprobs=bool(fields.logprobs),
        top_logprobs=top_logprobs,
        echo=False,
        **_shared(fields),
    )


def parse_completion(body: bytes) -> GenerationRequest:
    """The request of a completion body. ClientError names the position or the field that is wrong."""
    fields = _decode(body, CompletionBody)
    top_logprobs = within("logprobs", fields.logprobs, 0, LOGPROBS_COMPLETION_MAX)
    if fields.echo and fields.logprobs is not None:
        raise UnsupportedFieldError("logprobs", hint="It cannot be combined with `echo`.")
    limit = COMPLETION_MAX_TOKENS_DEFAULT if fields.max_tokens is None else fields.max_tokens
    return GenerationRequest(
        kind=ApiKind.COMPLETION,
        prompts=_prompts(fields.prompt),
        max_tokens=_limit("max_tokens", limit, fields),
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
        _refuse_unsupported(raw, frozenset(body_type.__struct_fields__))
    try:
        return msgspec.convert(raw, body_type)
    except msgspec.ValidationError as error:
        found = _PATH.search(str(error))
        param = found[1] if found else None
        raise ClientError(f"The request is wrong: {error}.", param=param, code="invalid_type") from error


def _refuse_unsupported(raw: dict[str, Any], known: frozenset[str]) -> None:
    for name in raw:
        if name not in known and name not in NEUTRAL and name not in ANNOTATIONS:
            raise ClientError(f"Unknown parameter: `{name}`.", param=name, code="unknown_parameter")
    for name in sorted(raw.keys() & NEUTRAL.keys()):
        value = raw[name]
        same_type = (n for n in NEUTRAL[name] if isinstance(value, bool) == isinstance(n, bool))
        if name == "best_of" and value == (raw.get("n") or 1):
            continue  # all candidates are returned: the plain meaning of n
        if value is not None and value not in same_type:
            raise UnsupportedFieldError(name)


def _shared(fields: ChatBody | CompletionBody) -> dict[str, Any]:
    if fields.stream_options is not None and not fields.stream:
        raise ClientError("`stream_options` needs `stream` to be true.", param="stream_options")
    usage = fields.stream_options is not None and bool(fields.stream_options.include_usage)
    return {
        "model": fields.model,
        "choices": within("n", fields.n, 1, CHOICES_MAX) or 1,
        "stops": _stops(fields.stop),
        "sampling": parse_sampling(fields),
        "stream": bool(fields.stream),
        "include_usage": usage,
    }


def _limit(name: str, limit: int | None, fields: ChatBody | CompletionBody) -> int | None:
    """How many tokens the answer may have at most."""
    found = within(name, limit, 1, None)
    if found is not None and fields.min_tokens is not None and fields.min_tokens > found:
        raise ClientError(
            f"`min_tokens` is {fields.min_tokens}, more than `{name}`, which is {found}.", param="min_tokens"
        )
    return found


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
