"""A chain A -> B -> C of three operating-system processes over loopback, and what may happen to B."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

MIB = 1024 * 1024
SIZES = [4 * MIB] * 8
EGRESS = 32 * MIB  # bytes per second: a second for the whole checkpoint
DEADLINE_S = 20.0


class Peer:
    """One process of the chain."""

    def __init__(self, name: str, upstreams: list[Peer], *, egress_bytes_per_s: int = EGRESS) -> None:
        self.name = name
        settings = {
            "sizes": SIZES,
            "chunk_bytes": MIB,
            "egress_bytes_per_s": egress_bytes_per_s,
            "upstreams": [upstream.spec for upstream in upstreams],
        }
        script = Path(__file__).parent / "peer_process.py"
        self.spec: dict[str, str] = {}
        self.process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._said: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        ready = self.wait("ready")
        self.spec = {
            "peer_id": name,
            "address": ready["address"],
            "data_address": ready["data_address"],
        }

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._said.put(json.loads(line))

    def wait(self, event: str, **fields: Any) -> dict[str, Any]:
        """The next event of that name and content; others are skipped."""
        while True:
            said = self._said.get(timeout=DEADLINE_S)
            assert said["event"] != "failed", said
            if said["event"] == event and fields.items() <= said.items():
                return said

    def command(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def load(self) -> None:
        """Begin; apart from the start, so that a slow start of one does not let another run ahead."""
        self.command("load")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def peer() -> Iterator[Callable[..., Peer]]:
    """Starts peers and kills them after the test."""
    started: list[Peer] = []

    def start(*arguments: Any, **options: Any) -> Peer:
        started.append(Peer(*arguments, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture(scope="module")
def sha256(synthetic: ModuleType) -> str:
    """Of the whole checkpoint."""
    return hashlib.sha256(b"".join(synthetic.make(SIZES, chunk_bytes=MIB).data)).hexdigest()


Peers = Callable[..., Peer]


@pytest.mark.processes
def test_the_middle_forwards_while_it_receives(peer: Peers, sha256: str) -> None:
    a = peer("A", [])
    b = peer("B", [a])
    c = peer("C", [b, a])
    b.load()
    c.load()
    first_at_c = c.wait("segment")
    at_b, at_c = b.wait("complete"), c.wait("complete")
    assert at_b["sha256"] == at_c["sha256"] == sha256
    assert at_b["failures"] == at_c["failures"] == []
    assert first_at_c["at"] < at_b["at"], "C got its first segment only after B had everything"
    assert 0.1 * EGRESS < at_b["bytes_per_s"] < 1.3 * EGRESS


@pytest.mark.processes
@pytest.mark.parametrize(("how", "gap_s_max"), [(signal.SIGKILL, 2.0), (signal.SIGSTOP, 8.0)])
def test_the_last_one_survives_the_middle_one(
    peer: Peers, sha256: str, how: signal.Signals, gap_s_max: float
) -> None:
    a = peer("A", [])
    b = peer("B", [a], egress_bytes_per_s=EGRESS // 8)  # slow: it has far from done when it is hit
    c = peer("C", [b, a])
    b.load()
    c.load()
    before = c.wait("segment", segment=1)
    b.process.send_signal(how)
    after = c.wait("segment", segment=3)
    done = c.wait("complete")
    assert done["sha256"] == sha256
    assert any(failure.startswith("B: ") for failure in done["failures"])
    # Two segments need a quarter of a second; the rest is how long C believed in B. The deadline for silence is
    # 2.5 s in peer_process.py: a death is noticed without it.
    assert after["at"] - before["at"] < gap_s_max


@pytest.mark.processes
def test_what_rots_in_the_middle_does_not_travel_on(peer: Peers, sha256: str) -> None:
    a = peer("A", [])
    b = peer("B", [a])
    b.load()
    assert b.wait("complete")["sha256"] == sha256
    b.command("corrupt 3")
    b.wait("corrupted")
    c = peer("C", [b, a])
    c.load()
    done = c.wait("complete")
    assert done["sha256"] == sha256
    assert done["failures"] == ["B: 2 corrupt chunks, the last was 3/0"]
