"""What users ask for: the ModelService, as plain values, and the only parser of its YAML form.

Every mistake gets one sentence that names file and field; unknown fields are refused, because a typing error in
`scaleDownSeconds` must not silently mean the default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import yaml

from layercast_operator.document import Section
from layercast_operator.errors import ModelServiceError

API_VERSION = "layercast.dev/v1alpha1"
KIND = "ModelService"
SOURCE_SCHEMES = ("file://", "gs://", "hf://", "pvc://", "s3://")
DTYPES = ("", "float32", "bfloat16", "float16")
ENGINES = ("auto", "generic", "fast")
# A replica id is `<name>-<6 characters>` and ends up in labels of 63 characters.
NAME_LENGTH_MAX = 50
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")


class ScalePolicy(Enum):
    """How a new replica comes into service."""

    LIVE = "live"
    """It executes the layers that it already holds (ZigZag)."""
    STOP_THE_WORLD = "stop-the-world"
    """It executes nothing before all of it is there; the baseline."""
    NETWORK = "network"
    """As stop-the-world, every replica from a complete copy over the network: nobody forwards."""
    HOST_CACHE = "host-cache"
    """As stop-the-world, from a copy in the host memory of its own node, of which every node keeps one (AllCache)."""
    TTL_CACHE = "ttl-cache"
    """As stop-the-world, from its own node: host memory if it served the model lately, else disk (ServerlessLLM)."""


CACHE_POLICIES = frozenset({ScalePolicy.HOST_CACHE, ScalePolicy.TTL_CACHE})
"""Those by which replicas never load from other nodes."""


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
class Queries:
    """PromQL of this ModelService alone; empty means the shipped expression."""

    prompt_tokens_waiting: str = ""
    requests_waiting: str = ""
    requests_in_flight: str = ""


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
    queries: Queries = field(default_factory=Queries)
    host_cache_s: float = 300.0
    """With `ttl-cache`: how long a node keeps a model in host memory that it serves no more."""


# Defaults are the constants of BlitzScale's released configurations (section 5.3 of the digest).
QUEUE_S = Band(low=0.5, high=0.7)
KV_UTILIZATION = Band(low=0.75, high=0.95)

UNSCALED = Scaling(
    replicas_min=0,
    replicas_max=0,
    mode=ScalingMode.RECOMMEND,
    policy=ScalePolicy.LIVE,
    queue_s=QUEUE_S,
    kv_utilization=KV_UTILIZATION,
    prefill_tokens_per_s=0.0,
    scale_down_s=0.0,
)
"""The targets by which a fixed number of replicas is divided into roles; it never decides about their number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleBounds:
    """How many replicas may have a role."""

    least: int = 1
    most: int = 0
    """0 means no other bound than that of all replicas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disaggregation:
    """Prompts are computed by some replicas and answers by others."""

    prefill: RoleBounds = field(default_factory=RoleBounds)
    decode: RoleBounds = field(default_factory=RoleBounds)


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
    step_tokens: int = 0
    """Most tokens of one step, over all requests; 0 means the device's own."""
    engine: str = "auto"
    """Block implementation: one of ENGINES."""
    prefix_caching: bool = True
    node_selector: Mapping[str, str] = field(default_factory=dict)
    """Labels that a node must have to take its replicas; empty means any node."""
    disaggregation: Disaggregation | None = None
    """None: every replica does both."""
    generation: int = 1
    """Grows with each change of the specification."""
    created_unix_s: int = 0
    problem: str = ""
    """Why a newer specification than this one is not in force; empty when this is the newest."""

    @property
    def policy(self) -> ScalePolicy:
        """How new replicas come into service; live where nothing else is said."""
        return self.scaling.policy if self.scaling is not None else ScalePolicy.LIVE


def parse_modelservice(text: str, *, file: str) -> ModelService:
    """The ModelService in `text`; `file` is only used to name it.

    Raises ModelServiceError with a sentence that names file and field.
    """
    return modelservice_of(_document(text, file=file), file=file)


def modelservice_of(document: object, *, file: str) -> ModelService:
    """The ModelService in a document that was read; `file` says in errors where it is from.

    Raises ModelServiceError with a sentence that names file and field.
    """
    root = Section(document, file=file, path="")
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


def _spec(spec: Section, name: str) -> ModelService:
    source = _source(spec.required_section("model"))
    replicas = spec.integer("replicas", 1, least=0)
    scaling_section = spec.section("scaling")
    scaling = None if scaling_section is None else _scaling(scaling_section)
    context_length, batch_size, step_tokens, engine, prefix_caching, grace_s = 0, 16, 0, "auto", True, 20.0
    serving = spec.section("serving")
    if serving is not None:
        context_length = serving.integer("contextLength", 0, least=0)
        batch_size = serving.integer("batchSize", 16, least=1)
        step_tokens = serving.integer("stepTokens", 0, least=0)
        engine = serving.choice("engine", ENGINES, "auto")
        prefix_caching = serving.boolean("prefixCaching", default=True)
        serving.done()
    drain = spec.section("drain")
    if drain is not None:
        grace_s = drain.number("graceSeconds", 20.0, least=0, most=3600)
        drain.done()
    parallelism = spec.section("parallelism")
    if parallelism is not None:
        ranks = parallelism.integer("tensorParallel", 1, least=1)
        if ranks > 1:
            raise parallelism.wrong(
                "tensorParallel", f"is {ranks}; this version serves a replica on one device"
            )
        parallelism.done()
    node_selector: dict[str, str] = {}
    placement = spec.section("placement")
    if placement is not None:
        node_selector = placement.texts("nodeSelector")
        placement.done()
    disaggregation = None
    roles = spec.section("disaggregation")
    if roles is not None:
        disaggregation = Disaggregation(prefill=_bounds(roles, "prefill"), decode=_bounds(roles, "decode"))
        roles.done()
    return ModelService(
        name=name,
        model=source,
        replicas=replicas,
        scaling=scaling,
        context_length=context_length,
        batch_size=batch_size,
        step_tokens=step_tokens,
        engine=engine,
        prefix_caching=prefix_caching,
        drain_grace_s=grace_s,
        node_selector=node_selector,
        disaggregation=disaggregation,
    )


def _bounds(roles: Section, name: str) -> RoleBounds:
    section = roles.section(name)
    if section is None:
        return RoleBounds()
    least, most = section.integer("min", 1, least=1), section.integer("max", 0, least=0)
    if 0 < most < least:
        raise section.wrong("max", f"is {most}, must be at least min, which is {least}, or 0")
    section.done()
    return RoleBounds(least=least, most=most)


def _source(section: Section) -> ModelSource:
    source = section.text("source")
    if not source.startswith(SOURCE_SCHEMES):
        listed = ", ".join(SOURCE_SCHEMES)
        raise section.wrong("source", f"is {source!r}, must start with one of {listed}")
    model = ModelSource(
        source=source, revision=section.text("revision", ""), dtype=section.choice("dtype", DTYPES, "")
    )
    section.done()
    return model


def _scaling(section: Section) -> Scaling:
    least = section.integer("min", 1, least=0)
    most = section.integer("max", least=1)
    if most < least:
        raise section.wrong("max", f"is {most}, must be at least min, which is {least}")
    mode = ScalingMode(section.choice("mode", [m.value for m in ScalingMode], ScalingMode.AUTO.value))
    policy = ScalePolicy(section.choice("policy", [p.value for p in ScalePolicy], ScalePolicy.LIVE.value))
    queue_s, kv_utilization, rate = QUEUE_S, KV_UTILIZATION, 0.0
    targets = section.section("targets")
    if targets is not None:
        queue_s = _band(targets, "queueSeconds", queue_s, most=3600)
        kv_utilization = _band(targets, "kvUtilization", kv_utilization, most=1)
        rate = targets.number("prefillTokensPerSecond", 0.0, least=0)
        targets.done()
    scale_down_s, host_cache_s = 10.0, 300.0  # the latter as in ServerlessLLM's evaluation
    windows = section.section("windows")
    if windows is not None:
        scale_down_s = windows.number("scaleDownSeconds", scale_down_s, least=0, most=86400)
        host_cache_s = windows.number("hostCacheSeconds", host_cache_s, least=0, most=86400)
        windows.done()
    queries = Queries()
    metrics = section.section("metrics")
    if metrics is not None:
        queries = Queries(
            prompt_tokens_waiting=metrics.text("promptTokensWaiting", ""),
            requests_waiting=metrics.text("requestsWaiting", ""),
            requests_in_flight=metrics.text("requestsInFlight", ""),
        )
        metrics.done()
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
        queries=queries,
        host_cache_s=host_cache_s,
    )


def _band(targets: Section, field: str, default: Band, *, most: float) -> Band:
    section = targets.section(field)
    if section is None:
        return default
    low = section.number("low", default.low, least=0.001, most=most)
    high = section.number("high", default.high, least=0.001, most=most)
    if high < low:
        raise section.wrong("high", f"is {high:g}, must be at least low, which is {low:g}")
    section.done()
    return Band(low=low, high=high)
