"""What users ask for: the ModelService, as plain values, and the only parser of its YAML form.

Every mistake gets one sentence that names file and field; unknown fields are refused, because a typing error in
`scaleDownSeconds` must not silently mean the default.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import yaml

from layercast_operator.errors import ModelServiceError

API_VERSION = "layercast.dev/v1alpha1"
KIND = "ModelService"
SOURCE_SCHEMES = ("file://", "hf://", "pvc://")
DTYPES = ("", "float32", "bfloat16", "float16")
# A replica id is `<name>-<6 characters>` and ends up in labels of 63 characters.
NAME_LENGTH_MAX = 50
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")


class ScalePolicy(Enum):
    """How a new replica comes into service."""

    LIVE = "live"
    """It executes the layers that it already holds (ZigZag)."""
    STOP_THE_WORLD = "stop-the-world"
    """It executes nothing before all of it is there; the baseline."""


class ScalingMode(Enum):
    """What is done with a decision of the policy."""

    AUTO = "Auto"
    RECOMMEND = "Recommend"


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A target as a range: below `low` is too little, above `high` too much."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where the parameters come from."""

    source: str
    revision: str
    dtype: str

    @property
    def key(self) -> str:
        """The key of PrepareCheckpoint: one key, one (source, revision, dtype)."""
        return f"{self.source}@{self.revision or 'default'}+{self.dtype or 'own'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """How the number of replicas follows demand."""

    replicas_min: int
    replicas_max: int
    mode: ScalingMode
    policy: ScalePolicy
    queue_s: Band
    """Seconds of prefill work that may wait."""
    kv_utilization: Band
    """Share of KV pages in use, in (0, 1]."""
    prefill_tokens_per_s: float
    """Of one replica; 0 means measured."""
    scale_down_s: float
    """How long demand must be low before one replica goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelService:
    """One deployed model, as wanted."""

    name: str
    model: ModelSource
    replicas: int
    scaling: Scaling | None
    context_length: int
    """Longest sequence in tokens; 0 means the checkpoint's own."""
    batch_size: int
    drain_grace_s: float
    generation: int = 1
    """Grows with each change of the specification."""
    created_unix_s: int = 0
    problem: str = ""
    """Why a newer specification than this one is not in force; empty when this is the newest."""

    @property
    def policy(self) -> ScalePolicy:
        """How new replicas come into service; live where nothing else is said."""
        return self.scaling.policy if self.scaling is not None else ScalePolicy.LIVE


class _Section:
    """One mapping of the document: reads each field once, then refuses what was not read."""

    def __init__(self, value: object, *, file: str, path: str) -> None:
        if not isinstance(value, Mapping):
            raise ModelServiceError(f"must be a mapping, not {_kind(value)}", file=file, field=path)
        self._value: Mapping[Any, Any] = value
        self._file = file
        self._path = path
        self._known: list[str] = []

    def wrong(self, field: str, problem: str) -> ModelServiceError:
        return ModelServiceError(problem, file=self._file, field=f"{self._path}.{field}".lstrip("."))

    def _get(self, field: str) -> object:
        self._known.append(field)
        return self._value.get(field)

    def ignore(self, *fields: str) -> None:
        self._known.extend(fields)

    def section(self, field: str) -> _Section | None:
        value = self._get(field)
        if value is None:
            return None
        return _Section(value, file=self._file, path=f"{self._path}.{field}".lstrip("."))

    def required_section(self, field: str) -> _Section:
        section = self.section(field)
        if section is None:
            raise self.wrong(field, "is required")
        return section

    def text(self, field: str, default: str | None = None) -> str:
        value = self._get(field)
        if value is None:
            if default is None:
                raise self.wrong(field, "is required")
            return default
        if not isinstance(value, str):
            raise self.wrong(field, f"must be text, not {_kind(value)}")
        return value

    def choice(self, field: str, choices: Sequence[str], default: str) -> str:
        value = self.text(field, default)
        if value not in choices:
            listed = ", ".join(repr(choice) for choice in choices)
            raise self.wrong(field, f"is {value!r}, must be one of {listed}{_did_you_mean(value, choices)}")
        return value

    def integer(self, field: str, default: int | None = None, *, least: int) -> int:
        value = self._get(field)
        if value is None:
            if default is None:
                raise self.wrong(field, "is required")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(field, f"must be a whole number, not {_kind(value)}")
        if value < least:
            raise self.wrong(field, f"is {value}, must be at least {least}")
        return value

    def number(self, field: str, default: float, *, least: float, most: float | None = None) -> float:
        value = self._get(field)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise self.wrong(field, f"must be a number, not {_kind(value)}")
        if value < least:
            raise self.wrong(field, f"is {value:g}, must be at least {least:g}")
        if most is not None and value > most:
            raise self.wrong(field, f"is {value:g}, must be at most {most:g}")
        return float(value)

    def done(self) -> None:
        for field in self._value:
            if field not in self._known:
                hint = _did_you_mean(str(field), self._known)
                raise self.wrong(str(field), f"is not a field of a ModelService{hint}")


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _kind(value: object) -> str:
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
    }
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def parse_modelservice(text: str, *, file: str) -> ModelService:
    """The ModelService in `text`; `file` is only used to name it.

    Raises ModelServiceError with a sentence that names file and field.
    """
    root = _Section(_document(text, file=file), file=file, path="")
    if root.text("apiVersion") != API_VERSION:
        raise root.wrong("apiVersion", f"must be {API_VERSION!r}")
    if root.text("kind") != KIND:
        raise root.wrong("kind", f"must be {KIND!r}")
    metadata = root.required_section("metadata")
    metadata.ignore("labels", "annotations", "namespace")
    name = metadata.text("name")
    if not _NAME.fullmatch(name) or len(name) > NAME_LENGTH_MAX:
        rule = f"at most {NAME_LENGTH_MAX} small letters, digits, '-' and '.', a letter or digit at both ends"
        raise metadata.wrong("name", f"is {name!r}, must be {rule}")
    metadata.done()
    spec = root.required_section("spec")
    # kubectl output carries it; it is ours and not the user's.
    root.ignore("status")
    root.done()
    service = _spec(spec, name)
    spec.done()
    return service


def _document(text: str, *, file: str) -> object:
    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        raise ModelServiceError(f"is not YAML: {' '.join(str(error).split())}", file=file) from error
    if len(documents) != 1:
        raise ModelServiceError(f"must hold one ModelService, holds {len(documents)} documents", file=file)
    return documents[0]


def _spec(spec: _Section, name: str) -> ModelService:
    source = _source(spec.required_section("model"))
    replicas = spec.integer("replicas", 1, least=0)
    scaling_section = spec.section("scaling")
    scaling = None if scaling_section is None else _scaling(scaling_section)
    context_length, batch_size, grace_s = 0, 16, 20.0
    serving = spec.section("serving")
    if serving is not None:
        context_length = serving.integer("contextLength", 0, least=0)
        batch_size = serving.integer("batchSize", 16, least=1)
        serving.done()
    drain = spec.section("drain")
    if drain is not None:
        grace_s = drain.number("graceSeconds", 20.0, least=0, most=3600)
        drain.done()
    return ModelService(
        name=name,
        model=source,
        replicas=replicas,
        scaling=scaling,
        context_length=context_length,
        batch_size=batch_size,
        drain_grace_s=grace_s,
    )


def _source(section: _Section) -> ModelSource:
    source = section.text("source")
    if not source.startswith(SOURCE_SCHEMES):
        listed = ", ".join(SOURCE_SCHEMES)
        raise section.wrong("source", f"is {source!r}, must start with one of {listed}")
    model = ModelSource(
        source=source, revision=section.text("revision", ""), dtype=section.choice("dtype", DTYPES, "")
    )
    section.done()
    return model


def _scaling(section: _Section) -> Scaling:
    least = section.integer("min", 1, least=0)
    most = section.integer("max", least=1)
    if most < least:
        raise section.wrong("max", f"is {most}, must be at least min, which is {least}")
    mode = ScalingMode(section.choice("mode", [m.value for m in ScalingMode], ScalingMode.AUTO.value))
    policy = ScalePolicy(section.choice("policy", [p.value for p in ScalePolicy], ScalePolicy.LIVE.value))
    # Defaults are the constants of BlitzScale's released configurations (section 5.3 of the digest).
    queue_s, kv_utilization, rate = Band(low=0.5, high=0.7), Band(low=0.75, high=0.95), 0.0
    targets = section.section("targets")
    if targets is not None:
        queue_s = _band(targets, "queueSeconds", queue_s, most=3600)
        kv_utilization = _band(targets, "kvUtilization", kv_utilization, most=1)
        rate = targets.number("prefillTokensPerSecond", 0.0, least=0)
        targets.done()
    scale_down_s = 10.0
    windows = section.section("windows")
    if windows is not None:
        scale_down_s = windows.number("scaleDownSeconds", scale_down_s, least=0, most=86400)
        windows.done()
    section.done()
    return Scaling(
        replicas_min=least,
        replicas_max=most,
        mode=mode,
        policy=policy,
        queue_s=queue_s,
        kv_utilization=kv_utilization,
        prefill_tokens_per_s=rate,
        scale_down_s=scale_down_s,
    )


def _band(targets: _Section, field: str, default: Band, *, most: float) -> Band:
    section = targets.section(field)
    if section is None:
        return default
    low = section.number("low", default.low, least=0.001, most=most)
    high = section.number("high", default.high, least=0.001, most=most)
    if high < low:
        raise section.wrong("high", f"is {high:g}, must be at least low, which is {low:g}")
    section.done()
    return Band(low=low, high=high)
