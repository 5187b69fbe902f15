"""Which KV pages are free: bookkeeping without torch, so that scheduling can be tested by itself.

A request reserves at admission all pages that it can ever need, so a running request is never evicted, and its
pages usually form one run, which attention then reads in place instead of gathering.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from layercast_agent.errors import NoCapacityError


class PageAllocator:
    """Pages 0 .. total-1, each free or used by exactly one request."""

    def __init__(self, pages: int) -> None:
        if pages < 1:
            raise ValueError(f"a KV cache of {pages} pages")
        self.total = pages
        self.used = 0
        self._taken = bytearray(pages)

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds."""
        return self.total - self.used

    def allocate(self, count: int) -> list[int]:
        """Reserves pages, ascending, in one run where there is one. NoCapacityError when too few are free."""
        if count < 1:
            raise ValueError(f"{count} pages asked for")
        if count > self.free_pages:
            raise NoCapacityError(f"{count} KV pages wanted, {self.free_pages} of {self.total} are free")
        start = self._taken.find(bytes(count))
        if start >= 0:
            pages = list(range(start, start + count))
        else:
            pages = list(islice((page for page, taken in enumerate(self._taken) if not taken), count))
        for page in pages:
            self._taken[page] = 1
        self.used += count
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Gives pages back. ValueError for a page that is not in use: it would get two owners."""
        for page in pages:
            if not (0 <= page < self.total and self._taken[page]):
                raise ValueError(f"page {page} is not in use")
            self._taken[page] = 0
        self.used -= len(pages)
