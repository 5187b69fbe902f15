"""One suite over every transport: what a link promises, whatever carries its bytes.

Peers and target are processes. `memory`, which lives in one process and in virtual time, runs the same cases inside
the target's; `nixl-host` and `shm` know no network that could vanish, and `memory` nobody who could be a stranger.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bench.network import Network, network

from layercast_cli.certificates import Authority

pytestmark = pytest.mark.processes

FOLDER = Path(__file__).parent
TOKEN = "a token that the chain shares"
DEADLINE_S = 60.0
ODD = [0, 1, 7, 4097, 300_001, 131_072, *range(3, 40), 65_521]
PLAIN = [300_000] * 4
LONG = [4 * 1024 * 1024] * 8
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A transport and how it is set up."""

    tls: bool = False
    nixl: bool = False
    shm: bool = False
    virtual: bool = False
    environment: dict[str, str] = field(default_factory=dict)


NIXL = {"NIXL_LOG_LEVEL": "ERROR", "UCX_LOG_LEVEL": "fatal"}
WAYS = {
    "memory": Way(virtual=True),
    "shm": Way(shm=True),
    "shm+tls": Way(shm=True, tls=True),
    "tcp": Way(),
    "tcp+tls": Way(tls=True),
    # Over sockets of the library, and by the kernel's copy between processes. Both describe regions over mutual TLS.
    "nixl-tcp": Way(tls=True, nixl=True, environment={**NIXL, "UCX_TLS": "tcp"}),
    "nixl-host": Way(tls=True, nixl=True, environment={**NIXL, "UCX_TLS": "tcp,cma,sysv,self"}),
}
NETWORKED = ("memory", "tcp", "tcp+tls", "nixl-tcp")
REAL_NETWORKED = ("tcp", "tcp+tls", "nixl-tcp")
GUARDED = tuple(name for name, way in WAYS.items() if not way.virtual)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    """Every transport."""
    chosen = WAYS[request.param]
    if chosen.nixl and importlib.util.find_spec("nixl_cu12") is None:
        pytest.fail("NIXL is not installed: pip install 'layercast[rdma]'")
    return chosen


@pytest.fixture
def machines() -> Iterator[Network]:
    """Three on one switch: the target is 0, its sources are 1 and 2."""
    with network(3) as made:
        yield made


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By role; `stranger` is an agent of another authority."""
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority()
    for role in ("agent", "gateway"):
        authority.issue(role, folder / role)
    Authority().issue("agent", folder / "stranger")
    return {name: folder / name for name in ("agent", "gateway", "stranger")}


class Source:
    """A holder as a process; by `memory` only a name."""

    def __init__(
        self,
        way: Way,
        certificates: dict[str, Path],
        folder: Path,
        *,
        name: str,
        sizes: list[int],
        chunk_bytes: int,
        at: tuple[Network, int] | None,
        upstreams: list[dict[str, Any]],
    ) -> None:
        self.name = name
        self.fenced = False
        self.spec: dict[str, Any] = {"peer_id": name}
        self.process: subprocess.Popen[str] | None = None
        if way.virtual:
            return
        settings = {
            "sizes": sizes,
            "chunk_bytes": chunk_bytes,
            "egress_bytes_per_s": 0,
            "host": at[0].address(at[1]) if at else "127.0.0.1",
            "upstreams": upstreams,
            "nixl": way.nixl,
            "memory_socket": str(folder / f"{name}.sock") if way.shm else "",
            "tls_dir": str(certificates["agent"]) if way.tls else "",
        }
        command = [sys.executable, str(FOLDER / "peer_process.py"), json.dumps(settings)]
        self.process = subprocess.Popen(
            at[0].command(at[1], command) if at else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(way, at is not None),
        )
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()
        ready = self.wait("ready")
        self.spec |= {"address": ready["address"], "data_address": ready["data_address"]}
        if way.shm:
            self.spec["memory_socket"] = settings["memory_socket"]

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                if line.startswith("{"):  # libraries may write there too
                    self._lines.put(json.loads(line))

    def wait(self, event: str) -> dict[str, Any]:
        while (said := self._lines.get(timeout=DEADLINE_S))["event"] != event:
            pass
        return said

    def command(self, line: str) -> None:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def fence(self) -> None:
        self.fenced = True
        if self.process is not None:
            self.command("fence")
            self.wait("fenced")

    def strike(self, how: str) -> list[str]:
        """The fault as the target's process carries it out."""
        return [how, self.name] if self.process is None else ["kill", f"-{how}", str(self.process.pid)]

    def close(self) -> None:
        if self.process is None:
            return
        self.process.kill()
        self.process.wait(DEADLINE_S)
        assert self.process.stdin is not None
        self.process.stdin.close()


def environment(way: Way, networked: bool) -> dict[str, str]:
    cards = {"UCX_NET_DEVICES": "eth0" if networked else "lo"} if way.nixl else {}
    return {**os.environ, **way.environment, **cards}


Start = Callable[..., Source]


@pytest.fixture
def source(way: Way, certificates: dict[str, Path], tmp_path: Path) -> Iterator[Start]:
    """Starts holders and kills them after the test."""
    started: list[Source] = []

    def start(
        sizes: list[int] = PLAIN,
        chunk_bytes: int = 100_000,
        *,
        at: tuple[Network, int] | None = None,
        upstreams: tuple[Source, ...] = (),
    ) -> Source:
        started.append(
            Source(
                way,
                certificates,
                tmp_path,
                name="ABCDEF"[len(started)],
                sizes=sizes,
                chunk_bytes=chunk_bytes,
                at=at,
                upstreams=[one.spec for one in upstreams],
            )
        )
        return started[-1]

    yield start
    for one in started:
        one.close()


def run(
    case: str,
    way: Way,
    sources: list[Source],
    certificate: Path,
    *,
    sizes: list[int] = PLAIN,
    chunk_bytes: int = 100_000,
    token: str = TOKEN,
    at: Network | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The target's process does one case."""
    settings = {
        "case": case,
        "sizes": sizes,
        "chunk_bytes": chunk_bytes,
        "nixl": way.nixl,
        "virtual": way.virtual,
        "seed": 7,
        "token": token,
        "tls_dir": str(certificate) if way.tls else "",
        "upstreams": [one.spec for one in sources],
        "fenced": [one.name for one in sources if one.fenced],
        **more,
    }
    command = [sys.executable, str(FOLDER / "link_process.py"), json.dumps(settings)]
    done = subprocess.run(
        at.command(0, command) if at else command,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env=environment(way, at is not None),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def sha256(synthetic: ModuleType, sizes: list[int], chunk_bytes: int = 100_000) -> str:
    return hashlib.sha256(b"".join(synthetic.make(sizes, chunk_bytes=chunk_bytes).data)).hexdigest()


def test_odd_sizes_empty_segments_and_many_of_them(
    way: Way, source: Start, certificates: dict[str, Path], synthetic: ModuleType
) -> None:
    said = run("deliver", way, [source(ODD, 4_099)], certificates["agent"], sizes=ODD, chunk_bytes=4_099)
    assert said["sha256"] == sha256(synthetic, ODD, 4_099)


def test_fenced_regions_are_refused(way: Way, source: Start, certificates: dict[str, Path]) -> None:
    holder = source()
    holder.fence()
    said = run("refuse", way, [holder], certificates["agent"])
    assert "not readable" in said["reason"]
    assert not said["touched"]


@pytest.mark.parametrize("way", GUARDED, indirect=True)
def test_strangers_are_refused(way: Way, source: Start, certificates: dict[str, Path]) -> None:
    holder = source()
    strangers: list[dict[str, Any]] = (
        [{"certificate": certificates["stranger"]}, {"certificate": certificates["gateway"]}]
        if way.tls
        else [{"certificate": certificates["agent"], "token": "a guess"}]
    )
    if way.shm and way.tls:  # the certificate opens the residency, the token the memory
        strangers.append({"certificate": certificates["agent"], "token": "a guess"})
    for stranger in strangers:
        said = run("refuse", way, [holder], stranger["certificate"], token=stranger.get("token", TOKEN))
        assert said["reason"] and not said["touched"]


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_dead_peer_is_left_in_time_and_another_completes(
    way: Way, source: Start, certificates: dict[str, Path], synthetic: ModuleType, how: str
) -> None:
    first, second = source(), source()
    said = run(
        "survive",
        way,
        [first, second],
        certificates["agent"],
        fault=first.strike(how),
        deadline_s=3.0,
    )
    assert said["sha256"] == sha256(synthetic, PLAIN)
    # Bytes that were in the kernel's hands may still come; what cannot come is given up, and the memory is quiet soon.
    assert said["gone_s"] < 10


def test_an_aborted_link_leaves_the_memory_to_the_next(
    way: Way, source: Start, certificates: dict[str, Path], synthetic: ModuleType
) -> None:
    said = run("abort", way, [source()], certificates["agent"])
    assert said["sha256"] == sha256(synthetic, PLAIN)
    assert said["quiet_s"] < 5


@pytest.mark.parametrize("way", NETWORKED, indirect=True)
@pytest.mark.parametrize("how", ["cut", "swallow"])
def test_a_network_that_vanishes_is_left_in_time_and_another_peer_completes(
    way: Way,
    source: Start,
    certificates: dict[str, Path],
    synthetic: ModuleType,
    *,
    machines: Network,
    how: str,
) -> None:
    """`cut`: no carrier. `swallow`: all looks well, and no packet arrives; nobody is told of either."""
    first, second = source(at=(machines, 1)), source(at=(machines, 2))
    fault = {"cut": machines.cut, "swallow": machines.swallow}[how](1)
    said = run(
        "survive",
        way,
        [first, second],
        certificates["agent"],
        at=machines,
        fault=[how, first.name] if way.virtual else fault,
        deadline_s=3.0,
    )
    assert said["ended"], "the link told no reason"
    assert said["sha256"] == sha256(synthetic, PLAIN)
    assert said["gone_s"] < 10


@pytest.mark.parametrize("way", REAL_NETWORKED, indirect=True)
@pytest.mark.parametrize("how", ["cut", "swallow"])
def test_a_transfer_whose_only_peer_vanishes_says_so_and_goes_on_when_it_is_back(
    way: Way, source: Start, synthetic: ModuleType, machines: Network, how: str
) -> None:
    machines.shape(200_000_000)  # 32 MiB take longer than a second
    holder = source(LONG, MIB, at=(machines, 1))
    target = source(LONG, MIB, at=(machines, 0), upstreams=(holder,))
    target.command("load")
    target.wait("segment")
    command = {"cut": machines.cut, "swallow": machines.swallow}[how](1)
    subprocess.run(command, check=True, timeout=DEADLINE_S)
    ends_at = time.monotonic() + DEADLINE_S / 2
    while not (said := status(target))["stalled"]:
        assert time.monotonic() < ends_at, "the transfer waits for a peer that is gone"
    assert "no upstream has any of the" in said["reason"]
    assert any(failure.startswith("A: ") for failure in said["failures"])
    assert 0 < said["done"] < sum(LONG)
    machines.mend(1)
    target.command("again")
    done = target.wait("complete")
    assert done["sha256"] == sha256(synthetic, LONG, MIB)


def status(target: Source) -> dict[str, Any]:
    target.command("status")
    return target.wait("status")
