"""Names for the content of KV pages: equal names mean equal tokens from the first to the page's last. Pure.

The key of a page covers the model, the key of the page before it and the page's own tokens, so one look-up a page
finds the longest known prefix. Keys are 16 bytes of BLAKE2b: nobody can make two prefixes collide to read another
request's context.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

from layercast_agent.engine.sequence import Sequence

KEY_BYTES = 16


class PrefixKeys:
    """Computes page keys; those of a sequence are kept with it, because its tokens never change."""

    def __init__(self, *, page_size: int, model: str) -> None:
        self._page_size = page_size
        self._root = blake2b(f"{page_size} {model}".encode(), digest_size=KEY_BYTES).digest()

    def of(self, seq: Sequence, pages: int) -> list[bytes]:
        """Keys of the first `pages` pages of a sequence, whose tokens must all be known."""
        keys = seq.page_keys
        while len(keys) < pages:
            start = len(keys) * self._page_size
            tokens = array("I", seq.tokens(start, start + self._page_size))
            before = keys[-1] if keys else self._root
            keys.append(blake2b(before + tokens.tobytes(), digest_size=KEY_BYTES).digest())
        return keys[:pages]
