"""An installation on Kubernetes as it is now, looked at through kubectl: objects, rights, and the pods' own metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from layercast_cli.errors import CliError
from layercast_cli.kubectl import KIND, run_kubectl

Object = Mapping[str, Any]
COMPONENTS = ("operator", "gateway", "agent")
PORT_NAMES = {"operator": "metrics", "gateway": "http", "agent": "metrics"}
LABEL = "app.kubernetes.io/component"
SELECTOR = "app.kubernetes.io/name=layercast"


@dataclass(frozen=True, slots=True, kw_only=True)
class Right:
    """Something that the operator must be allowed to do; `namespace` empty means everywhere."""

    verb: str
    resource: str
    group: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""

    def __str__(self) -> str:
        what = f"{self.resource}/{self.subresource}" if self.subresource else self.resource
        return f"{self.verb} {what} in {self.namespace or 'all namespaces'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Metrics of one pod: (name, labels) to value; or why they could not be read."""

    pod: str
    component: str
    samples: Mapping[tuple[str, frozenset[tuple[str, str]]], float] = field(default_factory=dict)
    problem: str = ""

    def of(self, name: str) -> Iterator[tuple[Mapping[str, str], float]]:
        """Labels and values of one metric."""
        return ((dict(labels), value) for (found, labels), value in self.samples.items() if found == name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """All that an examination is made from."""

    at: float
    namespace: str
    version: str
    """Of the API server."""
    definition: Object | None
    workloads: Sequence[Object]
    """Deployments and DaemonSets."""
    pods: Sequence[Object]
    leases: Sequence[Object]
    rights: Mapping[Right, bool] | str
    """Whether the operator has each; or why that could not be asked."""
    pages: Sequence[Page]
    services: Sequence[Object]

    def component(self, name: str, objects: Sequence[Object]) -> list[Object]:
        """Those of one component."""
        return [o for o in objects if o["metadata"].get("labels", {}).get(LABEL) == name]

    def flags(self, component: str) -> dict[str, str]:
        """`--name=value` of its first container."""
        return _flags_of(self.component(component, self.workloads))

    @property
    def lease_name(self) -> str:
        """Of the lease that operators take turns by."""
        return _lease_name(self.component("operator", self.workloads))


def look(*, namespace: str, passed: Sequence[str] = ()) -> Installation:
    """Look at the installation in a namespace, or the only one that there is. CliError when it is not to be found."""
    kubectl = _Kubectl(passed)
    version = json.loads(kubectl("version", "-o", "json"))["serverVersion"]["gitVersion"]
    namespace = namespace or _namespace(kubectl)
    workloads = kubectl.items("get", "deployments,daemonsets", "-n", namespace, "-l", SELECTOR)
    pods = kubectl.items("get", "pods", "-n", namespace, "-l", SELECTOR)
    found = kubectl.items("get", "crd", KIND, "--ignore-not-found")
    watched = _flags_of(workloads).get("watch-namespaces", "")
    return Installation(
        at=time.time(),
        namespace=namespace,
        version=version,
        definition=found[0] if found else None,
        workloads=workloads,
        pods=pods,
        leases=kubectl.items("get", "leases", "-n", namespace),
        rights=_rights(kubectl, namespace, tuple(filter(None, watched.split(","))), workloads),
        pages=[_page(kubectl, pod) for pod in pods if pod["status"].get("phase") == "Running"],
        services=kubectl.items("get", KIND, "-A") if found else [],
    )


class _Kubectl:
    """kubectl with the flags that the user gave."""

    def __init__(self, passed: Sequence[str]) -> None:
        self._passed = passed

    def __call__(self, *arguments: str, given: str | None = None) -> str:
        return run_kubectl(*arguments, *self._passed, given=given)

    def items(self, *arguments: str, given: str | None = None) -> list[Object]:
        """The objects of an answer, which is a list, one object, or one after the other."""
        text = self(*arguments, "-o", "json", given=given).strip()
        found: list[Object] = []
        while text:
            answer, end = json.JSONDecoder().raw_decode(text)
            found += answer.get("items", [answer])
            text = text[end:].lstrip()
        return found


def _namespace(kubectl: _Kubectl) -> str:
    found = kubectl.items("get", "deployments", "-A", "-l", f"{SELECTOR},{LABEL}=operator")
    names = sorted({str(deployment["metadata"]["namespace"]) for deployment in found})
    if len(names) != 1:
        told = f"there are several, in {', '.join(names)}" if names else "there is none in this cluster"
        raise CliError(
            f"which installation? {told}; say -n NAMESPACE" if names else f"no installation: {told}"
        )
    return names[0]


def _flags_of(workloads: Sequence[Object]) -> dict[str, str]:
    found: dict[str, str] = {}
    for workload in workloads:
        for argument in workload["spec"]["template"]["spec"]["containers"][0].get("args") or ():
            name, _, value = argument.removeprefix("--").partition("=")
            found.setdefault(name, value)
    return found


def _lease_name(operators: Sequence[Object]) -> str:
    return _flags_of(operators).get("lease-name", "layercast-operator")


def needed(namespace: str, watched: Sequence[str], lease: str) -> list[Right]:
    """What the operator must be allowed to do."""
    group = "layercast.dev"
    rights = [Right(verb=verb, resource="nodes") for verb in ("list", "watch")]
    rights += [Right(verb=verb, resource="pods", namespace=namespace) for verb in ("list", "watch")]
    rights += [
        Right(verb=verb, resource="leases", group="coordination.k8s.io", namespace=namespace, name=lease)
        for verb in ("get", "update")
    ]
    for where in watched or ("",):
        rights += [
            Right(verb=verb, resource="modelservices", group=group, namespace=where)
            for verb in ("list", "watch")
        ]
        status = Right(
            verb="patch", resource="modelservices", group=group, subresource="status", namespace=where
        )
        rights += [status, Right(verb="create", resource="events", namespace=where)]
    return rights


def _rights(
    kubectl: _Kubectl, namespace: str, watched: Sequence[str], workloads: Sequence[Object]
) -> Mapping[Right, bool] | str:
    operators = [w for w in workloads if w["metadata"].get("labels", {}).get(LABEL) == "operator"]
    if not operators:
        return "there is no operator"
    account = operators[0]["spec"]["template"]["spec"].get("serviceAccountName", "default")
    rights = needed(namespace, watched, _lease_name(operators))
    reviews = [_review(right, f"system:serviceaccount:{namespace}:{account}") for right in rights]
    try:
        answers = kubectl.items(
            "create", "-f", "-", given=json.dumps({"apiVersion": "v1", "kind": "List", "items": reviews})
        )
    except CliError as error:
        return str(error)
    return {right: bool(a["status"].get("allowed")) for right, a in zip(rights, answers, strict=True)}


def _review(right: Right, user: str) -> Object:
    attributes = {
        "verb": right.verb,
        "resource": right.resource,
        "group": right.group,
        "subresource": right.subresource,
        "namespace": right.namespace,
        "name": right.name,
    }
    return {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            "user": user,
            "resourceAttributes": {key: value for key, value in attributes.items() if value},
        },
    }


def _page(kubectl: _Kubectl, pod: Object) -> Page:
    metadata = pod["metadata"]
    component = metadata["labels"].get(LABEL, "")
    ports = pod["spec"]["containers"][0].get("ports") or ()
    port = next((p["containerPort"] for p in ports if p.get("name") == PORT_NAMES.get(component)), 0)
    path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}:{port}/proxy/metrics"
    try:
        text = kubectl("get", "--raw", path)
        samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    except (CliError, ValueError) as error:
        return Page(pod=metadata["name"], component=component, problem=str(error))
    return Page(pod=metadata["name"], component=component, samples=samples)
