"""`layercast`: the command line. Parses flags, calls one function a command, turns errors into exit codes.

0 means done, 1 means it could not be done now (or the demo found a fault), 2 means the command or a file is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from layercast_cli import settings
from layercast_cli.errors import CliError
from layercast_cli.explain import explain
from layercast_cli.get import get
from layercast_cli.kubectl import doctor, is_remote, show, tell
from layercast_cli.scale import scale
from layercast_cli.state import StateDir
from layercast_cli.timeline import timeline

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = settings.parser()
    flags = parser.parse_args(arguments)
    if flags.command is None:
        parser.print_help()
        return 2
    try:
        return run(flags)
    except CliError as error:
        print(f"layercast {flags.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def run(flags: argparse.Namespace) -> int:
    """One command; CliError when it cannot be done."""
    # The heavy ones are imported at use: `layercast get` shall answer at once.
    if flags.command == "up":
        from layercast_cli.up import up

        return up(settings.up_settings(flags))
    if flags.command == "demo":
        from layercast_cli.demo import demo

        return demo(settings.demo_settings(flags))
    if flags.command == "fetch-demo-model":
        from layercast_cli.model import ensure_model

        print(ensure_model(flags.to, report=print))
        return 0
    if flags.command == "doctor":
        return doctor(namespace=flags.namespace)
    tell(view(flags, settings.state_of(flags)))
    return 0


def view(flags: argparse.Namespace, state: StateDir) -> str:
    """The text of the commands that only read, or change one number."""
    if flags.command in {"explain", "timeline", "get"} and is_remote(flags.name):
        every = flags.command == "timeline" and flags.all
        output = flags.output if flags.command == "get" else ""
        return show(flags.command, flags.name, output=output, every=every)
    if flags.command == "scale":
        return scale(state, name=flags.name, replicas=flags.replicas)
    if flags.command == "explain":
        text = explain(state, name=flags.name)
    elif flags.command == "timeline":
        text = timeline(state, name=flags.name, width=terminal_width(), every=flags.all)
    else:
        text = get(state, name=flags.name, output=flags.output)
    if not state.running():
        print(f"note: no cluster runs on {state.root} now; this is what was last seen", file=sys.stderr)
    return text


def terminal_width() -> int:
    """Columns to use: the terminal's, or 100 where there is none."""
    import shutil

    return min(160, shutil.get_terminal_size((100, 24)).columns)


if __name__ == "__main__":
    sys.exit(main())
