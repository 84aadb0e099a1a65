"""The decoder's KV cache: pages of a fixed number of tokens, and a page table for each request.

Keys and values of all layers lie in two arrays, [layers][pages][key heads][...] (see
`kernels/cpu/attention.h`). A request's rows of one step are written behind its length; those that are
accepted move to where the text wants them, the others are overwritten by the next step.

Prefix cache: a page that holds a full page of somebody's text is remembered by that text, from its first
token on, and shared by every later cache whose text begins alike. It is never written again. What nobody uses
stays until its memory is needed, the least recently used first. The keys of the table are the tokens
themselves, so no two texts are ever taken for one another, and texts of different salts never meet. Since the
bits of keys and values depend on the text alone, a shared page is what a fresh one would be.
"""

from __future__ import annotations

import copy
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from .._common.machine import available_memory
from ..errors import InvalidOption
from .kernels import structures

DEFAULT_MEMORY = 1 << 30
Beginning = int | str
"""What stands before a page: the serial number of the page before it, or the salt of the text."""


@dataclass(eq=False, slots=True)
class Prefix:
    """A page that is remembered by its text."""

    key: tuple[Beginning, tuple[int, ...]]
    serial: int
    """Its name in the keys of the pages behind it. It is never given twice."""
    page: int


class PagePool:
    """The pages of one engine's requests."""

    def __init__(
        self, layers: int, key_heads: int, head_size: int, wide: int, page: int, capacity: int
    ) -> None:
        """wide: bytes of a value, 2 (bfloat16) or 4 (float32). page: tokens of a page. capacity: pages."""
        self.page, self.capacity = page, capacity
        self.wide = wide
        self.key_heads, self.head_size = key_heads, head_size
        # The layers of a page lie together, so that a text fills huge pages one after another. For arrays of
        # this size NumPy asks for them, and the system finds memory where it is written.
        self._shape = (capacity, layers, key_heads * page * head_size * wide)
        self.keys, self.values = np.zeros(self._shape, np.uint8), np.zeros(self._shape, np.uint8)
        self._empty()

    def _empty(self) -> None:
        self._fresh = 0
        """Pages below it have been used."""
        self._free: list[int] = []
        self._users = [0] * self.capacity
        self._prefixes: dict[tuple[Beginning, tuple[int, ...]], Prefix] = {}
        self._of_page: dict[int, Prefix] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Remembered pages that nobody uses, the least recently used first."""
        self._serial = 0

    def open(self, tokens: Sequence[int] = (), salt: str = "") -> PagedCache:
        """A cache that holds what is remembered of these tokens, in whole pages, the last token apart."""
        cache = PagedCache(self, salt)
        while (
            prefix := self._prefixes.get(cache.key(tokens))
            if cache.length + self.page < len(tokens)
            else None
        ):
            self._use(prefix.page)
            cache.append(prefix)
        return cache

    @property
    def tokens(self) -> int:
        """How many tokens all pages hold."""
        return self.capacity * self.page

    @property
    def available(self) -> int:
        """Pages that can be taken: never used, given back, or remembered and idle."""
        return self.capacity - self._fresh + len(self._free) + len(self._idle)

    @property
    def free(self) -> int:
        """How many tokens the pages hold that can be taken."""
        return self.available * self.page

    def take(self) -> int | None:
        """A page that nobody uses; None if there is none."""
        if self._free:
            page = self._free.pop()
        elif self._fresh < self.capacity:
            page, self._fresh = self._fresh, self._fresh + 1
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        else:
            return None
        self._users[page] = 1
        return page

    def give_back(self, pages: Sequence[int]) -> None:
        """Pages that one request no longer uses. The last are the first to be forgotten: those before them
        are of use without them, they are not."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._of_page:
                self._idle[page] = None
            else:
                self._free.append(page)

    def remember(self, key: tuple[Beginning, tuple[int, ...]], page: int) -> Prefix:
        """The page that is remembered by this text: the one that was before, in place of this one, or it."""
        known = self._prefixes.get(key)
        if known is not None:
            self._use(known.page)
            self.give_back([page])
            return known
        self._serial += 1
        made = Prefix(key, self._serial, page)
        self._prefixes[key] = self._of_page[page] = made
        return made

    def renewed(self) -> Self:
        # The memory itself stays: beside it, as much again might not be free.
        pool = copy.copy(self)
        pool._empty()
        return pool

    @property
    def memory(self) -> structures.Memory:
        """The addresses, for the kernels."""
        _, layers, size = self._shape
        return structures.Memory(self.keys.ctypes.data, self.values.ctypes.data, size, layers * size)

    def _use(self, page: int) -> None:
        self._users[page] += 1
        self._idle.pop(page, None)

    def _forget(self, page: int) -> None:
        del self._prefixes[self._of_page.pop(page).key]


class PagedCache:
    """Keys and values of one request. Root rule: between steps length == len(tokens) - 1."""

    def __init__(self, pool: PagePool, salt: str = "") -> None:
        self.pool = pool
        self.pages = array("i")
        self.length = 0
        self._last: Beginning = salt
        self._remembered = 0
        """Pages, from the first on, that are remembered by their text."""

    def reserve(self, length: int) -> bool:
        """Have pages for so many tokens; False where there are none left."""
        pages, pool = self.pages, self.pool
        while len(pages) * pool.page < length:
            page = pool.take()
            if page is None:
                return False
            pages.append(page)
        return True

    def keep(self, path: Sequence[int], in_flight: Sequence[int]) -> None:
        assert not in_flight, "the decoder finishes every row in one forward"
        for i, row in enumerate(path):
            if i != row:
                self._move(self.length + row, self.length + i)
        self.length += len(path)

    def remember(self, tokens: Sequence[int]) -> None:
        """Let later caches begin with what this one holds of its text, which these tokens are."""
        while (self._remembered + 1) * self.pool.page <= self.length:
            at = self._remembered
            self.pages[at] = self._note(self.pool.remember(self.key(tokens), self.pages[at]))

    def close(self) -> None:
        # Forgotten first, so that no interrupt gives them back twice.
        pages, self.pages, self.length = self.pages, array("i"), 0
        self.pool.give_back(pages)

    def key(self, tokens: Sequence[int]) -> tuple[Beginning, tuple[int, ...]]:
        """By which the first page that is not remembered yet would be."""
        start = self._remembered * self.pool.page
        return self._last, tuple(tokens[start : start + self.pool.page])

    def append(self, prefix: Prefix) -> None:
        """Hold one page more of the text."""
        self.pages.append(self._note(prefix))
        self.length += self.pool.page

    def pretend(self, length: int) -> None:
        """Count so many tokens as held, whatever their keys and values: for measurements."""
        self.reserve(length)
        self.length = length
        # Memory that was never written is one page of zeros, which would be read from the caches.
        self.pool.keys[self.pages] = self.pool.values[self.pages] = 0

    def _note(self, prefix: Prefix) -> int:
        self._remembered += 1
        self._last = prefix.serial
        return prefix.page

    def _move(self, old: int, new: int) -> None:
        """Copy the key and value at one slot to another."""
        pool = self.pool
        (from_page, from_lane), (to_page, to_lane) = (divmod(slot, pool.page) for slot in (old, new))
        dtype = np.uint16 if pool.wide == 2 else np.float32
        shape = pool.capacity, -1, pool.key_heads
        keys = pool.keys.view(dtype).reshape(*shape, pool.head_size, pool.page)
        keys[self.pages[to_page], ..., to_lane] = keys[self.pages[from_page], ..., from_lane]
        values = pool.values.view(dtype).reshape(*shape, pool.page, pool.head_size)
        values[self.pages[to_page], ..., to_lane, :] = values[self.pages[from_page], ..., from_lane, :]


def page_limit(memory: int | None, wide: int, context: int) -> int:
    """How many pages a pool has. memory: bytes; None: see `engine.scheduler.Limits`. wide: bytes of a page.
    context: pages of the longest text. Raises InvalidOption for less than a page, or more than the machine
    has."""
    available = available_memory()
    if memory is None:
        usual = max(DEFAULT_MEMORY // wide, context)
        return usual if available is None else max(1, min(usual, available // 2 // wide))
    if memory < wide:
        raise InvalidOption(
            f"kv_memory={memory}: one page of keys and values of this model takes {wide} bytes",
            option="kv_memory",
        )
    if available is not None and memory > available:
        raise InvalidOption(
            f"kv_memory={memory}: this machine has {available} bytes of free memory", option="kv_memory"
        )
    return memory // wide
