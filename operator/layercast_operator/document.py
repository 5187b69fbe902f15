"""Reads mappings that people wrote: each field once, by kind and limits, with one sentence for every mistake.

Pure. What a ModelService is made of is said in `modelservice`; this is only how such a document is read.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from layercast_operator.errors import ModelServiceError


class Section:
    """One mapping of the document. Every reader raises ModelServiceError with file and field."""

    def __init__(self, value: object, *, file: str, path: str) -> None:
        if not isinstance(value, Mapping):
            raise ModelServiceError(f"must be a mapping, not {kind_of(value)}", file=file, field=path)
        self._value: Mapping[Any, Any] = value
        self._file = file
        self._path = path
        self._known: list[str] = []

    def wrong(self, field: str, problem: str) -> ModelServiceError:
        """The error to raise about a field of this mapping."""
        return ModelServiceError(problem, file=self._file, field=f"{self._path}.{field}".lstrip("."))

    def _get(self, field: str) -> object:
        self._known.append(field)
        return self._value.get(field)

    def ignore(self, *fields: str) -> None:
        """Fields that may be there and are not looked at."""
        self._known.extend(fields)

    def section(self, field: str) -> Section | None:
        """A mapping below; None when it is not there."""
        value = self._get(field)
        if value is None:
            return None
        return Section(value, file=self._file, path=f"{self._path}.{field}".lstrip("."))

    def required_section(self, field: str) -> Section:
        """A mapping below that must be there."""
        section = self.section(field)
        if section is None:
            raise self.wrong(field, "is required")
        return section

    def texts(self, field: str) -> dict[str, str]:
        """A mapping of text to text; empty when it is not there."""
        value = self._get(field)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.wrong(field, f"must be a mapping, not {kind_of(value)}")
        for key, text in value.items():
            if not isinstance(key, str) or not isinstance(text, str):
                raise self.wrong(field, f"must map text to text; {key!r} does not")
        return dict(value)

    def text(self, field: str, default: str | None = None) -> str:
        """A text; required where there is no default."""
        value = self._get(field)
        if value is None:
            if default is None:
                raise self.wrong(field, "is required")
            return default
        if not isinstance(value, str):
            raise self.wrong(field, f"must be text, not {kind_of(value)}")
        return value

    def choice(self, field: str, choices: Sequence[str], default: str) -> str:
        """One of a few texts."""
        value = self.text(field, default)
        if value not in choices:
            listed = ", ".join(repr(choice) for choice in choices)
            raise self.wrong(field, f"is {value!r}, must be one of {listed}{did_you_mean(value, choices)}")
        return value

    def integer(self, field: str, default: int | None = None, *, least: int) -> int:
        """A whole number; required where there is no default."""
        value = self._get(field)
        if value is None:
            if default is None:
                raise self.wrong(field, "is required")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(field, f"must be a whole number, not {kind_of(value)}")
        if value < least:
            raise self.wrong(field, f"is {value}, must be at least {least}")
        return value

    def number(self, field: str, default: float, *, least: float, most: float | None = None) -> float:
        """A number within limits."""
        value = self._get(field)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise self.wrong(field, f"must be a number, not {kind_of(value)}")
        if value < least:
            raise self.wrong(field, f"is {value:g}, must be at least {least:g}")
        if most is not None and value > most:
            raise self.wrong(field, f"is {value:g}, must be at most {most:g}")
        return float(value)

    def boolean(self, field: str, *, default: bool) -> bool:
        """A yes or no."""
        value = self._get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(field, f"must be true or false, not {kind_of(value)}")
        return value

    def done(self) -> None:
        """Refuse what was not read: a typing error must not silently mean the default."""
        for field in self._value:
            if field not in self._known:
                hint = did_you_mean(str(field), self._known)
                raise self.wrong(str(field), f"is not a field of a ModelService{hint}")


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A hint, where a known word is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def kind_of(value: object) -> str:
    """What a value is, in the words of somebody who writes YAML."""
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
    }
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
