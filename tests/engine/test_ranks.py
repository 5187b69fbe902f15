"""Two ranks over gloo, in two processes, produce the tokens of transformers; handoffs pass between them and one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from layercast_agent.engine.engine import Engine, EngineLimits
from layercast_agent.engine.ranks import Leader

COUNT = 8
FAMILIES = ("llama", "llama-tied-biased", "qwen3", "mistral")
END_DEADLINE_S = 30

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(300),
    # torch's own: gloo's defaults, and a store that is closed when its process group is.
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
]


@pytest.fixture(scope="module")
def rank() -> ModuleType:
    """tests/engine/rank.py."""
    path = Path(__file__).with_name("rank.py")
    spec = importlib.util.spec_from_file_location("layercast_test_engine_rank", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def follower(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Rank 1, which follows in a process of its own."""
    for name in FAMILIES:
        (tmp_path / name).mkdir()
    command = [sys.executable, str(Path(__file__).with_name("rank.py")), str(tmp_path), "1", "2", *FAMILIES]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_two_ranks(
    follower: subprocess.Popen[str],
    rank: ModuleType,
    families: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    for name in FAMILIES:
        tiny = families.build(name, "fast")
        ranks = rank.join(tiny, tmp_path / name, 0, 2)
        model, kv = rank.rank_model(tiny, families, ranks)
        leader = Leader(model, ranks)
        limits = EngineLimits(batch_size_max=8, step_tokens_max=17, waiting_max=32, context_length_max=128)
        engine = Engine(model=leader, kv=kv, limits=limits)
        _batch_in_chunks(engine, tiny, families)
        _handoff(engine, tiny.engine(), tiny, families)
        _handoff(tiny.engine(), engine, tiny, families)
        _move(engine, tiny.engine(), tiny, families)
        _move(tiny.engine(), engine, tiny, families)
        leader.end()
        ranks.leave()
    _, errors = follower.communicate(timeout=END_DEADLINE_S)
    assert follower.returncode == 0, errors


def _batch_in_chunks(engine: Engine, tiny: Any, families: ModuleType) -> None:
    prompts = families.prompts((30, 3, 13, 7))
    for index, prompt in enumerate(prompts):
        engine.add(families.sequence(prompt, COUNT, name=f"r{index}", arrived_at=index))
    events = families.run(engine)
    for index, prompt in enumerate(prompts):
        assert families.tokens(events, f"r{index}") == tiny.expected(prompt, COUNT), tiny.config


def _handoff(giver: Engine, taker: Engine, tiny: Any, families: ModuleType) -> None:
    """A request with two layers done: the KV heads of both ranks go along."""
    prompt = families.prompts([19], seed=5)[0]
    given, taken = families.sequence(prompt, COUNT), families.sequence(prompt, COUNT)
    giver.add(given)
    for _ in range(2):
        giver.run_layer(given)
    state = bytes(giver.export_state(given).numpy())
    giver.release(given)
    taker.add(taken)
    taker.import_state(taken, 2, state)
    assert families.tokens(families.run(taker)) == tiny.expected(prompt, COUNT), tiny.config


def _move(giver: Engine, taker: Engine, tiny: Any, families: ModuleType) -> None:
    """A request that runs: its KV goes in two pieces, under a session, and with the heads of both ranks."""
    prompt, layers = families.prompts([19], seed=6)[0], tiny.model.shape.layers
    given = families.sequence(prompt, COUNT)
    giver.add(given)
    while len(given.generated) < 3:
        giver.step()
    for start, stop in ((0, 10), (10, given.computed)):
        kv = giver.moves.rows(given.request_id, first=0, last=layers, start=start, stop=stop)
        taker.stages.write("s", kv, first=0, last=layers, start=start, positions_max=len(prompt) + COUNT)
    taken = families.sequence(prompt, COUNT, generated=given.generated)
    giver.release(given)
    assert taker.moves.settle(taken, "s") == len(prompt) + 2
    families.run(taker)
    assert taken.generated == tiny.expected(prompt, COUNT), tiny.config
