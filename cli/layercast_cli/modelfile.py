"""ModelService files as the command line sees them: enough checking for a clear sentence, no more.

The operator validates the whole specification and reports on it; here only what the command line itself
relies on is checked, so that a new field of the specification needs no change in this file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from layercast_cli.errors import CliError, UsageError
from layercast_cli.state import write_atomic

API_VERSION = "layercast.dev/v1alpha1"
KIND = "ModelService"
NAME_PATTERN = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
FILE_SCHEME = "file://"


def document_of(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """A ModelService as one writes it in YAML."""
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": spec}


def load_services(path: Path) -> tuple[dict[str, Any], ...]:
    """The ModelServices of a YAML file, relative `file://` sources made absolute; UsageError says what is
    wrong."""
    try:
        documents = [doc for doc in yaml.safe_load_all(path.read_text(encoding="utf-8")) if doc is not None]
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {_one_line(error)}") from error
    if not documents:
        raise UsageError(f"{path} holds no ModelService")
    for document in documents:
        problem = problem_of(document)
        if problem:
            raise UsageError(f"{path}: {problem}")
    names = [str(document["metadata"]["name"]) for document in documents]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"{path}: the name {twice[0]} is given twice")
    return tuple(with_local_source(document, base=path.parent.absolute()) for document in documents)


def problem_of(document: object) -> str:
    """What is wrong with one document, in words; empty when nothing is."""
    if not isinstance(document, dict):
        return "a ModelService is a mapping with apiVersion, kind, metadata and spec"
    if document.get("kind") != KIND or document.get("apiVersion") != API_VERSION:
        return f"expected apiVersion: {API_VERSION} and kind: {KIND}"
    name = _mapping(document, "metadata").get("name")
    if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
        return f"metadata.name must be lower-case letters, digits and '-', at most 63; found {name!r}"
    spec = _mapping(document, "spec")
    source = _mapping(spec, "model").get("source")
    if not isinstance(source, str) or "://" not in source:
        return f"spec.model.source must be a URL such as hf://org/name or file:///path; found {source!r}"
    replicas = spec.get("replicas", 1)
    if not isinstance(replicas, int) or isinstance(replicas, bool) or replicas < 0:
        return f"spec.replicas must be a number, 0 or more; found {replicas!r}"
    return ""


def with_local_source(document: dict[str, Any], *, base: Path) -> dict[str, Any]:
    """The document with a `file://` source relative to `base`, or to the home folder, made absolute and
    checked.

    A cluster needs absolute paths, for its processes have folders of their own; a file beside its model is
    handier with a relative one. Raises UsageError when the folder does not exist.
    """
    source = str(document["spec"]["model"]["source"])
    if not source.startswith(FILE_SCHEME):
        return document
    folder = Path(source.removeprefix(FILE_SCHEME)).expanduser()
    folder = (base / folder).resolve()
    if not folder.exists():
        raise UsageError(f"spec.model.source {source} names {folder}, which does not exist")
    model = {**document["spec"]["model"], "source": f"{FILE_SCHEME}{folder}"}
    return {**document, "spec": {**document["spec"], "model": model}}


def names(folder: Path) -> list[str]:
    """Names of the ModelServices in a state folder's `modelservices/`, sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read_service(folder: Path, name: str) -> dict[str, Any]:
    """The wanted state of one ModelService; CliError names those that exist when this one does not."""
    if name not in names(folder):
        raise CliError(unknown_name(name, names(folder)))
    path = folder / f"{name}.yaml"
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CliError(f"{path} cannot be read: {_one_line(error)}") from error
    problem = problem_of(document)
    if problem:
        raise CliError(f"{path}: {problem}")
    assert isinstance(document, dict)
    return document


def write_service(folder: Path, document: dict[str, Any]) -> None:
    """Replaces the wanted state of one ModelService in one step."""
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    write_atomic(folder / f"{document['metadata']['name']}.yaml", text)


def unknown_name(name: str, existing: Iterable[str]) -> str:
    """The sentence for a ModelService that is not there."""
    known = ", ".join(existing)
    return f"there is no ModelService {name}; there {'is ' + known if known else 'are none'}"


def _mapping(document: dict[str, Any], key: str) -> dict[str, Any]:
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
