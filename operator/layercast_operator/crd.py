"""The ModelService for Kubernetes: one table from which the CRD and its page in the documents are made. Pure.

`python -m layercast_operator.crd --write` from the repository's root writes both; a test holds them, this table and
`modelservice` equal. Rules (CEL) say again what `modelservice` checks: an API server that knows them (1.25 and newer)
refuses a mistake at once, an older one stores it and the operator says the same in the object's conditions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from layercast_operator.modelservice import API_VERSION, KIND
from layercast_operator.schema import Schema, mapping, rule, text
from layercast_operator.spec_schema import spec
from layercast_operator.status_schema import status

GROUP, VERSION = API_VERSION.split("/")
PLURAL = "modelservices"


def _columns() -> list[Schema]:
    def column(name: str, path: str, *, kind: str = "string", wide: bool = False, text: str) -> Schema:
        more = {"priority": 1} if wide else {}
        return {"name": name, "type": kind, "jsonPath": path, "description": text} | more

    condition = '.status.conditions[?(@.type=="{}")].{}'
    return [
        column("Ready", ".status.ready", text="Replicas that serve and replicas wanted."),
        column("Loading", ".status.counts.loading", kind="integer", text="Replicas on their way."),
        column("Source", ".spec.model.source", text="Where the checkpoint is."),
        column("P99-TTFT", ".status.latency.ttftP99", text="99th percentile of the time to the first token."),
        column("Age", ".metadata.creationTimestamp", kind="date", text="Since when it exists."),
        column("Draining", ".status.counts.draining", kind="integer", wide=True, text="Replicas that leave."),
        column("Min", ".spec.scaling.min", kind="integer", wide=True, text="Fewest replicas."),
        column("Max", ".spec.scaling.max", kind="integer", wide=True, text="Most replicas."),
        column("Mode", ".spec.scaling.mode", wide=True, text="Auto or Recommend."),
        column("Rule", ".status.decision.rule", wide=True, text="Which rule decides now."),
        column(
            "Metrics",
            condition.format("MetricsAvailable", "status"),
            wide=True,
            text="Whether demand is known.",
        ),
        column("Why", condition.format("Ready", "message"), wide=True, text="How it is, in words."),
    ]


def _schema() -> Schema:
    return mapping(
        "A model and how it is served.",
        {
            "apiVersion": text("Version of this schema."),
            "kind": text("Kind of this object."),
            "metadata": {"type": "object"},
            "spec": spec(),
            "status": status(),
        },
        required=("spec",),
        rules=[rule("size(self.metadata.name) <= 50", "the name must have at most 50 characters")],
    )


def _told(schema: Schema) -> Schema:
    """With defaults and limits in the descriptions: `kubectl explain` shows nothing else of them."""
    told = dict(schema)
    if "properties" in schema:
        told["properties"] = {name: _told(child) for name, child in schema["properties"].items()}
    if "items" in schema:
        told["items"] = _told(schema["items"])
    if parts := [*_bounds(schema), *_default(schema)]:
        limits = "; ".join(parts)
        told["description"] = f"{schema['description']} {limits[0].upper()}{limits[1:]}."
    return told


def _default(schema: Schema) -> list[str]:
    default = schema.get("default", {})
    if isinstance(default, dict):
        return []
    return [
        f"default {'empty' if default == '' else str(default).lower() if isinstance(default, bool) else default}"
    ]


def _bounds(schema: Schema) -> list[str]:
    parts = [f"at least {schema['minimum']:g}"] if "minimum" in schema else []
    return parts + ([f"at most {schema['maximum']:g}"] if "maximum" in schema else [])


def crd() -> dict[str, Any]:
    """The CustomResourceDefinition."""
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": _told(_schema())},
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.replicas",
                "statusReplicasPath": ".status.counts.active",
                "labelSelectorPath": ".status.selector",
            },
        },
        "additionalPrinterColumns": _columns(),
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{PLURAL}.{GROUP}",
            "labels": {"app.kubernetes.io/name": "layercast"},
            # Removing it would remove every ModelService: an uninstall leaves it.
            "annotations": {"helm.sh/resource-policy": "keep"},
        },
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": "modelservice",
                "shortNames": ["msvc"],
                "categories": ["layercast"],
            },
            "versions": [version],
        },
    }


def fields(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Every field below a schema with its path; list items as `name[]`."""
    for name, child in schema.get("properties", {}).items():
        here = f"{path}.{name}".lstrip(".")
        yield here, child
        if child.get("type") == "array":
            yield from fields(child["items"], f"{here}[]")
        else:
            yield from fields(child, here)


def yaml_text() -> str:
    """The CRD as the chart ships it."""
    head = "# Generated from operator/layercast_operator/crd.py by `make crd`; do not edit.\n"
    return head + yaml.safe_dump(crd(), sort_keys=False, width=118)


def page_text() -> str:
    """The page that lists all fields."""
    lines = [
        "# ModelService",
        "",
        "Every field of `layercast.dev/v1alpha1`, as `kubectl explain modelservice --recursive` tells them. Generated "
        "from `operator/layercast_operator/crd.py` by `make crd`.",
    ]
    schema = _schema()
    for part in ("spec", "status"):
        lines += ["", f"## {part}", "", "| field | type | default | meaning |", "|---|---|---|---|"]
        for path, child in fields(schema["properties"][part]):
            default = "" if "default" not in child or child["default"] == {} else f"`{child['default']!r}`"
            lines.append(f"| {path} | {child['type']} | {default} | {child['description']}{_limits(child)} |")
    return "\n".join(lines) + "\n"


def _limits(child: Schema) -> str:
    parts = []
    if "enum" in child:
        parts.append("one of " + ", ".join(f"`{value!r}`" for value in child["enum"]))
    parts += _bounds(child)
    parts += [rule["message"] for rule in child.get("x-kubernetes-validations", ())]
    return f" ({'; '.join(parts)})" if parts else ""


FILES = {
    "charts/layercast/files/crd.yaml": yaml_text,
    "manifests/crd.yaml": yaml_text,
    "docs/modelservice.md": page_text,
}

if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        for name, make in FILES.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(make(), encoding="utf-8")
    else:
        sys.stdout.write(yaml_text())
