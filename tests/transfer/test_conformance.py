"""One suite over every transport between processes: what a link promises, whatever carries its bytes.

`memory`, which lives in one process and in virtual time, is held to the same promises by `test_chain_simulation.py`.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from layercast_cli.certificates import Authority

pytestmark = pytest.mark.processes

FOLDER = Path(__file__).parent
TOKEN = "a token that the chain shares"
DEADLINE_S = 60.0
ODD = [0, 1, 7, 4097, 300_001, 131_072, *range(3, 40), 65_521]
PLAIN = [300_000] * 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A transport and how it is set up."""

    tls: bool
    nixl: bool
    environment: dict[str, str]


NIXL = {"NIXL_LOG_LEVEL": "ERROR", "UCX_LOG_LEVEL": "fatal"}
WAYS = {
    "tcp": Way(tls=False, nixl=False, environment={}),
    "tcp+tls": Way(tls=True, nixl=False, environment={}),
    # Over sockets of the library, and by the kernel's copy between processes. Both describe regions over mutual TLS.
    "nixl-tcp": Way(tls=True, nixl=True, environment={**NIXL, "UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}),
    "nixl-host": Way(
        tls=True, nixl=True, environment={**NIXL, "UCX_TLS": "tcp,cma,sysv,self", "UCX_NET_DEVICES": "lo"}
    ),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    """Every transport."""
    chosen = WAYS[request.param]
    if chosen.nixl and importlib.util.find_spec("nixl_cu12") is None:
        pytest.fail("NIXL is not installed: pip install 'layercast[rdma]'")
    return chosen


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
    """A holder as a process."""

    def __init__(self, way: Way, certificates: dict[str, Path], sizes: list[int], chunk_bytes: int) -> None:
        settings = {
            "sizes": sizes,
            "chunk_bytes": chunk_bytes,
            "egress_bytes_per_s": 0,
            "upstreams": [],
            "nixl": way.nixl,
            "tls_dir": str(certificates["agent"]) if way.tls else "",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(FOLDER / "peer_process.py"), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **way.environment},
        )
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        ready = self.wait("ready")
        self.spec = {"peer_id": "A", "address": ready["address"], "data_address": ready["data_address"]}

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                if line.startswith("{"):  # libraries may write there too
                    self._lines.put(json.loads(line))

    def wait(self, event: str) -> dict[str, Any]:
        while (said := self._lines.get(timeout=DEADLINE_S))["event"] != event:
            pass
        return said

    def command(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)
        assert self.process.stdin is not None
        self.process.stdin.close()


Start = Callable[..., Source]


@pytest.fixture
def source(way: Way, certificates: dict[str, Path]) -> Iterator[Start]:
    """Starts holders and kills them after the test."""
    started: list[Source] = []

    def start(sizes: list[int] = PLAIN, chunk_bytes: int = 100_000) -> Source:
        started.append(Source(way, certificates, sizes, chunk_bytes))
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
    **more: Any,
) -> dict[str, Any]:
    """The target's process does one case."""
    settings = {
        "case": case,
        "sizes": sizes,
        "chunk_bytes": chunk_bytes,
        "nixl": way.nixl,
        "token": token,
        "tls_dir": str(certificate) if way.tls else "",
        "upstreams": [one.spec for one in sources],
        **more,
    }
    done = subprocess.run(
        [sys.executable, str(FOLDER / "link_process.py"), json.dumps(settings)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, **way.environment},
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
    holder.command("fence")
    holder.wait("fenced")
    said = run("refuse", way, [holder], certificates["agent"])
    assert "not readable" in said["reason"]
    assert not said["touched"]


def test_strangers_are_refused(way: Way, source: Start, certificates: dict[str, Path]) -> None:
    holder = source()
    strangers: list[dict[str, Any]] = (
        [{"certificate": certificates["stranger"]}, {"certificate": certificates["gateway"]}]
        if way.tls
        else [{"certificate": certificates["agent"], "token": "a guess"}]
    )
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
        pid=first.process.pid,
        signal=how,
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
