"""How tokens are to be chosen, as clients say it: OpenAI's fields and those that vLLM adds, under their names.

Everything is checked here, before a request waits for anything; whether a token id exists is known only with the
model's tokenizer, and whether a grammar is right only where it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from layercast_gateway.errors import ClientError, UnsupportedFieldError

BIASES_MAX = 1024
STOP_TOKENS_MAX = 64
GUIDE_CHARACTERS_MAX = 64 * 1024

ANY_OBJECT = '{"type":"object"}'


class SamplingFields(msgspec.Struct, kw_only=True):
    """The part of both endpoints' bodies that says how tokens are chosen."""

    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    response_format: Any = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None
    structured_outputs: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """What the answer must look like: `kind` is "json_schema", "regex", "grammar" or "choice"."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen, checked. `top_k` 0 means all; `seed` None means any."""

    seed: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: tuple[int, ...]
    guide: Guide | None


def parse_sampling(fields: SamplingFields) -> Sampling:
    """The checked fields. ClientError names the field that is wrong."""
    top_p = _number("top_p", fields.top_p, 0, 1, default=1.0)
    if top_p == 0:
        raise ClientError("`top_p` must be above 0.", param="top_p")
    repetition = _number("repetition_penalty", fields.repetition_penalty, 0, 10, default=1.0)
    if repetition == 0:
        raise ClientError("`repetition_penalty` must be above 0.", param="repetition_penalty")
    guide = _guide(fields)
    if guide is not None and fields.ignore_eos:
        raise ClientError("`ignore_eos` and a guided answer exclude each other.", param="ignore_eos")
    return Sampling(
        seed=within("seed", fields.seed, -(2**63), 2**64 - 1),
        temperature=_number("temperature", fields.temperature, 0, 2, default=1.0),
        top_p=top_p,
        top_k=max(within("top_k", fields.top_k, -1, 2**31) or 0, 0),
        min_p=_number("min_p", fields.min_p, 0, 1, default=0.0),
        repetition_penalty=repetition,
        presence_penalty=_number("presence_penalty", fields.presence_penalty, -2, 2, default=0.0),
        frequency_penalty=_number("frequency_penalty", fields.frequency_penalty, -2, 2, default=0.0),
        logit_bias=_biases(fields.logit_bias or {}),
        min_tokens=within("min_tokens", fields.min_tokens, 0, 2**31) or 0,
        ignore_eos=bool(fields.ignore_eos),
        stop_token_ids=_stop_tokens(fields.stop_token_ids or []),
        guide=guide,
    )


_Number = TypeVar("_Number", int, float)


def within(name: str, value: _Number | None, least: int, most: int | None) -> _Number | None:
    """The value, or ClientError when it lies outside."""
    if value is None or (least <= value and (most is None or value <= most)):
        return value
    wanted = f"between {least} and {most}" if most is not None else f"at least {least}"
    raise ClientError(f"`{name}` is {value}; it must be {wanted}.", param=name, code="invalid_value")


def _number(name: str, value: float | None, least: int, most: int, *, default: float) -> float:
    found = within(name, value, least, most)
    return default if found is None else found


def _biases(biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    if len(biases) > BIASES_MAX:
        raise ClientError(
            f"`logit_bias` has {len(biases)} tokens; at most {BIASES_MAX} are allowed.", param="logit_bias"
        )
    found = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdecimal() and int(key) < 2**32):
            raise ClientError(f"`logit_bias` has the key {key!r}, which is no token id.", param="logit_bias")
        if not math.isfinite(bias) or abs(bias) > 100:
            raise ClientError(
                f"`logit_bias` of token {key} is {bias}; it must be between -100 and 100.",
                param="logit_bias",
                code="invalid_value",
            )
        found[int(key)] = bias
    return tuple(sorted(found.items()))


def _stop_tokens(ids: list[int]) -> tuple[int, ...]:
    if len(ids) > STOP_TOKENS_MAX or any(not 0 <= token_id < 2**32 for token_id in ids):
        raise ClientError(
            f"`stop_token_ids` must be at most {STOP_TOKENS_MAX} token ids.", param="stop_token_ids"
        )
    return tuple(sorted(set(ids)))


def _guide(fields: SamplingFields) -> Guide | None:
    """The one guide that was asked for, under whichever name."""
    given = ((name, getattr(fields, name), read) for name, read in _GUIDES.items())
    asked = {name: read(value) for name, value, read in given if value is not None}
    found = {name: guide for name, guide in asked.items() if guide is not None}
    if len(found) > 1:
        named = ", ".join(f"`{name}`" for name in found)
        raise ClientError(f"{named} exclude each other.", param=list(found)[1])
    for name, guide in found.items():
        if not 0 < len(guide.text) <= GUIDE_CHARACTERS_MAX:
            raise ClientError(
                f"`{name}` must have 1 to {GUIDE_CHARACTERS_MAX} characters.",
                param=name,
                code="invalid_value",
            )
        return guide
    return None


def _of_response_format(value: Any) -> Guide | None:
    if not isinstance(value, dict):
        raise ClientError("`response_format` must be an object.", param="response_format")
    match value.get("type"):
        case "text":
            return None
        case "json_object":
            return Guide(kind="json_schema", text=ANY_OBJECT)
        case "json_schema":
            named = value.get("json_schema")
            schema = named.get("schema") if isinstance(named, dict) else None
            if schema is None:
                where = "response_format.json_schema.schema"
                raise ClientError(f"`{where}` is missing.", param=where)
            return _of_schema("response_format.json_schema.schema", schema)
        case other:
            raise UnsupportedFieldError(
                "response_format.type",
                hint=f"The type {other!r} is not one of text, json_object, json_schema.",
            )


def _of_schema(name: str, schema: Any) -> Guide:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise ClientError(f"`{name}` is not JSON: {error}.", param=name) from error
    if not isinstance(schema, dict | bool):
        raise ClientError(f"`{name}` must be a JSON schema.", param=name)
    return Guide(kind="json_schema", text=json.dumps(schema, ensure_ascii=False))


def _of_text(kind: str, text: Any, name: str) -> Guide:
    if not isinstance(text, str):
        raise ClientError(f"`{name}` must be a text.", param=name)
    return Guide(kind=kind, text=text)


def _of_choices(name: str, choices: Any) -> Guide:
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise ClientError(f"`{name}` must be a list of texts, none of them empty.", param=name)
    return Guide(kind="choice", text=json.dumps(choices, ensure_ascii=False))


_STRUCTURED: dict[str, Callable[[Any], Guide | None]] = {
    "json": lambda value: _of_schema("structured_outputs.json", value),
    "json_object": lambda value: Guide(kind="json_schema", text=ANY_OBJECT) if value else None,
    "regex": lambda value: _of_text("regex", value, "structured_outputs.regex"),
    "grammar": lambda value: _of_text("grammar", value, "structured_outputs.grammar"),
    "choice": lambda value: _of_choices("structured_outputs.choice", value),
}
"""vLLM's newer name for guides: one object with one of these keys."""


def _of_structured(value: dict[str, Any]) -> Guide | None:
    asked = {key: inner for key, inner in value.items() if inner is not None}
    for key in asked.keys() - _STRUCTURED.keys():
        raise UnsupportedFieldError(f"structured_outputs.{key}")
    guides = [guide for key, inner in asked.items() if (guide := _STRUCTURED[key](inner)) is not None]
    if len(guides) > 1:
        raise ClientError("`structured_outputs` must have one constraint.", param="structured_outputs")
    return guides[0] if guides else None


_GUIDES: dict[str, Callable[[Any], Guide | None]] = {
    "response_format": _of_response_format,
    "guided_json": lambda value: _of_schema("guided_json", value),
    "guided_regex": lambda value: _of_text("regex", value, "guided_regex"),
    "guided_grammar": lambda value: _of_text("grammar", value, "guided_grammar"),
    "guided_choice": lambda value: _of_choices("guided_choice", value),
    "structured_outputs": _of_structured,
}
"""The fields of a request that guide its answer."""
