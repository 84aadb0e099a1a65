"""The rows of one forward, flat: those of all requests one after another, no row a pad.

For each row its token, position, request and slot in the request's pages, how many history keys it sees, and
the slots of its ancestors. A row of a chain sees a longer history instead of ancestors: its keys stand in
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..engine.tree import Tree, is_chain
from .kernels import structures
from .paged_cache import PagedCache

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Shape:
    """What follows from the parents of a tree alone."""

    depth: Ints
    seen: Ints
    """History keys that a row sees beyond the cache's length: of a chain, its own and those before."""
    above: Ints
    """Rows that it sees otherwise, row after row: ancestors and itself, from the root down."""
    above_count: Ints


@lru_cache(maxsize=512)
def shape(parents: tuple[int, ...]) -> Shape:
    count = len(parents)
    own = np.arange(count, dtype=np.int32)
    if is_chain(parents):
        return Shape(own, own + 1, own[:0], np.zeros(count, np.int32))
    paths: list[tuple[int, ...]] = []
    for row, parent in enumerate(parents):
        paths.append((*(paths[parent] if parent >= 0 else ()), row))
    counts = np.array([len(path) for path in paths], np.int32)
    flat = np.fromiter((row for path in paths for row in path), np.int32, int(counts.sum()))
    return Shape(counts - 1, np.zeros(count, np.int32), flat, counts)


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
        shapes = [shape(tree.parents) for tree in trees]
        counts = [len(tree) for tree in trees]
        lengths = np.repeat(np.array([cache.length for cache in caches], np.int32), counts)
        within = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
        starts = np.cumsum([0, *counts])
        tokens = np.array([token for tree in trees for token in tree.tokens], np.int32)
        self.outside = bool(tokens.min() < 0 or tokens.max() >= vocabulary + masks)
        """True where a token is neither in the vocabulary nor a mask token."""
        tokens = np.where(tokens < vocabulary, tokens, vocabulary - 1 - tokens).astype(np.int32)
        width = max(len(cache.pages) for cache in caches)
        tables = np.zeros((len(caches), width), np.int32)
        for table, cache in zip(tables, caches, strict=True):
            table[: len(cache.pages)] = cache.pages
        above = np.concatenate([one.above + cache.length for one, cache in zip(shapes, caches, strict=True)])
        above_start = np.zeros(starts[-1] + 1, np.int32)
        np.cumsum(np.concatenate([one.above_count for one in shapes]), out=above_start[1:])
        blocks = [row for a, b in pairwise(starts) for row in range(a, b, block_rows)]
        want = np.concatenate(
            [np.arange(a, a + n, dtype=np.int32) for a, n in zip(starts, wanted, strict=False)]
        )
        positions = lengths + np.concatenate([one.depth for one in shapes])
        self.last_position = int(positions.max())
        self.starts = starts[:-1].tolist()
        self.rows, self.wanted = int(starts[-1]), len(want)
        self._arrays = {
            "token": tokens,
            "position": positions,
            "request": np.repeat(np.arange(len(trees), dtype=np.int32), counts),
            "slot": lengths + within,
            "seen": lengths + np.concatenate([one.seen for one in shapes]),
            "above": above.astype(np.int32),
            "above_start": above_start,
            "tables": tables,
            "block": np.array([*blocks, self.rows], np.int32),
            "want": want,
        }
        self.structure = structures.Batch(self.rows, self.wanted, width, len(blocks))
        for name, array in self._arrays.items():
            setattr(self.structure, name, array.ctypes.data)
