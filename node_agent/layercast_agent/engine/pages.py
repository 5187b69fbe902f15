"""Which KV pages are whose, and which of them hold a prefix that others may share: bookkeeping without torch.

A page is held by the requests that use it. A full page whose KV is computed in all layers gets the key of its
content, and whoever has the same prefix may hold it too; only full pages are shared, so nobody ever writes to a page
that somebody else reads. A page that nobody holds is free; with a key it stays useful until its room is needed, least
recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

from layercast_agent.errors import NoCapacityError


class PageAllocator:
    """Pages 0 .. total-1. `used` of them are held by somebody."""

    def __init__(self, pages: int) -> None:
        if pages < 1:
            raise ValueError(f"a KV cache of {pages} pages")
        self.total = pages
        self.used = 0
        self._holders = [0] * pages
        self._taken = bytearray(
            pages
        )  # 1 where a page is held or cached: a run of zeros is a run of empty pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._unheld: OrderedDict[int, None] = (
            OrderedDict()
        )  # cached and held by nobody, least recently used first

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds, cached ones included."""
        return self.total - self.used

    @property
    def cached(self) -> int:
        """Pages with a key, held or not."""
        return len(self._page_of)

    def allocate(self, count: int, *, after: int | None = None) -> list[int]:
        """Takes pages, in one run where there is one, best behind page `after`. NoCapacityError when too few are free.

        Pages without a key go first; then those with one, least recently used first, and their content is forgotten.
        """
        if count < 1:
            raise ValueError(f"{count} pages asked for")
        if count > self.free_pages:
            raise NoCapacityError(f"{count} KV pages wanted, {self.free_pages} of {self.total} are free")
        while self.total - self.used - len(self._unheld) < count:
            self._forget(next(iter(self._unheld)))
        pages = self._find(count, after)
        for page in pages:
            self._taken[page] = 1
            self._holders[page] = 1
        self.used += count
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Lets go of pages. ValueError for a page that nobody holds: it would get two owners.

        The last page goes first in the order of reuse: without the pages before it, it is of no use to anybody.
        """
        for page in reversed(pages):
            if not (0 <= page < self.total and self._holders[page]):
                raise ValueError(f"page {page} is not in use")
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            self.used -= 1
            if page in self._key_of:
                self._unheld[page] = None
            else:
                self._taken[page] = 0

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest known beginning of `keys`."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def unheld(self, pages: Sequence[int]) -> int:
        """How many of these pages nobody holds: holding them takes as much room as allocating."""
        return sum(not self._holders[page] for page in pages)

    def hold(self, pages: Sequence[int]) -> None:
        """One holder more for each of these pages, which `find` returned."""
        for page in pages:
            if not self._holders[page]:
                del self._unheld[page]
                self.used += 1
            self._holders[page] += 1

    def remember(self, page: int, key: bytes) -> None:
        """The held page is full and computed in all layers; `key` names its content and everything before it.

        Where another page has that key already, this one stays private.
        """
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def _forget(self, page: int) -> None:
        del self._unheld[page]
        del self._page_of[self._key_of.pop(page)]
        self._taken[page] = 0

    def _find(self, count: int, after: int | None) -> list[int]:
        if after is not None and not any(self._taken[after + 1 : after + 1 + count]):
            pages = list(range(after + 1, min(after + 1 + count, self.total)))
            if len(pages) == count:
                return pages
        start = self._taken.find(bytes(count))
        if start >= 0:
            return list(range(start, start + count))
        return list(islice((page for page, taken in enumerate(self._taken) if not taken), count))
