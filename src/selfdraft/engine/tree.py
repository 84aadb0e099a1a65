"""A tree of tokens: the rows of one forward.

Row 0 is the last committed token, which is not in the cache yet. Every other row hangs under an
earlier one, so parents come before their children. A row sees the history, its ancestors and itself.
Prefill is a tree too: the chain of the prompt.

The shape of a tree (its parents) repeats from step to step, so what follows from it alone, depth and
visibility, is computed once per shape and shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..errors import InvalidTree

MAX_DRAFT = 512
"""Rows that a drafter may propose, at most."""
SHARED = 512  # rows up to which a shape is kept; larger ones are those of training, which do not come again


@dataclass(frozen=True)
class Tree:
    """Rows of one forward.

    tokens: id of each row. parents: index of the row each one hangs under; -1 for row 0 alone, and
    parents[i] < i. Raises InvalidTree where that does not hold.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.parents) or not _rooted(self.parents):
            raise InvalidTree(
                f"rows must hang under earlier rows, row 0 under none (-1); "
                f"got {len(self.tokens)} tokens with parents {self.parents}"
            )

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> Tree:
        """Each token under the one before it."""
        return cls(tuple(tokens), _line(len(tokens)))

    def hang(self, row: int, tokens: Sequence[int]) -> Tree:
        """This tree with a chain of tokens added under a row."""
        first = len(self)
        parents = (row, *range(first, first + len(tokens) - 1))[: len(tokens)]
        return Tree(self.tokens + tuple(tokens), self.parents + parents)

    def prune(self, depth: int) -> Tree:
        """This tree without the rows deeper than `depth` (>= 0). Rows that stay keep their order."""
        if max(self.depth) <= depth:
            return self
        stay = [row for row, d in enumerate(self.depth) if d <= depth]
        new = {row: i for i, row in enumerate(stay)}
        return Tree(
            tuple(self.tokens[row] for row in stay),
            tuple(new.get(self.parents[row], -1) for row in stay),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def ordinary(self, vocabulary: int) -> int:
        """How many rows carry ids of a vocabulary of this size. Mask tokens, if any, stand behind them."""
        if self.tokens[-1] < vocabulary:
            return len(self)
        return sum(token < vocabulary for token in self.tokens)

    @property
    def is_chain(self) -> bool:
        """True if each row hangs under the one before it."""
        return is_chain(self.parents)

    @property
    def depth(self) -> tuple[int, ...]:
        """Distance of each row from row 0: how many positions after the root it stands."""
        return _depth(self.parents)

    @property
    def visible(self) -> Tensor:
        """Which rows each row sees among the rows of this tree, [rows, rows] bool: ancestors and itself."""
        return _visible(self.parents) if len(self) <= SHARED else self._seen

    @cached_property
    def _seen(self) -> Tensor:
        return _visible.__wrapped__(self.parents)

    @cached_property
    def _children(self) -> dict[tuple[int, int], int]:
        rows = range(len(self) - 1, 0, -1)  # backwards, so that the first of equal siblings wins
        return {(self.parents[row], self.tokens[row]): row for row in rows}

    def child(self, row: int, token: int) -> int | None:
        """The row under `row` that carries `token`, if there is one; the first of several."""
        return self._children.get((row, token))

    def below(self, row: int) -> list[int]:
        """A row and all its descendants, in order."""
        return self.visible[:, row].nonzero().flatten().tolist()


def matches(tree: Tree, held: Tree) -> dict[int, int]:
    """Rows of a tree that stand on the same path of tokens in another one, and where they are there."""
    same = {0: 0} if tree.tokens[0] == held.tokens[0] else {}
    for row in range(1, len(tree)):
        above = same.get(tree.parents[row])
        old = held.child(above, tree.tokens[row]) if above is not None else None
        if old is not None:
            same[row] = old
    return same


@lru_cache(maxsize=1024)
def _line(rows: int) -> tuple[int, ...]:
    return tuple(range(-1, rows - 1))


def is_chain(parents: tuple[int, ...]) -> bool:
    """True for the parents of a chain."""
    return parents == _line(len(parents))


@lru_cache(maxsize=1024)
def _rooted(parents: tuple[int, ...]) -> bool:
    return parents[:1] == (-1,) and all(0 <= p < row for row, p in enumerate(parents[1:], start=1))


@lru_cache(maxsize=1024)
def _depth(parents: tuple[int, ...]) -> tuple[int, ...]:
    depth = [0]
    for parent in parents[1:]:
        depth.append(depth[parent] + 1)
    return tuple(depth)


@lru_cache(maxsize=128)
def _visible(parents: tuple[int, ...]) -> Tensor:
    see = torch.eye(len(parents), dtype=torch.bool)
    if is_chain(parents):
        return see.cumsum(0).bool()
    for row, parent in enumerate(parents[1:], start=1):
        see[row] |= see[parent]
    return see
