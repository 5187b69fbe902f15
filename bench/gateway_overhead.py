"""What gateway and worker loop add to a request: pairs of one through them and one in the bare engine.

One real replica of SmolLM2 and the bare engine in another process get the same prompts in turns, one at a time.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from layercast_cli.local import LocalCluster
from layercast_cli.modelfile import document_of
from layercast_cli.programs import ClusterSettings

ROOT = Path(__file__).resolve().parent.parent
READY_DEADLINE_S = 60.0
SERVED = "overhead"
PROMPT_TOKENS = 16
PROMPT = "Water boils at a hundred degrees, and the capital of France is"


class BenchError(Exception):
    """A measurement that is none: a process died, or an answer was wrong."""


def service(model_dir: Path) -> dict[str, Any]:
    """One fixed replica."""
    spec = {
        "model": {"source": f"file://{model_dir}", "revision": "", "dtype": "bfloat16"},
        "replicas": 1,
        "serving": {"contextLength": 512, "batchSize": 8},
    }
    return document_of(SERVED, spec)


def prompts(model_dir: Path, count: int) -> list[tuple[str, list[int]]]:
    """Different texts of equally many tokens: no prefix is known from an earlier one."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    found = []
    for number in range(count):
        ids = tokenizer.encode(f"Number {number:05d}: {PROMPT} {number}", add_special_tokens=False).ids
        text = tokenizer.decode(ids[:PROMPT_TOKENS], skip_special_tokens=False)
        found.append((text, tokenizer.encode(text, add_special_tokens=False).ids))
    return found


def overhead(model_dir: Path, *, pairs: int, new: int) -> list[tuple[float, float]]:
    """(seconds through the gateway, seconds in the bare engine) of each pair, the first ones left out."""
    cluster = LocalCluster(
        ClusterSettings(
            state_dir=Path(tempfile.gettempdir()) / f"layercast-bench-{os.getpid()}",
            services=(service(model_dir),),
            cpu_share=1.0,
            fresh=True,
        )
    )
    settings = {
        "engine": "ours",
        "model": str(model_dir),
        "dtype": "bfloat16",
        "block": "auto",
        "threads": len(os.sched_getaffinity(0)),
        "clock": "wall",
        "context": 512,
        "step_tokens": 512,
    }
    warm = 5
    with cluster, tempfile.TemporaryDirectory() as folder:
        cluster.wait_ready(SERVED, deadline_s=READY_DEADLINE_S)
        ask = _asking(f"{cluster.gateway_url}/v1/completions", new)
        command = [sys.executable, "-m", "bench.engine_peers", json.dumps(settings)]
        with (Path(folder) / "log").open("w") as log:
            engine = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "OMP_WAIT_POLICY": "passive"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        with engine:
            bare = _bare(engine, new)
            taken = []
            for number, (text, ids) in enumerate(prompts(model_dir, pairs + warm)):
                ways = (functools.partial(ask, text), functools.partial(bare, ids))
                order = (0, 1) if number % 2 else (1, 0)
                seconds = {way: ways[way]() for way in order}
                taken.append((seconds[0], seconds[1]))
            assert engine.stdin is not None
            engine.stdin.close()
    return taken[warm:]


def _asking(url: str, new: int) -> Callable[[str], float]:
    def ask(text: str) -> float:
        body = {"model": SERVED, "prompt": text, "max_tokens": new, "min_tokens": new, "temperature": 0}
        request = urllib.request.Request(
            url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        began = time.perf_counter()
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        elapsed = time.perf_counter() - began
        if answer["usage"]["completion_tokens"] != new:
            raise BenchError(f"asked for {new} tokens, got {answer['usage']}")
        return elapsed

    return ask


def _bare(engine: subprocess.Popen[str], new: int) -> Callable[[list[int]], float]:
    assert engine.stdin is not None and engine.stdout is not None
    into, out = engine.stdin, engine.stdout
    if "ready" not in out.readline():
        raise BenchError(f"the bare engine ended with {engine.wait()}")

    def bare(ids: list[int]) -> float:
        into.write(json.dumps({"run": "ours", "prompts": [ids], "new": new}) + "\n")
        into.flush()
        return float(json.loads(out.readline())["seconds"])

    return bare
