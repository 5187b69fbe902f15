"""`layercast doctor`: is an installation well, and what to do where it is not. Pure: what was seen in, lines out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from layercast_cli import words
from layercast_cli.installation import COMPONENTS, Installation, Object
from layercast_operator.crd import crd, fields

LEASE_SILENT_S = 30.0
EXPIRES_SOON_S = 14 * 86400.0
EXPIRY = "layercast_certificate_expiry_timestamp_seconds"
APPLY_DEFINITION = "kubectl apply --server-side --force-conflicts -f manifests/crd.yaml"
NO_SERIES = {"PrometheusSilent", "NoSeries", "BadExpression"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One finding: what was looked at, how it is, what to do."""

    what: str
    well: bool | None
    """None: neither good nor bad, or not to be known."""
    told: str
    remedy: str = ""


def examine(seen: Installation) -> list[Line]:
    """All findings, in the order in which one thing needs the other."""
    checks: tuple[Callable[[Installation], Iterator[Line]], ...] = (
        _definition, _rights, _pods, _leader, _reached, _certificates, _rdma, _prometheus, _services,
    )  # fmt: skip
    first = Line(
        what="API server", well=True, told=f"{seen.version}; the installation is in {seen.namespace}"
    )
    return [first, *(line for check in checks for line in check(seen))]


def text_of(lines: Sequence[Line]) -> str:
    """One line each, the remedy below."""
    verdicts = {True: "ok", False: "FAILED", None: "note"}
    width = max(len(line.what) for line in lines)
    shown = []
    for line in lines:
        shown.append(f"{verdicts[line.well]:<7} {line.what:<{width}}  {line.told}")
        if line.remedy:
            shown.append(f"{'':<7} {'':<{width}}  → {line.remedy}")
    return "\n".join(shown)


def _definition(seen: Installation) -> Iterator[Line]:
    ours = crd()
    version = ours["spec"]["versions"][0]
    if seen.definition is None:
        yield Line(
            what="definition", well=False, told="there is no ModelService here", remedy=APPLY_DEFINITION
        )
        return
    there = {v["name"]: v for v in seen.definition["spec"]["versions"] if v.get("served")}
    name = version["name"]
    if name not in there:
        told = f"it serves {', '.join(there) or 'no version'}, not {name}"
        yield Line(what="definition", well=False, told=told, remedy=APPLY_DEFINITION)
        return
    known = {path for path, _ in fields(there[name]["schema"]["openAPIV3Schema"])}
    wanted = [path for path, _ in fields(version["schema"]["openAPIV3Schema"])]
    if missing := [path for path in wanted if path not in known]:
        told = f"{name} is of another release: it lacks {', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}"
        yield Line(what="definition", well=False, told=told, remedy=APPLY_DEFINITION)
        return
    yield Line(what="definition", well=True, told=f"modelservices {name} with {len(wanted)} fields")


def _rights(seen: Installation) -> Iterator[Line]:
    if isinstance(seen.rights, str):
        yield Line(what="rights", well=None, told=f"not to be known: {seen.rights}")
        return
    if missing := [str(right) for right, allowed in seen.rights.items() if not allowed]:
        remedy = "helm upgrade the release: its roles and bindings were changed, or rbac is not its own"
        yield Line(
            what="rights", well=False, told=f"the operator may not {'; '.join(missing)}", remedy=remedy
        )
        return
    yield Line(what="rights", well=True, told=f"the operator has all {len(seen.rights)} that it needs")


def _pods(seen: Installation) -> Iterator[Line]:
    for component in COMPONENTS:
        workloads = seen.component(component, seen.workloads)
        wanted = sum(_wanted(workload) for workload in workloads)
        ready = sum(_ready(pod) for pod in seen.component(component, seen.pods))
        told = f"{ready} of {words.count(wanted, 'pod')} ready"
        what = f"{component} pods"
        if wanted and ready >= wanted:
            yield Line(what=what, well=True, told=told)
        elif not wanted:
            remedy = "look at nodeSelector, tolerations and the GPU resource of its values: no node takes it"
            yield Line(what=what, well=False, told="none is wanted", remedy=remedy)
        else:
            well = component != "agent" and ready > 0
            worst = next((p for p in seen.component(component, seen.pods) if not _ready(p)), None)
            name = (
                worst["metadata"]["name"]
                if worst is not None
                else f"-l app.kubernetes.io/component={component}"
            )
            remedy = f"kubectl -n {seen.namespace} describe pod {name}"
            yield Line(what=what, well=None if well else False, told=told, remedy=remedy)


def _wanted(workload: Object) -> int:
    if workload["kind"] == "DaemonSet":
        return int((workload.get("status") or {}).get("desiredNumberScheduled", 0))
    return int(workload["spec"].get("replicas", 1))


def _ready(pod: Object) -> bool:
    conditions = pod["status"].get("conditions") or ()
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _leader(seen: Installation) -> Iterator[Line]:
    lease = next((lease for lease in seen.leases if lease["metadata"]["name"] == seen.lease_name), None)
    spec = lease["spec"] if lease is not None else {}
    holder, renewed = spec.get("holderIdentity"), spec.get("renewTime")
    remedy = f"kubectl -n {seen.namespace} logs -l app.kubernetes.io/component=operator"
    if not holder or not renewed:
        yield Line(what="leader", well=False, told="no operator acts", remedy=remedy)
        return
    silent_s = seen.at - datetime.fromisoformat(renewed).timestamp()
    well = silent_s < LEASE_SILENT_S
    told = f"{holder}, renewed {words.age(max(silent_s, 0.0))} ago"
    yield Line(what="leader", well=well, told=told, remedy="" if well else remedy)


def _reached(seen: Installation) -> Iterator[Line]:
    """Whom the operator that acts reaches."""
    acting = [
        page for page in seen.pages if any(value == 1 for _, value in page.of("layercast_operator_leader"))
    ]
    if not acting:
        problems = [page.problem for page in seen.pages if page.component == "operator" and page.problem]
        told = f"no operator that acts tells its metrics{': ' if problems else ''}{'; '.join(problems)}"
        yield Line(what="agents reached", well=False if not problems else None, told=told)
        return
    for what, metric, label, remedy in (
        ("agents reached", "layercast_operator_agent_up", "node",
         "the operator's log for the reason: a NetworkPolicy, a certificate of another authority, or a dead agent"),
        ("gateways reached", "layercast_operator_gateway_up", "gateway",
         "whether a NetworkPolicy lets the operator reach the gateways' port http"),
    ):  # fmt: skip
        found = {labels[label]: value == 1 for labels, value in acting[0].of(metric)}
        silent = sorted(name for name, up in found.items() if not up)
        if silent or not found:
            verb = "does" if len(silent) == 1 else "do"
            told = f"{', '.join(silent)} {verb} not answer" if silent else "the operator knows of none"
            yield Line(what=what, well=False, told=told, remedy=f"look at {remedy}" if silent else remedy)
        else:
            yield Line(what=what, well=True, told=f"all {len(found)} answer the operator")


def _certificates(seen: Installation) -> Iterator[Line]:
    if "tls-dir" not in seen.flags("operator"):
        told = "off: whoever reaches the pods' network can read and change what they say"
        yield Line(what="certificates", well=None, told=told)
        return
    ends = {page.pod: value for page in seen.pages for _, value in page.of(EXPIRY)}
    silent = sorted(page.pod for page in seen.pages if page.pod not in ends)
    if soon := {pod: at for pod, at in ends.items() if at - seen.at < EXPIRES_SOON_S}:
        told = ", ".join(f"{pod} in {words.age(max(at - seen.at, 0.0))}" for pod, at in sorted(soon.items()))
        remedy = "docs/runbooks.md#layercastcertificateexpires"
        yield Line(what="certificates", well=False, told=f"they end: {told}", remedy=remedy)
    elif ends:
        first = words.age(min(ends.values()) - seen.at)
        yield Line(
            what="certificates",
            well=True,
            told=f"of {words.count(len(ends), 'pod')}, the first ends in {first}",
        )
    if silent:
        told = f"not to be known of {', '.join(silent)}: no metrics"
        yield Line(what="certificates", well=None, told=told)


def _rdma(seen: Installation) -> Iterator[Line]:
    """By which way agents read parameters; a fault only where RDMA was demanded."""
    agents = [page for page in seen.pages if page.component == "agent"]
    found = [
        (f"{page.pod} {labels['device']}", labels["reason"], value == 1)
        for page in agents
        for labels, value in page.of("layercast_agent_rdma")
    ]
    missed = {
        f"{page.pod} {labels['device']}"
        for page in agents
        for labels, value in page.of("layercast_agent_rdma_missed")
        if value == 1
    }
    without = [(place, reason) for place, reason, used in found if not used]
    if not found:
        return
    if not without:
        yield Line(what="RDMA", well=True, told=f"{words.count(len(found), 'device')} read by it")
        return
    shown = next((each for each in without if each[0] in missed), without[0])
    told = f"{len(without)} of {words.count(len(found), 'device')} read by tcp; {shown[0]}: {shown[1]}"
    remedy = "docs/runbooks.md#parameters-do-not-come-by-rdma"
    yield Line(what="RDMA", well=False if missed else None, told=told, remedy=remedy if missed else "")


def _prometheus(seen: Installation) -> Iterator[Line]:
    url = seen.flags("operator").get("prometheus-url", "")
    if not url:
        yield Line(
            what="Prometheus", well=None, told="none is configured; decisions use the gateways' own metrics"
        )
        return
    scaled = [s for s in seen.services if (s.get("spec") or {}).get("scaling")]
    wrong = {
        s["metadata"]["name"]: c["message"]
        for s in scaled
        if (c := _condition(s, "MetricsAvailable")) and c["reason"] in NO_SERIES and c["status"] == "False"
    }
    for name, message in wrong.items():
        remedy = (
            f"kubectl get msvc {name} -o yaml; ask {url} the expressions of spec.scaling.metrics yourself"
        )
        yield Line(what="Prometheus", well=False, told=f"{name}: {message}", remedy=remedy)
    if not scaled:
        yield Line(
            what="Prometheus", well=None, told=f"{url}; no ModelService follows demand, so nothing shows"
        )
    elif not wrong:
        told = f"{url} has the series of {words.count(len(scaled), 'ModelService')}"
        yield Line(what="Prometheus", well=True, told=told)


def _services(seen: Installation) -> Iterator[Line]:
    for service in seen.services:
        name = f"{service['metadata']['namespace']}/{service['metadata']['name']}"
        ready = _condition(service, "Ready")
        if not ready:
            remedy = "whether the operator watches its namespace (operator.watchNamespaces)"
            yield Line(what="ModelService", well=False, told=f"{name}: nobody reports on it", remedy=remedy)
        elif ready["status"] != "True":
            remedy = f"kubectl layercast explain {service['metadata']['name']} -n {service['metadata']['namespace']}"
            yield Line(what="ModelService", well=False, told=f"{name}: {ready['message']}", remedy=remedy)
        else:
            yield Line(what="ModelService", well=True, told=f"{name}: {ready['message']}")


def _condition(service: Object, kind: str) -> Mapping[str, str]:
    conditions = (service.get("status") or {}).get("conditions") or ()
    return next((c for c in conditions if c["type"] == kind), {})
