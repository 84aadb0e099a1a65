"""Drafters that are bad on purpose. Nothing that they propose may change a text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ..drafting.method import DraftContext
from ..engine.step import Step
from ..engine.tree import Tree


@dataclass
class Garbage:
    """Proposes random trees of random ids."""

    rows: int = 12
    vocabulary: int = 320

    def drafter(self, context: DraftContext) -> GarbageDrafter:
        return GarbageDrafter(self, random.Random(context.seed))


@dataclass
class GarbageDrafter:
    options: Garbage
    dice: random.Random

    def propose(self, tokens: Sequence[int]) -> Tree:
        rows = self.dice.randint(0, self.options.rows)
        return Tree(
            (tokens[-1], *(self.dice.randrange(self.options.vocabulary) for _ in range(rows))),
            (-1, *(self.dice.randint(0, row) for row in range(rows))),
        )

    def observe(self, step: Step) -> None:
        pass


@dataclass
class Oracle:
    """Proposes bushy trees that hold the right tokens: each stands between wrong siblings, sometimes twice,
    and the right path stops at a random depth."""

    # The text that plain decoding gives.
    answer: Sequence[int]
    depth: int = 6
    vocabulary: int = 320

    def drafter(self, context: DraftContext) -> OracleDrafter:
        return OracleDrafter(self, len(context.prompt), random.Random(context.seed))


@dataclass
class OracleDrafter:
    options: Oracle
    start: int
    dice: random.Random

    def propose(self, tokens: Sequence[int]) -> Tree:
        at = len(tokens) - self.start
        right = self.options.answer[at : at + self.dice.randint(0, self.options.depth)]
        tree, row = Tree.chain(tokens[-1:]), 0
        for token in right:
            wrong = self.dice.choices(range(self.options.vocabulary), k=2)
            decoys = [decoy for decoy in wrong if decoy != token]
            for decoy in decoys[:1]:
                tree = tree.hang(row, [decoy, token])
            tree = tree.hang(row, [token])
            row = len(tree) - 1
            for decoy in decoys[1:]:
                tree = tree.hang(row, [decoy])
        return tree

    def observe(self, step: Step) -> None:
        pass


@dataclass
class Restless:
    """For looped models: changes the rows in flight at every step. It drops some, reorders the rest, adds
    early picks, right tokens or random ones under any row, or starts over."""

    early: ClassVar[bool] = True
    answer: Sequence[int] = ()
    rows: int = 10
    vocabulary: int = 320

    def drafter(self, context: DraftContext) -> RestlessDrafter:
        return RestlessDrafter(self, len(context.prompt), random.Random(context.seed))


@dataclass
class Draft:
    """A tree that can be changed: for each row its token, its parent, and its early pick, if any."""

    tokens: list[int]
    parents: list[int]
    picks: list[int | None]

    def take(self, rows: Sequence[int]) -> Draft:
        """Only these rows. They include the root, and parents come before children."""
        new = {row: i for i, row in enumerate(rows)}
        parents = [new.get(self.parents[row], -1) for row in rows]
        return Draft([self.tokens[row] for row in rows], parents, [self.picks[row] for row in rows])

    def below(self, top: int) -> set[int]:
        """A row and all its descendants."""
        found = {top}
        for row, parent in enumerate(self.parents):
            if parent in found:
                found.add(row)
        return found


@dataclass
class RestlessDrafter:
    options: Restless
    start: int
    dice: random.Random
    in_flight: Draft | None = field(default=None)

    def propose(self, tokens: Sequence[int]) -> Tree:
        dice, known = self.dice, self.in_flight
        if known is None or dice.random() < 0.1:
            known = Draft([tokens[-1]], [-1], [None])
        if len(known.tokens) > 1 and dice.random() < 0.25:
            lost = known.below(dice.randrange(1, len(known.tokens)))
            known = known.take([row for row in range(len(known.tokens)) if row not in lost])
        if dice.random() < 0.3:
            known = known.take(self._shuffled(known))
        depth = Tree(tuple(known.tokens), tuple(known.parents)).depth
        for _ in range(dice.randint(0, 2)):
            if len(known.tokens) < self.options.rows:
                row = dice.randrange(len(depth))
                known.tokens.append(self._token(known.picks[row], len(tokens) - self.start + depth[row]))
                known.parents.append(row)
                known.picks.append(None)
        return Tree(tuple(known.tokens), tuple(known.parents))

    def observe(self, step: Step) -> None:
        picks: list[int | None] = list(step.picks)
        whole = Draft(list(step.tree.tokens), list(step.tree.parents), picks)
        self.in_flight = whole.take(step.in_flight) if step.in_flight else None

    def _shuffled(self, rows: Draft) -> list[int]:
        """All rows in another order, parents before children."""
        order, left = [0], set(range(1, len(rows.tokens)))
        while left:
            free = sorted(row for row in left if rows.parents[row] in order)
            order.append(self.dice.choice(free))
            left.remove(order[-1])
        return order

    def _token(self, pick: int | None, at: int) -> int:
        answer, dice = self.options.answer, self.dice
        chance = dice.random()
        if pick is not None and chance < 0.5:
            return pick
        return answer[at] if at < len(answer) and chance < 0.8 else dice.randrange(self.options.vocabulary)
