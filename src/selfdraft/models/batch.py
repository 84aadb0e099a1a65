"""The rows of one forward, flat: those of all requests one after another, no row a pad.

For each row its token, position, request and slot in the request's pages, how many history keys it sees, and
the slots of its ancestors. A row of a chain sees a longer history instead of ancestors: its keys stand in
order.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np

from ..engine.tree import Tree, is_chain
from .kernels import structures
from .paged_cache import PagedCache


@lru_cache(maxsize=512)
def above(parents: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What each row of a tree sees among its rows, row after row: its ancestors and itself, from the root
    down; and where each row's end."""
    paths: list[tuple[int, ...]] = []
    for row, parent in enumerate(parents):
        paths.append((*(paths[parent] if parent >= 0 else ()), row))
    return tuple(row for path in paths for row in path), tuple(accumulate(map(len, paths)))


class Batch:
    """Rows of the trees of some requests, as the kernels want them. The arrays live as long as this
    object."""

    def __init__(
        self,
        trees: Sequence[Tree],
        caches: Sequence[PagedCache],
        wanted: Sequence[int],
        block_rows: int,
        vocabulary: int,
        masks: int = 0,
    ) -> None:
        """wanted: per request, for how many rows, from the first, logits are wanted. block_rows: rows that
        attention takes together, at most. masks: mask tokens of an adapter, the ids from `vocabulary` on."""
        # Lists, joined at the end: of a few rows a step, each array operation costs more than all of them.
        token: list[int] = []
        position: list[int] = []
        request: list[int] = []
        slot: list[int] = []
        seen: list[int] = []
        others: list[int] = []
        others_start = [0]
        block: list[int] = []
        want: list[int] = []
        self.starts: list[int] = []
        """First row of each request."""
        row = 0
        for which, (tree, cache, wishes) in enumerate(zip(trees, caches, wanted, strict=True)):
            count, length = len(tree.tokens), cache.length
            token += tree.tokens
            request += [which] * count
            slot += range(length, length + count)
            if is_chain(tree.parents):
                position += range(length, length + count)
                seen += range(length + 1, length + count + 1)
                others_start += [len(others)] * count
            else:
                rows, ends = above(tree.parents)
                position += [length + depth for depth in tree.depth]
                seen += [length] * count
                others_start += [len(others) + end for end in ends]
                others += [length + one for one in rows]
            block += range(row, row + count, block_rows)
            want += range(row, row + wishes)
            self.starts.append(row)
            row += count
        block.append(row)
        self.rows, self.wanted, self.last_position = row, len(want), max(position)
        most = max(token)
        self.outside = min(token) < 0 or most >= vocabulary + masks
        """True where a token is neither in the vocabulary nor a mask token."""
        if most >= vocabulary:
            token = [one if one < vocabulary else vocabulary - 1 - one for one in token]
        width = max(len(cache.pages) for cache in caches)
        self.structure = structures.Batch(row, len(want), width, len(block) - 1)
        parts = {
            "token": token,
            "position": position,
            "request": request,
            "slot": slot,
            "seen": seen,
            "above": others,
            "above_start": others_start,
            "block": block,
            "want": want,
        }
        self._numbers = np.array([number for part in parts.values() for number in part], np.int32)
        at = int(self._numbers.ctypes.data)
        for name, part in parts.items():
            setattr(self.structure, name, at)
            at += 4 * len(part)
        self._tables = array("i")
        for cache in caches:
            self._tables += cache.pages
            self._tables.frombytes(bytes(4 * (width - len(cache.pages))))
        self.structure.tables = self._tables.buffer_info()[0]
