"""One source of truth: the CRD, its page, the samples and what the operator reads say the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from layercast_operator.crd import FILES, crd, fields
from layercast_operator.errors import ModelServiceError
from layercast_operator.modelservice import modelservice_of

ROOT = Path(__file__).resolve().parents[2]
SCHEMA: dict[str, Any] = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
SPEC: dict[str, Any] = SCHEMA["properties"]["spec"]


def defaulted(schema: dict[str, Any], value: Any) -> Any:
    """What an API server stores for a value: defaults filled in."""
    if schema.get("type") != "object" or "properties" not in schema:
        return value
    value = dict(value)
    for name, child in schema["properties"].items():
        if name not in value and "default" in child:
            value[name] = copy.deepcopy(child["default"])
        if name in value:
            value[name] = defaulted(child, value[name])
    return value


def document(spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "layercast.dev/v1alpha1",
        "kind": "ModelService",
        "metadata": {"name": "m"},
        "spec": spec,
    }


def example(schema: dict[str, Any]) -> Any:
    """A value for every field of a schema."""
    match schema["type"]:
        case "object" if "properties" in schema:
            return {name: example(child) for name, child in schema["properties"].items()}
        case "object":
            return {"key": "value"}
        case "string":
            return schema.get("enum", ["hf://organisation/name"])[-1]
        case _:
            return schema.get("default", schema.get("minimum", 1))


def with_value(spec: Any, path: str, value: Any) -> Any:
    """The same with one field changed."""
    changed = copy.deepcopy(spec)
    *above, last = path.split(".")
    target = changed
    for name in above:
        target = target[name]
    target[last] = value
    return changed


def leaves() -> Iterator[tuple[str, dict[str, Any]]]:
    return ((path, child) for path, child in fields(SPEC) if "properties" not in child)


@pytest.mark.parametrize("name", FILES)
def test_what_is_committed_is_what_the_table_says(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == FILES[name](), "run `make crd`"


@pytest.mark.parametrize(
    "minimal", [{}, {"scaling": {"max": 3}}, {"scaling": {"max": 3, "targets": {}, "windows": {}}}]
)
def test_the_api_servers_defaults_are_the_parsers(minimal: dict[str, Any]) -> None:
    spec = {"model": {"source": "hf://a/b"}, **minimal}
    assert modelservice_of(document(defaulted(SPEC, spec)), file="f") == modelservice_of(
        document(spec), file="f"
    )


def test_the_parser_reads_every_field_of_the_table_and_no_other() -> None:
    full = example(SPEC)
    modelservice_of(document(full), file="f")
    for path, child in fields(SPEC):
        if "properties" in child:
            with pytest.raises(ModelServiceError):
                modelservice_of(document(with_value(full, f"{path}.nonsense", 1)), file="f")


def test_every_limit_of_the_table_is_the_parsers_too() -> None:
    full = example(SPEC)
    wrong: list[tuple[str, Any]] = []
    for path, child in leaves():
        if child["type"] == "string":
            wrong.append((path, 7))
        if "enum" in child:
            wrong.append((path, "nonsense"))
        if "minimum" in child:
            wrong.append((path, child["minimum"] - 1))
        if "maximum" in child:
            wrong.append((path, child["maximum"] + 1))
    assert len(wrong) > 20
    for path, value in wrong:
        with pytest.raises(ModelServiceError, match=path.rsplit(".", maxsplit=1)[-1]):
            modelservice_of(document(with_value(full, path, value)), file="f")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("scaling.min", 4),
        ("scaling.targets.queueSeconds.low", 5),
        ("scaling.targets.kvUtilization.low", 0.96),
    ],
)
def test_rules_across_fields_are_the_parsers_too(path: str, value: float) -> None:
    spec = defaulted(SPEC, {"model": {"source": "hf://a/b"}, "scaling": {"max": 3, "targets": {}}})
    modelservice_of(document(spec), file="f")
    with pytest.raises(ModelServiceError):
        modelservice_of(document(with_value(spec, path, value)), file="f")


def test_every_field_is_described_and_the_schema_is_structural() -> None:
    for path, child in fields(SCHEMA):
        if path != "metadata":
            assert len(child["description"].split()) >= 1 and child["description"].endswith((".", "eye.")), (
                path
            )
        assert "type" in child and "x-kubernetes-int-or-string" not in child, path


@pytest.mark.parametrize("sample", sorted((ROOT / "manifests/samples").glob("*.yaml")), ids=lambda p: p.name)
def test_samples_have_fields_of_the_table_only(sample: Path) -> None:
    known = {path for path, _ in fields(SPEC)}

    def walk(value: Any, path: str) -> None:
        for name, child in value.items():
            here = f"{path}.{name}".lstrip(".")
            assert here in known, here
            if isinstance(child, dict) and not here.endswith("nodeSelector"):
                walk(child, here)

    for each in yaml.safe_load_all(sample.read_text(encoding="utf-8")):
        if each["kind"] == "ModelService":
            walk(each["spec"], "")
