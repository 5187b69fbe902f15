"""`layercast scale`: change the wanted number of replicas, as the scale subresource does on Kubernetes."""

from __future__ import annotations

from layercast_cli import words
from layercast_cli.errors import UsageError
from layercast_cli.modelfile import read_service, write_service
from layercast_cli.state import StateDir


def scale(state: StateDir, *, name: str, replicas: int) -> str:
    """Writes `spec.replicas` and says what happens next.

    Raises CliError for an unknown name and UsageError for a number outside of the service's own bounds.
    """
    document = read_service(state.services, name)
    spec = document["spec"]
    if replicas < 0:
        raise UsageError(f"a number of replicas is 0 or more; asked for {replicas}")
    scaling = spec.get("scaling")
    if isinstance(scaling, dict):
        check_bounds(name, replicas, scaling.get("min"), scaling.get("max"))
    before = int(spec.get("replicas", 1))
    spec["replicas"] = replicas
    write_service(state.services, document)
    sentence = f"{name}: {words.count(replicas, 'replica')} wanted, {before} before"
    if isinstance(scaling, dict) and scaling.get("mode", "Auto") == "Auto":
        sentence += "; from there the scaling policy goes on"
    if not state.running():
        return f"{sentence}; no cluster runs on {state.root} now"
    return f"{sentence}; watch it with: layercast get {name} -o wide"


def check_bounds(name: str, replicas: int, lowest: object, highest: object) -> None:
    """Raises UsageError when `replicas` is outside of spec.scaling.min and max."""
    if isinstance(lowest, int) and replicas < lowest:
        raise UsageError(f"{name} keeps at least {lowest} (spec.scaling.min); asked for {replicas}")
    if isinstance(highest, int) and replicas > highest:
        raise UsageError(f"{name} has at most {highest} (spec.scaling.max); asked for {replicas}")
