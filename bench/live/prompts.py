"""Prompts of known lengths: an arrival's tokens are those of its text, and the chat template adds the same to each.

There are few different prompts of each length: each has one right answer, made by one replica at rest, with which
every later answer is compared.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from layercast_cli.prompts import PROMPTS

VARIANTS = 6
"""Different prompts of one length."""

STEP = 1.5
"""Lengths are rounded to powers of this."""


class PromptBook:
    """Texts by length class; made from one seed, equal in every run."""

    def __init__(self, model_dir: Path, lengths: Sequence[int], *, seed: int = 7) -> None:
        """`lengths` are all token counts that will be asked for."""
        tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        words = " ".join(PROMPTS).split()
        chance = random.Random(seed)
        self._place: dict[tuple[int, int], int] = {}
        self.texts: list[str] = []
        self.tokens: list[int] = []
        """Of each text."""
        for size in sorted({length_class(each) for each in lengths}):
            for variant in range(VARIANTS):
                self._place[size, variant] = len(self.texts)
                self.texts.append(_text(tokenizer, chance.sample(words, len(words)), size))
                self.tokens.append(len(tokenizer.encode(self.texts[-1], add_special_tokens=False).ids))

    def pick(self, prompt_tokens: int, turn: int) -> int:
        """Index of the text for the `turn`-th request of that length."""
        return self._place[length_class(prompt_tokens), turn % VARIANTS]


def length_class(tokens: int) -> int:
    """The next power of `STEP` below, so that a trace needs few reference answers."""
    size = 8.0
    while round(size * STEP) <= tokens:
        size *= STEP
    return round(size)


def _text(tokenizer: Tokenizer, words: Sequence[str], tokens: int) -> str:
    """As many of the words, again and again, as make that many tokens."""
    text, used = "", 0
    while len(tokenizer.encode(text, add_special_tokens=False).ids) < tokens:
        text = f"{text} {words[used % len(words)]}".strip()
        used += 1
    return text
