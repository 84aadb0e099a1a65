"""The decoder's KV cache: pages of a fixed number of tokens, and a page table for each request.

Keys and values of all layers lie in two arrays, [layers][pages][key heads][...] (see
`kernels/cpu/attention.h`). A request's rows of one step are written behind its length; those that are
accepted move to where the text wants them, the others are overwritten by the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .kernels import structures

FIRST_PAGES = 64
"""Pages that a pool begins with; it doubles when they are used up."""


class PagePool:
    """The pages of one engine's requests."""

    def __init__(self, layers: int, key_heads: int, head_size: int, wide: int, page: int) -> None:
        """wide: bytes of a value, 2 (bfloat16) or 4 (float32). page: tokens of a page."""
        self.page = page
        self.wide = wide
        self.key_heads, self.head_size = key_heads, head_size
        self._shape = (layers, key_heads * page * head_size * wide)
        self.keys = self._empty(0)
        self.values = self._empty(0)
        self._free: list[int] = []

    def open(self) -> PagedCache:
        return PagedCache(self)

    def take(self) -> int:
        """A page that nobody uses."""
        if not self._free:
            self._grow()
        return self._free.pop()

    def give_back(self, pages: Sequence[int]) -> None:
        self._free.extend(reversed(pages))

    @property
    def memory(self) -> structures.Memory:
        """The addresses, for the kernels. They hold until a page is taken."""
        return structures.Memory(
            self.keys.ctypes.data, self.values.ctypes.data, self.keys.shape[1] * self._shape[1]
        )

    def _grow(self) -> None:
        """Twice the pages. The system gives memory to those that are written only."""
        had = self.keys.shape[1]
        more = max(FIRST_PAGES, 2 * had)
        keys, values = self._empty(more), self._empty(more)
        keys[:, :had], values[:, :had] = self.keys, self.values
        free = list(range(more - 1, had - 1, -1))
        self.keys, self.values, self._free = keys, values, free  # together, whatever interrupts

    def _empty(self, pages: int) -> NDArray[np.uint8]:
        return np.zeros((self._shape[0], pages, self._shape[1]), np.uint8)


class PagedCache:
    """Keys and values of one request. Root rule: between steps length == len(tokens) - 1."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.pages: list[int] = []
        self.length = 0

    def reserve(self, length: int) -> None:
        """Have pages for so many tokens."""
        while len(self.pages) * self.pool.page < length:
            self.pages.append(self.pool.take())

    def keep(self, path: Sequence[int], in_flight: Sequence[int]) -> None:
        assert not in_flight, "the decoder finishes every row in one forward"
        for i, row in enumerate(path):
            if i != row:
                self._move(self.length + row, self.length + i)
        self.length += len(path)

    def cut(self, length: int) -> None:
        self.length = length
        needed = -(-length // self.pool.page)
        unused = self.pages[needed:]
        del self.pages[needed:]  # first: an interrupt may lose a page, but never give it to two requests
        self.pool.give_back(unused)

    def copy(self, source: Self, length: int) -> None:
        self.reserve(length)
        others = source.pages[: len(self.pages)]
        for array in (self.pool.keys, self.pool.values):
            array[:, self.pages] = array[:, others]
        self.length = length

    def close(self) -> None:
        self.cut(0)

    def _move(self, old: int, new: int) -> None:
        """Copy the key and value at one slot to another."""
        pool = self.pool
        (from_page, from_lane), (to_page, to_lane) = (divmod(slot, pool.page) for slot in (old, new))
        layers, dtype = len(pool.keys), np.uint16 if pool.wide == 2 else np.float32
        keys = pool.keys.view(dtype).reshape(layers, -1, pool.key_heads, pool.head_size, pool.page)
        keys[:, self.pages[to_page], :, :, to_lane] = keys[:, self.pages[from_page], :, :, from_lane]
        values = pool.values.view(dtype).reshape(layers, -1, pool.key_heads, pool.page, pool.head_size)
        values[:, self.pages[to_page], :, to_lane] = values[:, self.pages[from_page], :, from_lane]
