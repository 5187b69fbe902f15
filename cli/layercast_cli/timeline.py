"""`layercast timeline`: one scale-up as a text chart, one row a new replica, from the decision to the last
segment."""

from __future__ import annotations

from layercast_cli import words
from layercast_cli.errors import CliError
from layercast_cli.modelfile import read_service
from layercast_cli.state import StateDir
from layercast_cli.status import Scale, ScaleReplica, ServiceStatus, read_status

ORDERED, LOADING, EXECUTING, COMPLETE = "·", "░", "▒", "█"
FIRST_TOKEN, LATER = "T", "›"
LEGEND = (
    f"{ORDERED} ordered   {LOADING} segments arrive   {EXECUTING} executes resident layers   "
    f"{COMPLETE} complete   {FIRST_TOKEN} first token, {LATER} later"
)
MILESTONES = ["NODE", "SOURCE", "ASSIGNED", "SEGMENT", "LAYER", "TOKEN", "COMPLETE", "RATE"]
# Time after the last event, so that the state it led to is visible.
TAIL = 0.08


def timeline(state: StateDir, *, name: str, width: int, every: bool) -> str:
    """The last scale-up of `name`, or every one that is known; CliError when there was none."""
    read_service(state.services, name)
    return charts(read_status(state.status, name), name=name, width=width, every=every)


def charts(status: ServiceStatus | None, *, name: str, width: int, every: bool) -> str:
    """The last scale-up of a status, or every one that it knows; CliError when there was none."""
    scales = list(status.scales) if status is not None else []
    if status is not None and status.last_scale is not None and status.last_scale not in scales:
        scales.append(status.last_scale)
    shown = scales if every else [each for each in scales if each.up][-1:] or scales[-1:]
    if not shown:
        raise CliError(f"the number of replicas of {name} has not been changed yet")
    return "\n\n".join(chart(each, name=name, width=width) for each in shown)


def chart(scale: Scale, *, name: str, width: int) -> str:
    """One scale-up, `width` columns wide."""
    policy = f", policy {scale.policy}" if scale.policy else ""
    change = f"{scale.replicas_from} → {scale.replicas_to}"
    head = f"{name}: {change} replicas, decided {words.clock(scale.decided_at)}{policy}"
    lines = [head, *([f"  {scale.reason}"] if scale.reason else [])]
    if not scale.replicas:
        return "\n".join(lines)
    label_width = max(len(each.node) for each in scale.replicas) + 2
    cells = max(20, width - label_width)
    span = _last_event_s(scale) * (1 + TAIL)
    lines += ["", " " * label_width + axis(span, cells)]
    for replica in scale.replicas:
        lines.append(
            replica.node.ljust(label_width) + row(replica, scale.decided_at, span_s=span, cells=cells)
        )
    lines += ["", LEGEND, ""]
    lines.append(words.table(MILESTONES, [_milestones(each, scale.decided_at) for each in scale.replicas]))
    return "\n".join(lines)


def row(replica: ScaleReplica, decided_at: float, *, span_s: float, cells: int) -> str:
    """The states of one replica over `span_s` seconds in `cells` characters; each cell shows its middle."""
    steps = (
        (replica.assigned_at, ORDERED),
        (replica.first_segment_at, LOADING),
        (replica.first_layer_at, EXECUTING),
        (replica.complete_at, COMPLETE),
    )
    drawn = []
    for cell in range(cells):
        middle = decided_at + (cell + 0.5) / cells * span_s
        reached = [mark for at, mark in steps if at is not None and at <= middle]
        drawn.append(reached[-1] if reached else " ")
    if replica.first_token_at is not None:
        at = int((replica.first_token_at - decided_at) / span_s * cells)
        drawn[min(max(at, 0), cells - 1)] = FIRST_TOKEN if at < cells else LATER
    return "".join(drawn).rstrip()


def axis(span_s: float, cells: int) -> str:
    """Seconds since the decision above their cells, as many as are readable."""
    step = _round_step(span_s / max(1, cells // 12))
    line = [" "] * (cells + 8)
    tick = 0
    while tick * step <= span_s:
        at = int(tick * step / span_s * cells)
        label = f"|{tick * step:g} s"
        if at + len(label) > cells:
            break
        line[at : at + len(label)] = label
        tick += 1
    return "".join(line).rstrip()


def _round_step(rough: float) -> float:
    """The next of 1, 2, 5 times a power of ten, from a millisecond up."""
    size = 0.001
    while True:
        for factor in (1, 2, 5):
            if factor * size >= rough:
                return factor * size
        size *= 10


def _last_event_s(scale: Scale) -> float:
    """Seconds from the decision to the last event of the load that is known; never 0."""
    events = [
        at
        for each in scale.replicas
        for at in (
            each.assigned_at,
            each.first_segment_at,
            each.first_layer_at,
            # A complete replica may wait for a request for minutes: the load would be a dot beside them.
            each.first_token_at if each.complete_at is None else None,
            each.complete_at,
        )
        if at is not None
    ]
    return max([0.001, *(at - scale.decided_at for at in events)])


def _milestones(replica: ScaleReplica, decided_at: float) -> list[str]:
    times = (
        replica.assigned_at,
        replica.first_segment_at,
        replica.first_layer_at,
        replica.first_token_at,
        replica.complete_at,
    )
    after = ["-" if at is None else f"+{words.duration(at - decided_at)}" for at in times]
    return [replica.node, replica.source or "-", *after, words.gigabytes_per_s(replica.bytes_per_s)]
