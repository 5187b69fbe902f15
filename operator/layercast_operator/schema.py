"""The words in which a structural schema of Kubernetes is written: one function a kind of field. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Schema = dict[str, Any]


def mapping(
    text: str,
    fields: Mapping[str, Schema],
    *,
    required: Sequence[str] = (),
    rules: Sequence[Schema] = (),
    filled: bool = False,
) -> Schema:
    """A mapping of known fields. `filled`: where it is missing, it is there with its fields' defaults."""
    schema: Schema = {"type": "object", "description": text, "properties": dict(fields)}
    schema |= {"required": list(required)} if required else {}
    schema |= {"default": {}} if filled else {}
    return schema | ({"x-kubernetes-validations": list(rules)} if rules else {})


def text(text: str, **more: Any) -> Schema:
    """A text."""
    return {"type": "string", "description": text, **more}


def boolean(text: str, **more: Any) -> Schema:
    """Yes or no."""
    return {"type": "boolean", "description": text, **more}


def int32(text: str, **more: Any) -> Schema:
    """A whole number of 32 bits."""
    return {"type": "integer", "format": "int32", "description": text, **more}


def int64(text: str) -> Schema:
    """A whole number of 64 bits."""
    return {"type": "integer", "format": "int64", "description": text}


def number(text: str, **more: Any) -> Schema:
    """A number."""
    return {"type": "number", "format": "double", "description": text, **more}


def moment(text: str) -> Schema:
    """A moment, RFC 3339."""
    return {"type": "string", "format": "date-time", "description": text}


def sequence(text: str, items: Schema, key: str = "") -> Schema:
    """A list: by a key where its items have one, else replaced as a whole."""
    kind = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}
    return {"type": "array", "description": text, "items": items} | (
        kind if key else {"x-kubernetes-list-type": "atomic"}
    )


def rule(rule: str, message: str, path: str = "") -> Schema:
    """A rule in CEL, with the sentence that tells of it."""
    return {"rule": rule, "message": message} | ({"fieldPath": path} if path else {})


def band(text: str, *, low: float, high: float, most: float) -> Schema:
    """A target as a range."""
    limits = {"minimum": 0.001, "maximum": most}
    return mapping(
        text,
        {
            "low": number("With less for each replica, one may go.", default=low, **limits),
            "high": number("With more for each replica, replicas are added.", default=high, **limits),
        },
        filled=True,
        rules=[rule("self.low <= self.high", "low must not be above high", ".low")],
    )
