"""The text side of a checkpoint: templates, end tokens, bytes of tokens, and files that are broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layercast_gateway.errors import ClientError, ServiceError
from layercast_gateway.tokenizer import ModelText

SMOLLM = Path.home() / ".cache/layercast/models/SmolLM2-135M-Instruct"
USER = [{"role": "user", "content": "Hi"}]


def with_template(files: dict[str, bytes], template: object) -> ModelText:
    rest = {name: data for name, data in files.items() if name != "chat_template.jinja"}
    config = {"eos_token": "<|im_end|>", "bos_token": "<s>", "chat_template": template}
    return ModelText({**rest, "tokenizer_config.json": json.dumps(config).encode()})


def test_template_of_a_file(text: ModelText) -> None:
    assert text.render(USER) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    special = text.encode_chat(USER)[0]
    assert text.token_bytes(special) == b"<|im_start|>"


def test_template_of_the_configuration(files: dict[str, bytes]) -> None:
    assert with_template(files, "{{ bos_token }}{{ messages[0].content }}").render(USER) == "<s>Hi"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    assert with_template(files, named).render(USER) == "y"
    with pytest.raises(ClientError, match="no chat template"):
        with_template(files, None).render(USER)


def test_template_language(files: dict[str, bytes]) -> None:
    template = (
        "{%- for m in messages %}\n  {%- if loop.index > 1 %}{% break %}{% endif %}\n"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    rendered = with_template(files, template).render([{"role": "user", "content": "<é>"}, *USER])
    assert rendered.strip() == '{"role": "user", "content": "<é>"}4'


def test_template_that_refuses_is_the_clients_fault(text: ModelText) -> None:
    with pytest.raises(ClientError, match="a user speaks first"):
        text.render([{"role": "assistant", "content": "x"}])


def test_template_runs_in_a_sandbox(files: dict[str, bytes]) -> None:
    escape = with_template(files, "{{ messages.__class__.__mro__ }}")
    with pytest.raises(ServiceError, match="fails for these messages"):
        escape.render(USER)


def test_end_tokens_of_all_files(files: dict[str, bytes], text: ModelText) -> None:
    end = text.encode("<|im_end|>")
    assert text.stop_token_ids == end
    more = {
        **files,
        "generation_config.json": b'{"eos_token_id": [7, 9]}',
        "config.json": b'{"eos_token_id": 3, "text_config": {"eos_token_id": 4}, "max_position_embeddings": 99}',
    }
    assert ModelText(more).stop_token_ids == (3, 4, 7, 9, *end)
    assert ModelText(more).context_length_max == 99


def test_bytes_of_tokens_join_to_the_text(text: ModelText) -> None:
    written = "naïve 日本語 🎉 x"
    assert b"".join(text.token_bytes(i) for i in text.encode(written)).decode() == written
    assert text.token_bytes(10**6) == b""


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer.json", b"{}", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not JSON"),
        ("chat_template.jinja", b"{% if %}", "chat template cannot be read"),
    ],
)
def test_broken_files_are_named(files: dict[str, bytes], name: str, content: bytes, problem: str) -> None:
    with pytest.raises(ServiceError, match=problem):
        ModelText({**files, name: content})
    with pytest.raises(ServiceError, match=r"has no tokenizer\.json"):
        ModelText({})


@pytest.mark.skipif(
    not (SMOLLM / "tokenizer.json").exists(), reason=f"{SMOLLM} is not there: run make demo once"
)
def test_a_real_models_template_and_tokens() -> None:
    text = ModelText(
        {file.name: file.read_bytes() for file in SMOLLM.iterdir() if file.stat().st_size < 1 << 24}
    )
    rendered = text.render(USER)
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert text.decode(text.encode("naïve 日本語 🎉")) == "naïve 日本語 🎉"
    assert text.stop_token_ids
