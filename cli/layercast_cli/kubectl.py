"""`kubectl layercast`: the same views of ModelServices that live in a Kubernetes cluster.

Objects are read through kubectl itself, so contexts, namespaces and every way to log in are those that the reader
already has. `layercast explain msvc/NAME` is the same as `kubectl layercast explain NAME`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from layercast_cli.errors import CliError
from layercast_cli.explain import explanation
from layercast_cli.get import Service, overview, wide
from layercast_cli.status import ServiceStatus, parse_status, time_of
from layercast_cli.timeline import charts

KIND = "modelservices.layercast.dev"
PREFIXES = ("msvc/", "modelservice/", "modelservices/")
# kubectl's own flags that have a value; a value must not be taken for the name.
KUBECTL_FLAGS = (
    "--context", "--kubeconfig", "--cluster", "--user", "--server", "-s", "--token", "--as", "--as-group", "--as-uid",
    "--certificate-authority", "--client-certificate", "--client-key", "--tls-server-name", "--cache-dir",
    "--request-timeout", "-v",
)  # fmt: skip
DEADLINE_S = 30.0


def is_remote(name: str | None) -> bool:
    """Whether a name says that its ModelService is in Kubernetes."""
    return name is not None and name.startswith(PREFIXES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the plug-in; what it does not know goes to kubectl, as `-n`, `--context` and the like."""
    parser = argparse.ArgumentParser(
        prog="kubectl layercast",
        description="Look at ModelServices; other flags are kubectl's.",
        epilog=__doc__,
    )
    parser.add_argument("command", choices=("explain", "timeline", "get", "doctor"))
    parser.add_argument(
        "name", nargs="?", help="a ModelService; all of the namespace where it may be left out"
    )
    parser.add_argument("-o", "--output", choices=("", "wide", "json"), default="")
    parser.add_argument("--all", action="store_true", help="timeline: every scale-up that is known")
    parser.add_argument("-n", "--namespace", default="")
    for flag in KUBECTL_FLAGS:
        parser.add_argument(
            flag, dest="kubectl", action="append", type=partial(_flag, flag), help=argparse.SUPPRESS
        )
    # Intermixed: the name may stand before flags or after them.
    flags, passed = parser.parse_known_intermixed_args(arguments)
    passed = [*passed, *chain.from_iterable(flags.kubectl or ())]
    try:
        if flags.command == "doctor":
            return doctor(namespace=flags.namespace, passed=passed)
        passed = [*(("-n", flags.namespace) if flags.namespace else ()), *passed]
        tell(show(flags.command, flags.name, output=flags.output, every=flags.all, passed=passed))
    except CliError as error:
        print(f"kubectl layercast {flags.command}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _flag(flag: str, value: str) -> tuple[str, str]:
    return flag, value


def tell(text: str) -> None:
    """Prints; a reader that has seen enough, as `head`, is no fault."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python would complain again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(command: str, name: str | None, *, output: str, every: bool, passed: Sequence[str] = ()) -> str:
    """The text of one view. CliError when kubectl fails or the name is missing."""
    plain = name.rpartition("/")[2] if name is not None else None
    items = fetch(plain, passed)
    if command == "get":
        return _get(items, output)
    if plain is None:
        raise CliError("which ModelService? give its name")
    status = _status(items[0])
    if status is None:
        raise CliError(f"the operator has not reported on {plain} yet")
    if command == "explain":
        return explanation(status, now=time.time())
    return charts(
        status, name=plain, width=min(160, shutil.get_terminal_size((100, 24)).columns), every=every
    )


def fetch(name: str | None, passed: Sequence[str]) -> list[Mapping[str, Any]]:
    """The objects, as kubectl tells them."""
    found = json.loads(run_kubectl("get", KIND, *([name] if name is not None else []), "-o", "json", *passed))
    return list(found["items"]) if found.get("kind", "").endswith("List") else [found]


def run_kubectl(*arguments: str, given: str | None = None) -> str:
    """What kubectl says. CliError when it fails."""
    try:
        answer = subprocess.run(
            ["kubectl", *arguments],
            input=given,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
    except FileNotFoundError:
        raise CliError("kubectl is not on the path") from None
    except subprocess.TimeoutExpired:
        raise CliError(f"kubectl did not answer in {DEADLINE_S:g} s") from None
    if answer.returncode:
        raise CliError(answer.stderr.strip() or f"kubectl ended with {answer.returncode}")
    return answer.stdout


def doctor(*, namespace: str, passed: Sequence[str] = ()) -> int:
    """Print the examination of an installation; 1 when something is not well. CliError when none can be made."""
    from layercast_cli.doctor import examine, text_of
    from layercast_cli.installation import look

    lines = examine(look(namespace=namespace, passed=passed))
    tell(text_of(lines))
    return 1 if any(line.well is False for line in lines) else 0


def _get(items: Sequence[Mapping[str, Any]], output: str) -> str:
    if output == "json":
        return json.dumps([item.get("status") or {} for item in items], indent=2, ensure_ascii=False)
    services = tuple(_service(item) for item in items)
    return wide(services) if output == "wide" else overview(services)


def _service(item: Mapping[str, Any]) -> Service:
    created = time_of(item["metadata"].get("creationTimestamp"))
    return Service(
        name=str(item["metadata"]["name"]),
        wanted=int((item.get("spec") or {}).get("replicas", 1)),
        status=_status(item),
        metrics=None,
        age_s=time.time() - created if created is not None else None,
    )


def _status(item: Mapping[str, Any]) -> ServiceStatus | None:
    status = item.get("status")
    return (
        parse_status(str(item["metadata"]["name"]), status) if isinstance(status, dict) and status else None
    )
