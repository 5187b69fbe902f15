"""Which tokens a grammar allows next: the one door to llguidance, which knows JSON schemas, regexes and grammars.

A guide's state follows from the grammar and the tokens generated so far, so a replay or a handoff recomputes it and
nothing about it has to travel. Grammars are checked when a request is admitted; a request whose grammar is wrong is
refused with the library's words.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from layercast_agent.engine.sequence import Guide
from layercast_agent.errors import RequestError

if TYPE_CHECKING:
    import llguidance

Allowed = npt.NDArray[np.bool_]


class GuideState:
    """Where one request stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def error(self) -> str:
        """What the grammar cannot go on with; empty while all is well."""
        return str(self._matcher.get_error()) if self._matcher.is_error() else ""

    @property
    def finished(self) -> bool:
        """The text is complete: nothing may follow."""
        return bool(self._matcher.is_stopped()) and not self.error

    def allowed(self) -> Allowed:
        """For each token id whether it may come next: [vocabulary]. The end of sequence where the text may end."""
        if self.error:
            return np.ones(self._vocab_size, dtype=np.bool_)  # the token's event carries the error
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        known = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(np.bool_)
        return np.pad(known, (0, self._vocab_size - len(known)))

    def accept(self, token_ids: Sequence[int]) -> None:
        """The request has these tokens next."""
        self._matcher.consume_tokens(list(token_ids))


class Guides:
    """Guides of one model, whose tokenizer is read when the first request wants one. Usable from any thread."""

    def __init__(self, *, files: Mapping[str, bytes], vocab_size: int) -> None:
        """`files` are the checkpoint's small files; `vocab_size` is the width of its logits."""
        self._files = files
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._tokenizer: llguidance.LLTokenizer | None = None

    def check(self, guide: Guide) -> None:
        """Raises RequestError saying what is wrong with a grammar, or that this model cannot be guided."""
        import llguidance

        problem = llguidance.LLMatcher.validate_grammar(_grammar(guide), self._read())
        if problem:
            raise RequestError(f"the {guide.kind} cannot be used: {problem.strip()}")

    def start(self, guide: Guide, generated: Sequence[int]) -> GuideState:
        """The state after these tokens, for a guide that was checked."""
        import llguidance

        matcher = llguidance.LLMatcher(self._read(), _grammar(guide), log_level=0)
        state = GuideState(matcher, self._vocab_size)
        state.accept(generated)
        return state

    def _read(self) -> llguidance.LLTokenizer:
        import llguidance

        with self._lock:
            if self._tokenizer is None:
                if "tokenizer.json" not in self._files:
                    raise RequestError("this model has no tokenizer.json, so its answers cannot be guided")
                self._tokenizer = llguidance.LLTokenizer(
                    self._files["tokenizer.json"].decode(),
                    n_vocab=self._vocab_size,
                    eos_token=end_ids(self._files) or None,
                )
            return self._tokenizer


def end_ids(files: Mapping[str, bytes]) -> list[int]:
    """The tokens that end a text, by the checkpoint's own files; the first file that names some decides."""
    for name in ("generation_config.json", "config.json"):
        config: Any = json.loads(files.get(name, b"{}"))
        ids = config.get("eos_token_id")
        found = [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
        if found:
            return found
    return []


def _grammar(guide: Guide) -> str:
    import llguidance

    try:
        return str(llguidance.grammar_from(cast(Any, guide.kind), guide.text))
    except ValueError as error:
        raise RequestError(f"the {guide.kind} cannot be used: {error}") from error
