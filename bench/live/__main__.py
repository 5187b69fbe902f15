"""Scale a real model under the same demand in several ways, and print what each did to those who waited.

Real processes on this machine: operator, gateway, agents and workers, cores divided among the agents, links slowed
so that a layer takes `--time-l` times as long to arrive as to execute for one prompt (3 to 10 in the papers'
clusters), the disk ten times slower than a link. Policies run one after the other with the same arrivals; every
answer is compared with that of one replica at rest.

    python -m bench.live
    python -m bench.live --trace azure-like --policies live,stop-the-world
    python -m bench.live --policies network,stop-the-world,live       (the ladder: network, multicast, live)
    python -m bench.live --trace AzureLLMInferenceTrace_code.csv --repeats 3
    python -m bench.live --policies live,static --low-s 280

The last one is what provisioning for the peak costs: in the default step the peak takes 83 % of the time, because it
outlasts three loads from disk and four policies fit into ten minutes, so nobody could do with 0.6 of the replicas.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.live import arrivals, figures
from bench.live.arrivals import Lengths, Shape
from bench.live.play import BATCH_SIZE, CACHING, Calibration, Played, Setting, calibrate, cpu_share, play
from bench.live.prompts import PromptBook, length_class
from bench.live.summary import Figures, Replica, ratios
from bench.live.summary import figures as figures_of

from bench import report
from layercast_agent.worker.loading import STEP_TOKENS_MAX
from layercast_cli.demo import sigterm_interrupts
from layercast_cli.errors import CliError
from layercast_cli.model import ensure_model, float32_bytes
from layercast_cli.settings import default_model_dir
from layercast_cli.shares import usable_cores

POLICIES = ("live", "stop-the-world", "ttl-cache", "static")
PEAK_UTILISATION = 0.7
"""Who provisions for the peak leaves this much: two replicas at nine tenths of their capacity only queue."""

QUEUE = (3.0, 4.0)
"""The queue that is aimed at, in times to first token of an idle replica: who waits for four has nearly used up the
objective of five, and a replica for less than three would be more than is needed."""

CONTEXT_TOKENS = 1024
EMBED_AND_LAYERS = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run of this program does."""

    trace: str
    policies: tuple[str, ...]
    agents: int
    time_l: float
    disk_slower: float
    low: float
    high: float
    low_s: float
    loads: float
    seconds: float
    mean: float
    step_tokens: int
    scale_down_s: float
    repeats: int
    seed: int
    lengths: Lengths
    model_dir: Path
    out: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How fast parameters move, from what was measured of one replica."""

    layers: int
    load_s: float
    link_bytes_per_s: int
    disk_bytes_per_s: int


def rates(plan: Plan, calibration: Calibration) -> Rates:
    """`time_l` times as long for a layer's bytes as for its execution in one request."""
    config = json.loads((plan.model_dir / EMBED_AND_LAYERS).read_text())
    layers = int(config["num_hidden_layers"])
    total = float32_bytes(plan.model_dir)
    embed = 4 * int(config["vocab_size"]) * int(config["hidden_size"])
    layer_load_s = plan.time_l * calibration.prefill_s / layers
    link = (total - embed) / layers / layer_load_s
    return Rates(
        layers=layers,
        load_s=total / link,
        link_bytes_per_s=round(link),
        disk_bytes_per_s=round(link / plan.disk_slower),
    )


def shape_of(plan: Plan, calibration: Calibration, speed: Rates) -> Shape:
    """The demand that was asked for, in requests of this machine."""
    capacity = calibration.capacity
    if plan.trace == "step":
        high_s = plan.loads * speed.load_s * plan.disk_slower
        return arrivals.step(
            capacity=capacity,
            low=plan.low,
            high=plan.high,
            low_s=plan.low_s,
            high_s=high_s,
            lengths=plan.lengths,
            seed=plan.seed,
        )
    common: dict[str, Any] = {
        "capacity": capacity,
        "mean": plan.mean,
        "seconds": plan.seconds,
        "lengths": plan.lengths,
        "seed": plan.seed,
    }
    match plan.trace:
        case "burst":
            return arrivals.burst(**common)
        case "azure-like":
            return arrivals.azure_like(**common)
        case path:
            return arrivals.from_csv(Path(path), **common)


def sizes(plan: Plan) -> list[int]:
    """Token counts of all prompts that may be asked for."""
    lengths = plan.lengths
    if plan.trace == "step":
        return [lengths.prompt_tokens]
    classes, size = [], lengths.prompt_tokens_min
    while size <= lengths.prompt_tokens_max:
        classes.append(length_class(size))
        size += 1
    return sorted(set(classes))


def play_all(
    plan: Plan, setting: Setting, book: PromptBook, shape: Shape, *, capacity: float
) -> dict[str, Played]:
    """One run of each policy. A static one holds what the peak of the step needs."""
    peak = min(plan.agents, math.ceil(plan.high / PEAK_UTILISATION))
    average = min(plan.agents, math.ceil(len(shape.arrivals) / shape.seconds / capacity))
    fixed = {"static": peak, "static-average": average}
    played = {}
    for policy in plan.policies:
        print(f"  {policy} ({shape.seconds:.0f} s)", file=sys.stderr, flush=True)
        replicas = fixed.get(policy, 1)
        highest = fixed.get(policy, plan.agents)
        # What is provisioned once loaded long ago, at whatever speed.
        own, way = (
            (replace(setting, disk_bytes_per_s=0), "stop-the-world") if policy in fixed else (setting, policy)
        )
        run = play(own, book, shape, policy=way, replicas=replicas, highest=highest)
        if policy not in CACHING:
            check_sources(run)
        played[policy] = replace(run, policy=policy)
    return played


def check_sources(run: Played) -> None:
    """Raises CliError when a replica of the run did not come from a peer: its figures say nothing of links."""
    added = [new for each in run.scales if each.decided_at >= run.started_at for new in each.replicas]
    if any(new.source == "disk" for new in added):
        raise CliError(f"a replica of the {run.policy} run came from a disk, not from a peer")


def rows(runs: Mapping[str, Figures]) -> list[list[str]]:
    """The table's lines."""
    return [
        [
            name,
            *(f"{value:.2f}" for value in run.ttft),
            *(f"{value * 1000:.0f}" for value in run.tbt[1:]),
            f"{run.attainment:.1%}",
            f"{run.replica_s:.0f}",
            str(run.replicas_max),
            str(run.handoffs),
            "-" if run.decided_s is None else f"{run.decided_s:.2f}",
            "-" if run.load_s is None else f"{run.load_s:.1f}",
            str(run.failed),
            str(run.mismatched),
        ]
        for name, run in runs.items()
    ]


HEADER = (
    *("policy", "TTFT p50 s", "p95", "p99", "TBT p95 ms", "p99", "in SLO", "replica-s", "max", "handoffs"),
    *("decided", "load s", "failed", "wrong"),
)


def run(plan: Plan) -> dict[str, object]:
    """Everything: calibrate, play, print, draw. Returns the figures of the last line."""
    print(report.hardware())
    book = PromptBook(plan.model_dir, sizes(plan))
    setting = Setting(
        model_dir=plan.model_dir,
        state_dir=plan.out / "state",
        agents=plan.agents,
        tokens=plan.lengths.output_tokens,
        tokens_max=plan.lengths.output_tokens if plan.trace == "step" else plan.lengths.output_tokens_max,
        context_length=CONTEXT_TOKENS,
        scale_down_s=plan.scale_down_s,
        step_tokens=plan.step_tokens,
    )
    print("  calibration: one replica at rest", file=sys.stderr, flush=True)
    calibration = calibrate(setting, book)
    speed = rates(plan, calibration)
    shape = shape_of(plan, calibration, speed)
    setting = replace(
        setting,
        link_bytes_per_s=speed.link_bytes_per_s,
        disk_bytes_per_s=speed.disk_bytes_per_s,
        queue_s=(QUEUE[0] * calibration.ttft_s, QUEUE[1] * calibration.ttft_s),
    )
    print(
        f"one replica: {calibration.capacity:.2f} requests/s, alone {calibration.ttft_s * 1000:.0f} ms to the first "
        f"token, {calibration.tbt_s * 1000:.0f} ms between tokens, {calibration.prefill_s * 1000:.0f} ms busy with a "
        f"prompt; all layers take {speed.load_s:.1f} s from a peer "
        f"({speed.link_bytes_per_s / 1e6:.0f} MB/s), {speed.load_s * plan.disk_slower:.0f} s from disk; "
        f"{len(shape.arrivals)} requests in {shape.seconds:.0f} s"
    )
    all_ratios = []
    for _ in range(plan.repeats):
        played = play_all(plan, setting, book, shape, capacity=calibration.capacity)
        runs = {name: figures_of(each, calibration, shape) for name, each in played.items()}
        print(report.table(HEADER, rows(runs)))
        all_ratios.append(ratios(runs, calibration=calibration, shape=shape, replica=_replica(plan, speed)))
        _write(plan, played, runs, all_ratios, shape)
    return _conclude(plan, all_ratios)


def _replica(plan: Plan, speed: Rates) -> Replica:
    return Replica(
        layers=speed.layers,
        load_s=speed.load_s,
        step_tokens=plan.step_tokens or STEP_TOKENS_MAX["cpu"],
        batch_size=BATCH_SIZE,
        cpu_share=cpu_share(len(usable_cores()), plan.agents) or 1.0,
    )


def _write(
    plan: Plan,
    played: Mapping[str, Played],
    runs: Mapping[str, Figures],
    all_ratios: Sequence[Mapping[str, object]],
    shape: Shape,
) -> None:
    plan.out.mkdir(parents=True, exist_ok=True)
    result = {
        "plan": {**asdict(plan), "model_dir": str(plan.model_dir), "out": str(plan.out)},
        "runs": {name: asdict(each) for name, each in runs.items()},
        "ratios": list(all_ratios),
    }
    (plan.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    # All that was seen in the last run of each, for who wants to look closer.
    for name, each in played.items():
        (plan.out / f"{name}.json").write_text(json.dumps(asdict(each)) + "\n")
    title = (
        f"{plan.trace}: {len(shape.arrivals)} requests, Time_l {plan.time_l:g}, up to {plan.agents} replicas"
    )
    (plan.out / "live.png").write_bytes(figures.draw(played, shape, title=title))
    print(f"written: {plan.out / 'result.json'}, {plan.out / 'live.png'}", file=sys.stderr)


def _conclude(plan: Plan, all_ratios: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """Medians over the repeats; with several, all values of the first ratio as well."""
    last: dict[str, object] = {"bench": "live", "trace": plan.trace, "repeats": plan.repeats}
    for key in all_ratios[0]:
        values = sorted(each[key] for each in all_ratios if each[key] is not None)
        middle = values[len(values) // 2] if values else None
        last[key] = sum(values) if key in ("failed", "mismatched") else middle
    if plan.repeats > 1:
        key = "ttft_p99_live_over_stop_the_world"
        last["each"] = [each[key] for each in all_ratios]
    return last


def parse(argv: Sequence[str] | None = None) -> Plan:
    """The flags."""
    flags = argparse.ArgumentParser(
        prog="python -m bench.live", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = flags.add_argument
    add(
        "--trace",
        default="step",
        help="step, burst, azure-like, or a CSV file in Azure's format (%(default)s)",
    )
    add(
        "--policies",
        default=",".join(POLICIES),
        help="comma-separated; also network, host-cache, static-average",
    )
    add("--agents", type=int, default=2, help="machines to play, the most replicas (%(default)s)")
    add("--time-l", type=float, default=6.0, help="load time of a layer over its execution (%(default)s)")
    add("--disk-slower", type=float, default=10.0, help="disk against link (%(default)s)")
    add("--low", type=float, default=0.5, help="step: before, times one replica's capacity (%(default)s)")
    add("--high", type=float, default=1.8, help="step: after (%(default)s)")
    add("--low-s", type=float, default=12.0, help="step: seconds before (%(default)s)")
    add("--loads", type=float, default=3.0, help="step: how many loads from disk it outlasts (%(default)s)")
    add("--seconds", type=float, default=100.0, help="other shapes: length of a run (%(default)s)")
    add(
        "--mean",
        type=float,
        default=1.2,
        help="other shapes: mean, times one replica's capacity (%(default)s)",
    )
    add("--prompt-tokens", type=int, default=16, help="of a prompt, median (%(default)s)")
    add("--output-tokens", type=int, default=4, help="of an answer, median (%(default)s)")
    add(
        "--step-tokens",
        type=int,
        default=0,
        help="most tokens of one step; 0 is the device's own (%(default)s)",
    )
    add(
        "--scale-down-s",
        type=float,
        default=30.0,
        help="how long demand is low before a replica goes (%(default)s)",
    )
    add("--repeats", type=int, default=1)
    add("--seed", type=int, default=1)
    add("--model-dir", type=Path, default=default_model_dir())
    add("--out", type=Path, default=Path("out/live"))
    told = vars(flags.parse_args(argv))
    prompt, output = told.pop("prompt_tokens"), told.pop("output_tokens")
    told["policies"] = tuple(told["policies"].split(","))
    told["out"] = told["out"].absolute()
    lengths = Lengths(
        prompt_tokens=prompt,
        prompt_tokens_min=max(8, prompt // 4),
        prompt_tokens_max=min(prompt * 6, CONTEXT_TOKENS - 200),
        output_tokens=output,
        output_tokens_max=output * 4,
    )
    return Plan(lengths=lengths, **told)


def main() -> int:
    """0 when nothing failed and no answer was wrong."""
    plan = parse()
    try:
        with sigterm_interrupts():
            model_dir = ensure_model(plan.model_dir, report=lambda line: print(line, file=sys.stderr))
            last = run(replace(plan, model_dir=model_dir))
    except CliError as error:
        print(f"bench.live: {error}", file=sys.stderr)
        return 1
    print(report.last_line(last))
    return 1 if last["failed"] or last["mismatched"] else 0


if __name__ == "__main__":
    sys.exit(main())
