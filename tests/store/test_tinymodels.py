"""The tiny models are real to everybody else: transformers loads, runs and tokenises with them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_agrees(tinymodels: ModuleType, tmp_path: Path, family: str) -> None:
    folder = tinymodels.make(tmp_path / family, family)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == CLASSES[family]
    assert not any(info.values()), info
    assert model.dtype is torch.float32
    assert model.config.num_hidden_layers == 4
    prompt = torch.arange(40, 60)[None]
    answer = model.generate(prompt, do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=0)
    # A model that repeats itself would hide errors of the engine.
    assert len(set(answer[0, 20:].tolist())) >= 4


def test_equal_arguments_give_equal_bytes(tinymodels: ModuleType, tmp_path: Path) -> None:
    one, two = (tinymodels.make(tmp_path / name, "qwen2", seed=3, shards=2) for name in ("one", "two"))
    other = tinymodels.make(tmp_path / "other", "qwen2", seed=4, shards=2)
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    shard = "model-00001-of-00002.safetensors"
    assert (one / shard).read_bytes() != (other / shard).read_bytes()


def test_the_tokenizer_is_real(tinymodels: ModuleType, tmp_path: Path) -> None:
    folder = tinymodels.make(tmp_path / "m", "llama", layers=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == tinymodels.VOCAB
    for text in ("The capital of France is Paris.", "naïve 日本 🙂\n\t 12", "<|im_start|>user"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("The capital of France").input_ids) < len("The capital of France") // 2
    assert tokenizer.eos_token_id == tinymodels.IM_END
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
