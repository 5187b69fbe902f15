"""`python -m bench.gpu`: runs the parts, each in a process of its own, and puts their figures together.

A kernel that fails poisons the process's GPU context, so a part may fail without stopping the others. All processes
start at once and import meanwhile; the parts themselves run one after another, alone on the device.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench import report

WAVES = (("ceilings",), ("model",), ("kernels", "tokens"), ("load",), ("scaleup",), ("products",))
"""Parts that run at the same time: none that takes times, beside another."""

PARTS = tuple(part for wave in WAVES for part in wave)

LIMIT_S = {"full": 285.0, "shake": 170.0, "small": 1200.0}
"""All parts together; those for which nothing is left fail."""

RESULT = "RESULT "


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a part said; it may have figures and fail all the same, by a wrong result."""

    part: str
    seconds: float
    log: str
    figures: dict[str, float | str]
    failed: bool


def start(part: str, arguments: argparse.Namespace, folder: Path) -> subprocess.Popen[str]:
    """The part's process, which waits for a line on its standard input before it begins."""
    command = [sys.executable, "-m", f"bench.gpu.{part}", "--mode", arguments.mode]
    with (folder / f"{part}.log").open("w") as log:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True)


def finish(part: str, process: subprocess.Popen[str], folder: Path, *, limit_s: float) -> Outcome:
    """Waits for a part's end."""
    began = time.monotonic()
    try:
        process.wait(max(0.0, limit_s))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    log = (folder / f"{part}.log").read_text()
    results = [line for line in log.splitlines() if line.startswith(RESULT)]
    return Outcome(
        part=part,
        seconds=time.monotonic() - began,
        log=log,
        figures=json.loads(results[-1].removeprefix(RESULT)) if results else {},
        failed=process.returncode != 0 or not results,
    )


def let_go(process: subprocess.Popen[str], ceilings: dict[str, float | str]) -> None:
    """Tells a part what was measured so far, which is what it waits for."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died while it imported; `finish` says so
        process.stdin.write(json.dumps(ceilings) + "\n")
        process.stdin.close()


def run(arguments: argparse.Namespace, folder: Path) -> list[Outcome]:
    """All parts, wave by wave; the figures are given to those after them."""
    ends = time.monotonic() + LIMIT_S[arguments.mode]
    processes = {part: start(part, arguments, folder) for part in arguments.parts}
    outcomes: list[Outcome] = []
    try:
        for wave in WAVES:
            running = {part: process for part, process in processes.items() if part in wave}
            known = {k: v for outcome in outcomes for k, v in outcome.figures.items()}
            for process in running.values():
                let_go(process, known)
            for part, process in running.items():
                outcome = finish(part, process, folder, limit_s=ends - time.monotonic())
                outcomes.append(outcome)
                print(f"== {part}: {'failed' if outcome.failed else 'ok'}, {outcome.seconds:.1f} s")
                print(re.sub(rf"^{RESULT}.*\n?", "", outcome.log, flags=re.MULTILINE).rstrip(), flush=True)
    finally:
        for process in processes.values():
            process.kill()
    return outcomes


def main() -> int:
    """Entry point: 0 when every part went well."""
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--small", dest="mode", action="store_const", const="small", default="full")
    parser.add_argument("--shake", dest="mode", action="store_const", const="shake")
    arguments = parser.parse_args()
    arguments.parts = arguments.parts or list(PARTS)
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.environ.get("OUT") or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = run(arguments, folder)
        figures: dict[str, object] = {
            "bench": "gpu",
            "mode": arguments.mode,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "hardware": report.hardware(),
        }
        for outcome in outcomes:
            figures |= outcome.figures
        figures["failed"] = [outcome.part for outcome in outcomes if outcome.failed]
        print(report.table(["figure", "value"], [[key, _shown(value)] for key, value in figures.items()]))
        (folder / "gpu.json").write_text(json.dumps(figures, indent=1) + "\n")
        print(report.last_line(figures))
    return 1 if figures["failed"] else 0


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
