"""The ModelService file: what is understood, and one clear sentence for each mistake."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from layercast_operator.errors import ModelServiceError
from layercast_operator.modelservice import (
    Band,
    ModelService,
    ScalePolicy,
    ScalingMode,
    parse_modelservice,
)

SAMPLE = """
apiVersion: layercast.dev/v1alpha1
kind: ModelService
metadata: {name: smollm2}
spec:
  model: {source: "file:///abs/path", revision: "", dtype: float32}
  replicas: 1
  scaling:
    min: 1
    max: 3
    mode: Auto
    policy: live
    targets: {queueSeconds: {low: 0.5, high: 0.7}, kvUtilization: {low: 0.75, high: 0.95}, prefillTokensPerSecond: 0}
    windows: {scaleDownSeconds: 10}
  serving: {contextLength: 2048, batchSize: 16, stepTokens: 512, engine: generic, prefixCaching: false}
  drain: {graceSeconds: 20}
"""


def parse(text: str) -> ModelService:
    return parse_modelservice(text, file="x.yaml")


def test_the_documented_sample() -> None:
    got = parse(SAMPLE)
    assert (got.name, got.replicas, got.context_length, got.batch_size) == ("smollm2", 1, 2048, 16)
    assert got.step_tokens == 512
    assert (got.engine, got.prefix_caching, got.drain_grace_s) == ("generic", False, 20.0)
    assert got.model.key == "file:///abs/path@default+float32"
    assert got.scaling is not None
    assert (got.scaling.replicas_min, got.scaling.replicas_max) == (1, 3)
    assert got.scaling.mode is ScalingMode.AUTO and got.policy is ScalePolicy.LIVE
    assert got.scaling.queue_s == Band(low=0.5, high=0.7)
    assert got.scaling.kv_utilization == Band(low=0.75, high=0.95)
    assert got.scaling.scale_down_s == 10.0


def test_the_least_that_is_needed() -> None:
    got = parse(
        "{apiVersion: layercast.dev/v1alpha1, kind: ModelService, metadata: {name: m},"
        " spec: {model: {source: 'hf://org/name'}}}"
    )
    assert (got.replicas, got.scaling, got.context_length, got.policy) == (1, None, 0, ScalePolicy.LIVE)
    assert got.prefix_caching
    assert got.model.key == "hf://org/name@default+own"


@pytest.mark.parametrize(
    ("find", "put", "sentence"),
    [
        ("scaleDownSeconds", "scaleDownSecond", "spec.scaling.windows.scaleDownSecond: is not a field"),
        ("scaleDownSeconds", "scaleDownSecond", "did you mean 'scaleDownSeconds'?"),
        ("max: 3", "max: 0", "x.yaml: spec.scaling.max: is 0, must be at least 1"),
        ("min: 1", "min: 4", "spec.scaling.max: is 3, must be at least min, which is 4"),
        ("    max: 3\n", "", "spec.scaling.max: is required"),
        ("mode: Auto", "mode: auto", "must be one of 'Auto', 'Recommend'; did you mean 'Auto'?"),
        ("policy: live", "policy: zigzag", "spec.scaling.policy: is 'zigzag', must be one of"),
        (
            "prefixCaching: false",
            "prefixCaching: 0",
            "spec.serving.prefixCaching: must be true or false, not a number",
        ),
        ("engine: generic", "engine: fats", "spec.serving.engine: is 'fats', must be one of"),
        ("replicas: 1", "replicas: true", "spec.replicas: must be a whole number, not true or false"),
        ("replicas: 1", "replicas: 1.5", "spec.replicas: must be a whole number, not a number"),
        ("replicas: 1", "replicas: -1", "spec.replicas: is -1, must be at least 0"),
        ("low: 0.5", "low: 0.9", "spec.scaling.targets.queueSeconds.high: is 0.7, must be at least low"),
        ("high: 0.95", "high: 1.5", "kvUtilization.high: is 1.5, must be at most 1"),
        ("low: 0.5", "low: .nan", "queueSeconds.low: must be a number"),
        ("file:///abs", "ftp://abs", "must start with one of file://, gs://, hf://, pvc://, s3://"),
        ("dtype: float32", "dtype: fp32", "spec.model.dtype: is 'fp32', must be one of"),
        ("name: smollm2", "name: Smol_LM", "metadata.name: is 'Smol_LM', must be"),
        ("v1alpha1", "v1", "apiVersion: must be 'layercast.dev/v1alpha1'"),
        ("kind: ModelService", "kind: Deployment", "kind: must be 'ModelService'"),
        ("spec:", "specs:", "spec: is required"),
        ("serving: {", "serving: [{", "is not YAML"),
        ("drain: {graceSeconds: 20}", "drain: 20", "spec.drain: must be a mapping, not a number"),
    ],
)
def test_mistakes_name_file_and_field(find: str, put: str, sentence: str) -> None:
    assert find in SAMPLE
    with pytest.raises(ModelServiceError) as caught:
        parse(SAMPLE.replace(find, put))
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("x.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "---", "[]", "just words", SAMPLE + "---" + SAMPLE, "\x00", "a: &a [*a]"]
)
def test_what_is_no_modelservice(text: str) -> None:
    with pytest.raises(ModelServiceError):
        parse(text)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.sampled_from(["", "live", "file:///x"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=4,
)


@given(
    path=st.sampled_from(
        [
            ("spec",),
            ("metadata",),
            ("spec", "model"),
            ("spec", "scaling"),
            ("spec", "replicas"),
            ("spec", "model", "source"),
            ("spec", "scaling", "targets"),
            ("spec", "scaling", "min"),
            ("spec", "serving", "batchSize"),
            ("spec", "serving", "stepTokens"),
            ("spec", "serving", "prefixCaching"),
            ("spec", "drain", "graceSeconds"),
        ]
    ),
    value=values,
)
def test_any_wrong_value_is_a_sentence_or_a_service(path: tuple[str, ...], value: object) -> None:
    document = yaml.safe_load(SAMPLE)
    inner = document
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    try:
        assert isinstance(parse(yaml.safe_dump(document)), ModelService)
    except ModelServiceError as error:
        assert str(error).startswith("x.yaml")
