"""A chain of three processes over one-sided reads, in an environment that the caller made (`UCX_TLS`, ...).

Not a test of pytest's: `make test-rdma` runs it inside a virtual machine with RDMA verbs (soft-RoCE), where emulation
makes everything slow. Ends with 0 when both targets hold the source's 16 MiB, all of which came one-sidedly.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MIB = 1024 * 1024
SIZES = [2 * MIB] * 8
PEER = Path(__file__).parent.parent / "transfer" / "peer_process.py"


class Peer:
    """One process of the chain."""

    def __init__(self, name: str, upstreams: list[dict[str, str]]) -> None:
        settings = {
            "sizes": SIZES,
            "chunk_bytes": MIB,
            "egress_bytes_per_s": 0,
            "upstreams": upstreams,
            "nixl": True,
            # Emulated processors: what takes milliseconds elsewhere takes seconds.
            "limits": {"progress_deadline_s": 60.0, "open_deadline_s": 60.0, "stall_s": 60.0},
        }
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, str(PEER), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        ready = self.hear("ready")
        self.spec = {"peer_id": name, "address": ready["address"], "data_address": ready["data_address"]}

    def hear(self, event: str) -> dict[str, Any]:
        """The next such event; SystemExit when the process failed or ended before."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if not line.startswith("{"):
                print(f"{self.name}: {line}", end="")
                continue
            said: dict[str, Any] = json.loads(line)
            if said["event"] == event:
                return said
            if said["event"] == "failed":
                sys.exit(f"{self.name} failed: {said}")
        sys.exit(f"{self.name} ended before it said {event!r}")

    def load(self) -> None:
        """Begin the transfer."""
        assert self.process.stdin is not None
        self.process.stdin.write("load\n")
        self.process.stdin.flush()


def main() -> int:
    """0 when all bytes are right and came one-sidedly."""
    a = Peer("A", [])
    b = Peer("B", [a.spec])
    c = Peer("C", [b.spec, a.spec])
    b.load()
    c.load()
    ends = {peer.name: peer.hear("complete") for peer in (b, c)}
    for peer in (a, b, c):
        peer.process.kill()
    digests = {end["sha256"] for end in ends.values()}
    one_sided = {name: end["one_sided_bytes"] for name, end in ends.items()}
    print(
        json.dumps(
            {"bytes": sum(SIZES), "one_sided_bytes": one_sided, "sha256": sorted(digests), "ends": ends}
        )
    )
    sys.path.insert(0, str(PEER.parent))
    synthetic = importlib.import_module("synthetic")  # the file beside PEER, which is no package's member
    wanted = hashlib.sha256(b"".join(synthetic.make(SIZES, chunk_bytes=MIB).data)).hexdigest()
    good = digests == {wanted} and set(one_sided.values()) == {sum(SIZES)}
    transports = os.environ.get("UCX_TLS", "any transport")
    print(f"rdma chain over {transports}: {'ok' if good else 'WRONG'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
