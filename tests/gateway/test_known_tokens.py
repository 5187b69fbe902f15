"""Tokens whose text is known beforehand give the same pieces as tokens that are decoded among their neighbours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercast_gateway.detokenize import Detokenizer
from layercast_gateway.tokenizer import ModelText

SMOLLM = Path.home() / ".cache/layercast/models/SmolLM2-135M-Instruct"


def pieces(text: ModelText, ids: list[int], *, before: list[int], known: bool) -> list[str]:
    alone = text.decode_alone if known else None
    detokenizer = Detokenizer(text.decode, before=before, alone=alone)
    return [*(detokenizer.feed(token_id) for token_id in ids), detokenizer.flush()]


def same(text: ModelText, before: list[int], ids: list[int]) -> None:
    plain = pieces(text, ids, before=before, known=False)
    assert pieces(text, ids, before=before, known=True) == plain
    # The bytes of a prompt do not change what follows it, so a choice leaves them out.
    assert pieces(text, ids, before=[], known=True) == plain


@given(st.lists(st.integers(0, 345), max_size=8), st.lists(st.integers(0, 345), max_size=40))
@settings(max_examples=500)
def test_any_tokens(text: ModelText, before: list[int], ids: list[int]) -> None:
    assert text.joins_bytes
    same(text, before, ids)
    assert "".join(pieces(text, ids, before=[], known=True)) == text.decode(ids)


@pytest.fixture(scope="session")
def smollm() -> ModelText:
    if not (SMOLLM / "tokenizer.json").exists():
        pytest.skip(f"{SMOLLM} is not there: run make demo once")
    return ModelText({"tokenizer.json": (SMOLLM / "tokenizer.json").read_bytes()})


@given(st.data())
@settings(max_examples=200)
def test_any_tokens_of_a_real_model(smollm: ModelText, data: st.DataObject) -> None:
    ids = st.lists(st.integers(0, smollm.vocabulary_size + 5), max_size=30)
    bytes_apart = st.lists(st.sampled_from(smollm.encode("日本語🎉é �x")), max_size=20)
    same(smollm, data.draw(ids | bytes_apart), data.draw(ids | bytes_apart))


def test_decoders_that_look_at_neighbours_know_no_token(files: dict[str, bytes]) -> None:
    file = json.loads(files["tokenizer.json"])
    file["decoder"] = {"type": "Sequence", "decoders": [file["decoder"], {"type": "Fuse"}]}
    text = ModelText({**files, "tokenizer.json": json.dumps(file).encode()})
    assert not text.joins_bytes
    assert {text.decode_alone(token_id) for token_id in range(300)} == {None}
    assert text.token_bytes(text.encode("é")[0])  # its alphabet is that of bytes all the same
