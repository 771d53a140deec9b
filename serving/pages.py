"""Who has which part of the latent cache: pages of a fixed number of slots, handed out one at a time.

A sequence's pages need not lie together, so memory is lost only in the last page of each sequence.
"""

from __future__ import annotations


class PagePool:
    """Pages 0 … total−1; page p is the slots [p·size, (p + 1)·size)."""

    def __init__(self, total: int, size: int) -> None:
        if total < 1 or size < 1:
            raise ValueError(f"a cache of {total} pages of {size} tokens holds nothing")
        self.total, self.size = total, size
        self._free = list(range(total - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - self.free

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def take(self, count: int) -> list[int]:
        """So many pages. Raises ValueError if there are not enough: ask `free` first."""
        if count > self.free:
            raise ValueError(f"{count} pages were asked for, {self.free} of {self.total} are free")
        return [self._free.pop() for _ in range(count)]

    def give(self, pages: list[int]) -> None:
        """Take pages back."""
        self._free += reversed(pages)
