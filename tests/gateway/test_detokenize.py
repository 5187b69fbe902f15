"""Text that leaves is final: exact, never a broken character, never a part of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from layercast_gateway.detokenize import REPLACEMENT, Detokenizer, StopMatcher
from layercast_gateway.tokenizer import ModelText

TEXTS = st.text(alphabet=st.sampled_from("ab é日本語🎉👩‍🚀\n"), max_size=24) | st.text(max_size=12)


@given(TEXTS.filter(lambda t: REPLACEMENT not in t))
def test_pieces_are_the_text_and_never_broken(text: ModelText, written: str) -> None:
    detokenizer = Detokenizer(text.decode)
    pieces = [detokenizer.feed(i) for i in text.encode(written)]
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) == written  # nothing is left for the end
    assert detokenizer.flush() == ""


@given(st.lists(st.integers(0, 337), max_size=40))
@settings(max_examples=300)
def test_any_tokens_become_exactly_their_text(text: ModelText, ids: list[int]) -> None:
    detokenizer = Detokenizer(text.decode)
    streamed = "".join([*(detokenizer.feed(i) for i in ids), detokenizer.flush()])
    assert streamed == text.decode(ids)


@given(TEXTS, TEXTS)
def test_continuing_a_prompt_gives_what_follows_it(text: ModelText, before: str, after: str) -> None:
    detokenizer = Detokenizer(text.decode, before=text.encode(before)[-8:])
    pieces = [detokenizer.feed(i) for i in text.encode(after)]
    assert "".join([*pieces, detokenizer.flush()]) == after


def test_text_before_an_unfinished_character_is_not_withheld(text: ModelText) -> None:
    ids = text.encode("日🎉🎉🎉")
    detokenizer = Detokenizer(text.decode)
    seen = ""
    for count, token_id in enumerate(ids, start=1):
        seen += detokenizer.feed(token_id)
        assert seen == text.decode(ids[:count]).rstrip(REPLACEMENT)


def sentencepiece() -> Tokenizer:
    """A decoder as Llama 2's: a leading space is dropped, unknown characters are spelt in bytes."""
    vocabulary = {"▁Hello": 0, "▁world": 1, "!": 2, **{f"<0x{b:02X}>": 3 + b for b in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def test_leading_spaces_and_byte_tokens() -> None:
    tokenizer = sentencepiece()
    ids = [0, 1, 2, *(3 + b for b in "é€".encode()), 1]
    whole = Detokenizer(tokenizer.decode)
    pieces = [whole.feed(i) for i in ids]
    assert "".join(pieces) == "Hello world!é€ world" == tokenizer.decode(ids)
    assert not any(REPLACEMENT in piece for piece in pieces)
    continued = Detokenizer(tokenizer.decode, before=[0])
    assert continued.feed(1) == " world"


def cut_at_once(text: str, stops: list[str]) -> str:
    """The text up to the stop string that is complete first."""
    found = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    return text[: min(found)[1]] if found else text


@given(
    st.text(alphabet="abc", max_size=20),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 4), max_size=20),
)
@settings(max_examples=500)
def test_stop_strings_over_any_piece_borders(text: str, stops: list[str], sizes: list[int]) -> None:
    matcher = StopMatcher(stops)
    out, rest, stopped = "", text, None
    for size in [*sizes, len(text)]:
        piece, rest = rest[:size], rest[size:]
        cut = matcher.feed(piece)
        out, stopped = out + cut.text, cut.stopped_by
        if stopped is not None:
            break
        assert text.startswith(out)
        assert not any(stop in out for stop in stops)
    out += matcher.flush() if stopped is None else ""
    assert out == cut_at_once(text, stops)
    assert (stopped is not None) == any(stop in text for stop in stops)


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        ([], ["a", "b"], ["a", "b"]),
        (["END"], ["xE", "N", "x"], ["x", "", "ENx"]),
        (["END"], ["xE", "ND", ""], ["x", ""]),
        (["aab"], ["aa", "aab"], ["", "aa"]),
    ],
)
def test_only_what_could_be_a_stop_string_is_withheld(
    stops: list[str], pieces: list[str], expected: list[str]
) -> None:
    matcher = StopMatcher(stops)
    cuts = [matcher.feed(piece) for piece in pieces]
    assert [cut.text for cut in cuts][: len(expected)] == expected
