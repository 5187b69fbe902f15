"""Tokens to text while they arrive, and text held back while it could be the start of a stop string.

Pure but for the `decode` that is passed in. What leaves here is final: it is never taken back, and joined together
it is exactly the text of all tokens up to the first stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

REPLACEMENT = "\ufffd"

Decode = Callable[[Sequence[int]], str]
"""Token ids to text; bytes that are no UTF-8 (yet) become U+FFFD."""

Alone = Callable[[int], str | None]
"""The text of a token that is the same whatever stands before it, as long as that ends with a whole character; None
when there is no such text."""


class Detokenizer:
    """Turns one token after another into text, by decoding a short window of the last ones.

    A token's text depends on its neighbours: a character's bytes may lie in several tokens, and some tokenizers
    write a word's leading space only when something stands before it. So the window starts at a character border,
    is decoded whole, and only what lies behind the part that was already given out is new. U+FFFD at its end is
    withheld: a later token may complete it, and `flush` gives out what never was.

    Most tokens of byte-level tokenizers are whole characters and need no neighbours: their text is known beforehand.
    """

    def __init__(self, decode: Decode, *, before: Sequence[int] = (), alone: Alone | None = None) -> None:
        """`before` are the last tokens of a prompt that the text continues; they are context, not output.

        Without `alone` every token is decoded among its neighbours.
        """
        self._decode = decode
        self._alone = alone
        # A prompt may end within a character; its half must not be completed by the output's first token.
        context = list(before) if before and not decode(before).endswith(REPLACEMENT) else []
        self._window = context
        self._border = len(context)
        self._given = len(decode(context)) if context else 0

    def feed(self, token_id: int) -> str:
        """The text that this token makes certain; often empty, sometimes more than its own."""
        at_border = self._border == len(self._window)
        if at_border and self._alone is not None and (known := self._alone(token_id)) is not None:
            # A text that depends on no neighbour is no neighbour for others either.
            if self._window:
                self._window, self._border, self._given = [], 0, 0
            return known
        self._window.append(token_id)
        text = self._decode(self._window)
        certain = text.rstrip(REPLACEMENT)
        new = certain[self._given :]
        self._given = max(self._given, len(certain))
        # Tokens without text (special ones) cannot be what the next token's leading space is decided by.
        if new and len(certain) == len(text):
            self._shift()
        return new

    def flush(self) -> str:
        """What was withheld; there is no further token."""
        new = self._decode(self._window)[self._given :]
        self._given += len(new)
        return new

    def _shift(self) -> None:
        """The window ends at a character border: the tokens before the previous border are not needed any more."""
        self._window = self._window[self._border :]
        self._border = len(self._window)
        self._given = len(self._decode(self._window))


@dataclass(frozen=True, slots=True)
class Cut:
    """`text` may be given out; `stopped_by` is the stop string that ended it, not part of the text."""

    text: str
    stopped_by: str | None = None


class StopMatcher:
    """Ends a text before the first stop string, whichever way the text is split into pieces.

    Of several stop strings the one that is complete first ends the text (the earlier start wins a tie): that, unlike
    the one that starts first, does not depend on text which has not come yet.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def feed(self, piece: str) -> Cut:
        """What of the held text and this piece is certain to stand before any stop string."""
        text = self._held + piece
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, stop = min(found)
            self._held = ""
            return Cut(text[:start], stopped_by=stop)
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return Cut(text[: len(text) - keep])

    def flush(self) -> str:
        """The held text; nothing follows that could complete a stop string."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max((len(stop) - 1 for stop in self._stops), default=0))
        for length in range(longest, 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
