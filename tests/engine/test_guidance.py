"""Guided answers: whatever a random model wants to say, what comes out is of the grammar, also after a replay."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers import Tokenizer

from layercast_agent.engine.engine import Engine, EngineLimits
from layercast_agent.engine.guidance import Guides, end_ids
from layercast_agent.engine.kv import KVCache
from layercast_agent.engine.sequence import FinishReason, Guide
from layercast_agent.errors import RequestError

END = 2
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bo"]}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    spec = importlib.util.spec_from_file_location(
        "tinymodels", Path(__file__).parent.parent / "tinymodels.py"
    )
    assert spec is not None and spec.loader is not None
    tinymodels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tinymodels)
    folder = tinymodels.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    generation = {"eos_token_id": [END]}
    return {
        "tokenizer.json": (folder / "tokenizer.json").read_bytes(),
        "generation_config.json": json.dumps(generation).encode(),
    }


@pytest.fixture(scope="module")
def model(families: ModuleType) -> Iterator[Any]:
    """A Llama whose logits are wider than the tokenizer's vocabulary, as padded ones are."""
    families.CONFIGS["wide"] = families.CONFIGS["llama"] | {"model_type": "llama", "vocab_size": 520}
    yield families.build("wide").model
    del families.CONFIGS["wide"]


@pytest.fixture
def engine(model: Any, files: dict[str, bytes], families: ModuleType) -> Engine:
    return Engine(
        model=model,
        kv=KVCache(model.shape, 64, page_size=4, device=families.CPU),
        limits=EngineLimits(batch_size_max=8, step_tokens_max=64, waiting_max=9, context_length_max=256),
        guides=Guides(files=files, vocab_size=520),
    )


def guided(families: ModuleType, kind: str, text: str, **values: Any) -> Any:
    sampling = {"temperature": 1.2, "seed": 4, "stop_token_ids": frozenset({END})} | values
    return families.sequence((5, 6, 7), 120, guide=Guide(kind=kind, text=text), **sampling)


def text_of(files: dict[str, bytes], tokens: list[int]) -> str:
    text: str = Tokenizer.from_buffer(files["tokenizer.json"]).decode(tokens)
    return text


@pytest.mark.parametrize("seed", range(4))
def test_json_of_a_schema(engine: Engine, files: dict[str, bytes], families: ModuleType, seed: int) -> None:
    engine.add(guided(families, "json_schema", json.dumps(SCHEMA), seed=seed))
    events = families.run(engine)
    answer = json.loads(text_of(files, families.tokens(events)))
    assert answer.keys() == {"name", "age"}
    assert answer["name"] in ("Ada", "Bo") and 0 <= answer["age"] <= 120
    assert events[-1].finish is FinishReason.STOP and events[-1].error == ""


def test_greedy_regex_grammar_and_choice(
    engine: Engine, files: dict[str, bytes], families: ModuleType
) -> None:
    asked = {
        "regex": ("[ab]{3}-[0-9]{2}", r"[ab]{3}-\d\d"),
        "grammar": ('start: "x" digit digit\ndigit: /[0-9]/', r"x\d\d"),
        "choice": ('["red", "green"]', "red|green"),
    }
    for index, (kind, (text, _)) in enumerate(asked.items()):
        seq = guided(families, kind, text, temperature=0.0)
        seq.request_id, seq.arrived_at = kind, index
        engine.add(seq)
    events = families.run(engine)
    for kind, (_, pattern) in asked.items():
        assert re.fullmatch(pattern, text_of(files, families.tokens(events, kind)))


def test_a_replay_goes_on_where_it_was(engine: Engine, families: ModuleType) -> None:
    def fresh(generated: list[int]) -> Any:
        seq = guided(families, "json_schema", json.dumps(SCHEMA))
        seq.generated = generated
        return seq

    whole = families.answer(engine, fresh([]))
    for have in range(len(whole)):
        assert families.answer(engine, fresh(whole[:have])) == whole[have:]
    # All tokens came, the end was lost: it is told again, nothing is computed.
    engine.add(fresh(list(whole)))
    (event,) = engine.step()
    assert (event.position, event.finish) == (len(whole) - 1, FinishReason.STOP)


def test_wrong_grammars_are_refused(engine: Engine, families: ModuleType) -> None:
    for kind, text, words in (
        ("regex", "(ab", "regex"),
        ("json_schema", '{"type": "nope"}', "nope"),
        ("grammar", "start: missing", "missing"),
        ("choice", "[", "choice"),
    ):
        with pytest.raises(RequestError, match=words):
            engine.add(guided(families, kind, text))
    assert engine.waiting == ()


def test_a_model_without_tokenizer_is_not_guided(families: ModuleType, llama: Any) -> None:
    with pytest.raises(RequestError, match=r"tokenizer\.json"):
        Guides(files={}, vocab_size=9).check(Guide(kind="regex", text="a"))
    with pytest.raises(RequestError, match="cannot be guided"):
        llama.engine().add(guided(families, "regex", "a"))
    assert end_ids({}) == []
    assert end_ids({"config.json": b'{"eos_token_id": 7}'}) == [7]
