"""Four machines on one switch, as network namespaces: where transfers are measured against a known wire.

Every name carries this process's id, so two benchmarks do not meet and a leftover can be told from another's.
Needs root and iproute2. Namespaces take their interfaces with them, so removing them removes everything.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from types import FrameType

SUBNET = "10.177.0"
INTERFACE = "eth0"
# A burst of 5 ms of the rate keeps a coarse kernel timer from starving the wire. The queue holds what TCP has in
# flight: one that drops measures congestion control instead of us.
BURST_BYTES = 1_250_000
QUEUE_BYTES = 32 * 1024 * 1024


class NetworkError(Exception):
    """The machine cannot make the namespaces; the sentence says what is missing."""


class Network:
    """Machines 0..n-1, each a namespace with one interface on a common bridge."""

    def __init__(self, machines: int) -> None:
        self._prefix = f"layercast-{os.getpid()}"
        self._switch = f"{self._prefix}-switch"
        self._machines = [f"{self._prefix}-{index}" for index in range(machines)]

    def address(self, machine: int) -> str:
        """IPv4 address of a machine."""
        return f"{SUBNET}.{machine + 1}"

    def command(self, machine: int, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` on a machine."""
        return ["ip", "netns", "exec", self._machines[machine], *command]

    def cut(self, machine: int) -> list[str]:
        """The command line that takes the switch's power from a machine: its interface has no carrier any more."""
        return ["ip", "-n", self._switch, "link", "set", _port(machine), "down"]

    def swallow(self, machine: int) -> list[str]:
        """The command line after which all packets of and to a machine vanish, and its interface looks well."""
        return ["ip", "-n", self._switch, "link", "set", _port(machine), "nomaster"]

    def mend(self, machine: int) -> None:
        """Undo `cut` and `swallow`."""
        _run("ip", "-n", self._switch, "link", "set", _port(machine), "master", "bridge", "up")

    def shape(self, bits_per_s: int | None) -> None:
        """Limit what each machine sends; None takes the limit away."""
        for name in self._machines:
            if bits_per_s is None:
                _run("tc", "-n", name, "qdisc", "replace", "dev", INTERFACE, "root", "pfifo")
            else:
                limits = ["rate", f"{bits_per_s}bit", "burst", str(BURST_BYTES), "limit", str(QUEUE_BYTES)]
                _run("tc", "-n", name, "qdisc", "replace", "dev", INTERFACE, "root", "tbf", *limits)

    def build(self) -> None:
        """Make everything; NetworkError when the machine does not let us."""
        _run("ip", "netns", "add", self._switch)
        _run("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "bridge", "up")
        for index, name in enumerate(self._machines):
            port = _port(index)
            _run("ip", "netns", "add", name)
            _run("ip", "-n", self._switch, "link", "add", port, "type", "veth",
                 "peer", "name", INTERFACE, "netns", name)  # fmt: skip
            _run("ip", "-n", self._switch, "link", "set", port, "master", "bridge", "up")
            _run("ip", "-n", name, "address", "add", f"{self.address(index)}/24", "dev", INTERFACE)
            _run("ip", "-n", name, "link", "set", INTERFACE, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")

    def remove(self) -> None:
        """Remove what there is of it; never raises."""
        for name in (*self._machines, self._switch):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@contextlib.contextmanager
def network(machines: int) -> Iterator[Network]:
    """A network for the length of the block, removed however the block ends: error, ctrl-C or SIGTERM.

    NetworkError: not root, no iproute2, or a kernel that refuses.
    """
    if os.geteuid() != 0:
        raise NetworkError("making network namespaces needs root")
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            raise NetworkError(f"making network namespaces needs iproute2, and `{program}` is not installed")
    made = Network(machines)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        made.build()
        yield made
    finally:
        made.remove()
        signal.signal(signal.SIGTERM, before)


def _port(machine: int) -> str:
    return f"port{machine}"


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NetworkError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
