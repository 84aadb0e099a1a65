"""Jacobi decoding as published, in blocks of tokens: of CLLM (arXiv 2403.00835, section 3), and of Jacobi
Forcing (arXiv 2512.14681), which has several blocks in flight and recycles what was rejected.

A block of n rows is the last token of the text and n - 1 draft tokens, at first drawn at random from the text
so far, or the token that a tuned model was taught to read as unknown. Each pass replaces every draft token by
the model's pick after the token before it. The right prefix is emitted and leaves the block, which shrinks
until it is empty; then the next one begins.

With `blocks` above 1 the next block is spawned earlier, behind the tokens of the newest one, once a share
`spawn` of that is settled. As published it begins with a copy of what is left of the first block. Its tokens
are iterated like all others, in a context that is partly wrong, and are drafts until the first block is done.
The published code then verifies them in one more pass; here the walk goes on into the next block in the pass
that finishes the first one, because its tokens are verified there as well.

With `recycled` above 0 the first block's draft tokens of the last so many passes are kept: the tails. Where
one of them contains the last token of the text, what followed there is one more candidate for the first
block. The published code runs candidates as rows of a batch, each one a whole copy of all blocks; here they
are branches of one tree, as far as they differ. Where the walk takes a branch, its picks are the new draft
tokens as far as it goes, and those of the blocks' own rows from there on.

Not all rows may run: the engine leaves rows out where it is short of them, and a grammar those that it
excludes. Draft tokens without a new pick stay as they are, so that each block keeps its length.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence

from ..engine.step import Step
from ..engine.tree import Tree


class BlockDrafter:
    """Iterates blocks of draft tokens until the model reproduces them."""

    def __init__(
        self,
        block: int,
        dice: random.Random,
        filler: int | None = None,
        blocks: int = 1,
        spawn: float = 1.0,
        recycled: int = 0,
    ) -> None:
        """block: rows of a block (n). filler: token that stands for unknown ones; None: they are drawn from
        the text. blocks: in flight, at most (K). spawn: share of the newest block that must be settled before
        the next one begins (r), above 0. recycled: tails that are kept."""
        self.block, self.dice, self.filler = block, dice, filler
        self.blocks, self.spawn = blocks, spawn
        self.left: list[int] = []  # rows of each block in flight, the first one's and those behind it
        self.settled = 0  # rows of the newest block that did not change in the last pass, from its beginning
        self.drafts: list[int] = []  # draft tokens of all blocks
        self.tails: deque[list[int]] = deque(maxlen=recycled)

    def propose(self, tokens: Sequence[int]) -> Tree:
        if not self.left:
            self.left = [self.block]
            self.drafts = self._unknown(tokens, self.block - 1)
        elif len(self.left) < self.blocks and self.settled >= self.spawn * self.block:
            known = [tokens[-1], *self.drafts][: self.left[0]]
            self.left.append(self.block)
            self.drafts += known + self._unknown(tokens, self.block - len(known))
        tree = Tree.chain([tokens[-1], *self.drafts])
        for tail in self.tails:
            if tokens[-1] in tail:
                found = tail.index(tokens[-1]) + 1
                tree = _with_branch(tree, tail[found : found + self.left[0] - 1])
        return tree

    def observe(self, step: Step) -> None:
        if self.tails.maxlen:
            self.tails.appendleft(self.drafts[: self.left[0] - 1])
        line, kept = _line(step), len(step.path)
        self.settled = self._settled(step, line)
        # The pick after row i is the new draft token of row i + 1; the pick after the last row lies outside
        # the blocks and is dropped, as in the published code. A row that is not finite has none (-1).
        drafts = [max(0, step.picks[row]) for row in line[kept:]] + self.drafts[len(line) :]
        while self.left and kept >= self.left[0]:
            kept -= self.left.pop(0)
        if self.left:
            self.left[0] -= kept
        self.drafts = drafts[: max(0, sum(self.left) - 1)]

    def _settled(self, step: Step, line: Sequence[int]) -> int:
        """Rows of the newest block, counted from its beginning, that a pass emitted or left as they were."""
        first = row = sum(self.left[:-1])
        while row < len(line) and (row == 0 or step.tree.tokens[line[row]] == step.picks[line[row - 1]]):
            row += 1
        return self.block - self.left[-1] + row - first

    def _unknown(self, tokens: Sequence[int], count: int) -> list[int]:
        return self.dice.choices(tokens if self.filler is None else [self.filler], k=count)


def _with_branch(tree: Tree, tokens: Sequence[int]) -> Tree:
    """The tree with these tokens under its root, as far as they are not there yet."""
    row = 0
    for i, token in enumerate(tokens):
        child = tree.child(row, token)
        if child is None:
            return tree.hang(row, tokens[i:])
        row = child
    return tree


def _line(step: Step) -> Sequence[int]:
    """The row of each depth: of the line that the walk took as far as it goes, then of the blocks, whose rows
    come first among siblings."""
    taken = [*step.path[:-1], *_first_line(step.tree, step.path[-1])]
    return taken + _first_line(step.tree, 0)[len(taken) :]


def _first_line(tree: Tree, row: int) -> list[int]:
    """A row, its first child, the first child of that one, and so on."""
    line = [row]
    for child in range(row + 1, len(tree)):
        if tree.parents[child] == line[-1]:
            line.append(child)
    return line
