"""`python -m bench.multicast`: how close multicast comes to the wire, and the data plane to a plain socket.

Four namespaces, each sending at most 2 Gbit/s, run one holder and three targets with the product's code. Chain
and star alternate, so that a busy machine hurts both; then, with the limits off, one hop of our transport
alternates with a plain copy over two sockets, unchecked and summed. All figures are medians of one run, and every
loaded byte is compared with the manifest. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.network import Network, NetworkError, network

from bench import report

RATE_BITS_PER_S = 2_000_000_000
NBYTES = 512 * 1024 * 1024
TARGETS = 3
ROOT = Path(__file__).resolve().parent.parent
END_DEADLINE_S = 5.0


class BenchError(Exception):
    """A measurement that is none: a process died, or bytes were wrong."""


class NodeProcess:
    """One `bench.chain_node` in its namespace."""

    def __init__(self, place: Network, machine: int, *, manifest: Path, nbytes: int) -> None:
        self.machine = machine
        self.host = place.address(machine)
        settings = {
            "host": self.host,
            "manifest": str(manifest),
            "source": machine == 0,
            "nbytes": nbytes,
        }
        command = [sys.executable, "-m", "bench.chain_node", json.dumps(settings)]
        self._process = subprocess.Popen(
            place.command(machine, command),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # ctrl-C is ours to handle; the end of stdin ends it
        )
        self.hear("prepared")
        ready = self.hear("ready")
        self.upstream = {
            "peer_id": f"node-{machine}",
            "address": ready["address"],
            "data_address": ready["data_address"],
        }

    def tell(self, do: str, **fields: Any) -> None:
        """Give a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
        self._process.stdin.flush()

    def hear(self, event: str) -> dict[str, Any]:
        """The next line, which must be that event."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        said: dict[str, Any] = json.loads(line) if line else {"event": "the end of the process"}
        if said["event"] != event:
            raise BenchError(f"machine {self.machine} should say {event!r} and said {said}")
        return said

    def end(self) -> None:
        """Let it end, by force if it does not want to."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measurement: seconds until all targets had everything, and CPU seconds of all targets."""

    elapsed_s: float
    cpu_s: float


@contextlib.contextmanager
def nodes(place: Network, *, nbytes: int) -> Iterator[list[NodeProcess]]:
    """The processes, the holder first."""
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        made = []
        for machine in range(1 + TARGETS):
            node = NodeProcess(place, machine, manifest=Path(folder) / "manifest.json", nbytes=nbytes)
            stack.callback(node.end)
            made.append(node)
        yield made


def measure(targets: Sequence[NodeProcess], begin: Callable[[NodeProcess], None]) -> Sample:
    """Empty the targets, begin, wait for all, and compare every byte."""
    for node in targets:
        node.tell("prepare")
    for node in targets:
        node.hear("prepared")
    for node in targets:
        begin(node)
    ends = [node.hear("loaded") for node in targets]
    for node, end in zip(targets, ends, strict=True):
        if not end["complete"] or end["failures"]:
            raise BenchError(f"machine {node.machine} did not load as it should: {end}")
        node.tell("verify")
    for node in targets:
        if not node.hear("verified")["good"]:
            raise BenchError(f"machine {node.machine} holds wrong bytes")
    elapsed_s = max(end["ended_at"] for end in ends) - min(end["begun_at"] for end in ends)
    return Sample(elapsed_s=elapsed_s, cpu_s=sum(end["cpu_s"] for end in ends))


def chain(all_nodes: Sequence[NodeProcess]) -> Sample:
    """Each target feeds from its predecessor, and knows those before it as substitutes."""

    def begin(node: NodeProcess) -> None:
        node.tell("load", upstreams=[other.upstream for other in reversed(all_nodes[: node.machine])])

    return measure(all_nodes[1:], begin)


def star(all_nodes: Sequence[NodeProcess]) -> Sample:
    """Every target feeds from the holder."""
    return measure(all_nodes[1:], lambda node: node.tell("load", upstreams=[all_nodes[0].upstream]))


def hop(all_nodes: Sequence[NodeProcess]) -> Sample:
    """One target feeds from the holder."""
    return measure(all_nodes[1:2], lambda node: node.tell("load", upstreams=[all_nodes[0].upstream]))


def plain(all_nodes: Sequence[NodeProcess], *, summed: bool = False) -> Sample:
    """One target copies from the holder by plain sockets."""
    all_nodes[0].tell("serve_plain")
    told = {"host": all_nodes[0].host, "port": all_nodes[0].hear("serving")["port"], "summed": summed}
    return measure(all_nodes[1:2], lambda node: node.tell("fetch_plain", **told))


def plain_summed(all_nodes: Sequence[NodeProcess]) -> Sample:
    """The same, and each chunk's crc32 is computed where it arrives, as our transports do."""
    return plain(all_nodes, summed=True)


Way = Callable[[Sequence[NodeProcess]], Sample]


def alternate(all_nodes: Sequence[NodeProcess], ways: Sequence[Way], rounds: int) -> list[list[Sample]]:
    """`rounds` samples of each way, in turns."""
    samples: list[list[Sample]] = [[] for _ in ways]
    for turn in range(rounds):
        for taken, way in zip(samples, ways, strict=True):
            taken.append(way(all_nodes))
            print(f"  {turn + 1}/{rounds} {way.__name__}: {taken[-1].elapsed_s:.3f} s", file=sys.stderr)
    return samples


def median_s(samples: Sequence[Sample]) -> float:
    """Median of the elapsed times."""
    return statistics.median(sample.elapsed_s for sample in samples)


def _row(name: str, samples: Sequence[Sample], nbytes: int, targets: int) -> list[str]:
    times = [sample.elapsed_s for sample in samples]
    cpu_s = statistics.median(sample.cpu_s for sample in samples)
    middle = statistics.median(times)
    gigabytes = nbytes * targets / 1e9
    return [
        name,
        f"{middle:.3f}",
        f"{min(times):.3f}",
        f"{max(times):.3f}",
        f"{gigabytes / middle:.2f}",
        f"{cpu_s / gigabytes:.2f}",
    ]


def run(*, rounds: int, hop_rounds: int, nbytes: int) -> dict[str, object]:
    """Measure everything, print the table, return the figures."""
    print(report.hardware())
    ideal_s = nbytes * 8 / RATE_BITS_PER_S
    chains: list[Sample] = []
    stars: list[Sample] = []
    with network(1 + TARGETS) as place, nodes(place, nbytes=nbytes) as all_nodes:
        if rounds:
            place.shape(RATE_BITS_PER_S)
            chains, stars = alternate(all_nodes, [chain, star], rounds)
        place.shape(None)
        hops, plains, summed = alternate(all_nodes, [hop, plain, plain_summed], hop_rounds)
    rows = (
        [
            _row("chain A-B-C-D, 2 Gbit/s", chains, nbytes, TARGETS),
            _row("star A-{B,C,D}, 2 Gbit/s", stars, nbytes, TARGETS),
        ]
        if rounds
        else []
    )
    rows += [
        _row("tcp, one hop, no limit", hops, nbytes, 1),
        _row("two plain sockets", plains, nbytes, 1),
        _row("two plain sockets and a crc32", summed, nbytes, 1),
    ]
    header = ["", "median s", "best", "worst", "GB/s in all", "targets' CPU s/GB"]
    print(report.table(header, rows))
    figures: dict[str, object] = {"bench": "multicast", "bytes": nbytes, "rounds": rounds}
    if rounds:
        figures["ideal_s"] = ideal_s
        figures["chain_over_ideal"] = median_s(chains) / ideal_s
        figures["star_over_chain"] = median_s(stars) / median_s(chains)
    figures["tcp_over_socket"] = median_s(plains) / median_s(hops)
    figures["tcp_over_summed_socket"] = median_s(summed) / median_s(hops)
    return figures


def main() -> int:
    """0 when everything was measured, 2 when this machine cannot."""
    parser = argparse.ArgumentParser(prog="python -m bench.multicast", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of chain and star")
    parser.add_argument("--hop-rounds", type=int, default=7, help="of the single hop and the plain sockets")
    parser.add_argument("--mib", type=int, default=NBYTES // 2**20, help="size of the checkpoint")
    arguments = parser.parse_args()
    try:
        figures = run(rounds=arguments.rounds, hop_rounds=arguments.hop_rounds, nbytes=arguments.mib * 2**20)
    except (NetworkError, BenchError) as error:
        print(f"bench.multicast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(report.last_line(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
