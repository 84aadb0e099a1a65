"""Jacobi decoding, the decoding of CLLM (arXiv 2403.00835, section 3).

A window of guesses stands behind the last token. Each pass replaces every guess by the model's pick
after the token before it; the right prefix is emitted, and what is left moves up. The window is always
refilled, from what the text's own n-grams and those of discarded tails would copy (Lookahead's pool,
arXiv 2402.02057), so that no row is random where something is known. These are bets like the
guesses themselves (`worth`), which may branch. Where nothing is known stands a token of the text at random,
or the one that a tuned model was taught to read as unknown (`Lookahead.filler`).

How long the window is follows from how often its guesses come true, by how far ahead they stand, and
from what rows cost: on an ordinary model it is short or nothing, on one tuned for consistency (CLLM)
tens of rows. Guesses are judged as the text comes, whether or not they were run; where none are made, a
small share of the time is spent on making some. When sampling, a guess has the noise of its position in
it already.

`faithful` is the method as published: a block of `block` tokens, the first of them known, the rest
drawn at random from the text so far; the block goes on with what is left of it until it is empty. On an
ordinary model this gains little; on one tuned for consistency several tokens settle per pass.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from annotated_types import Ge

from ..engine.step import Step
from ..engine.tree import Tree
from .draft_tree import LEAST, MARGIN, AcceptanceStats, Candidates, DraftTreeBuilder
from .method import DraftContext, Drafter, Lookahead
from .ngrams import PRIOR, NgramCopies, Places

AHEAD = (0.15, 0.3, 0.5, 0.6, 0.6, 0.6, 0.6)  # a guess 1, 2, 3-4, 5-8, ... rows ahead, after right ones
TAUGHT = (0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6)  # the same of a model that was tuned to guess,
GUESSED = "ahead"  # unless its adapter was calibrated, under this name
POOL = 0.1  # what once followed the same two tokens, off the text
PROBE = 8  # rows of a window that is run to learn
SHARE = 0.01  # of the time, for probing


@dataclass(frozen=True)
class Jacobi:
    """block: rows a step may have, the known token's own among them (n). faithful: draft as published,
    where block is 16, the rows of a fresh block."""

    block: Annotated[int, Ge(1)] | None = None
    faithful: bool = False

    def drafter(self, context: DraftContext) -> Drafter:
        if self.faithful:
            filler = context.lookahead.filler if context.lookahead is not None else None
            return FaithfulDrafter(self.block or 16, random.Random(context.seed), filler)
        return JacobiDrafter(self.block or 64, context)


class Point(NamedTuple):
    """A point of a draft. at: index of the next token in the text; before: the two tokens before it."""

    at: int
    before: tuple[int, int]
    places: Places


class JacobiDrafter:
    def __init__(self, block: int, context: DraftContext) -> None:
        self.block = block
        self.dice = random.Random(context.seed)
        self.copies = NgramCopies((), context.prompt)
        self.guesses: dict[int, int] = {}  # index in the text -> token
        self.pool: dict[tuple[int, int], int] = {}
        look = context.lookahead
        self.filler = look.filler if look is not None else None
        prior = AHEAD if look is None or self.filler is None else _calibrated(look)
        self.ahead = AcceptanceStats(dict(enumerate(prior)))
        guessed: dict[Hashable, float] = {("guess", i): odds for i, odds in enumerate(prior)}
        noise = context.noise if context.temperature > 0 else None
        self.builder = DraftTreeBuilder(
            self, AcceptanceStats(PRIOR | guessed | {"pool": POOL}), context.cost, noise, block
        )
        self.length = 0
        self.probing = 0.0  # time that may go to probing, in steps of one row

    def propose(self, tokens: Sequence[int]) -> Tree:
        self.length = len(tokens)
        before = (tokens[-2] if len(tokens) > 1 else -1, tokens[-1])
        tree = self.builder.tree(tokens, Point(len(tokens), before, self.copies.read(tokens)))
        return self._refill(tree, tokens, self._window(len(tree)))

    def observe(self, step: Step) -> None:
        emitted = step.emitted
        self.builder.learn(emitted, len(step.tree))
        for i, token in enumerate(emitted):
            guess = self.guesses.get(self.length + i)
            if guess is not None:
                self.ahead.learn(_far(i), guess == token)
            if guess != token:
                break
        self._remember(step)

    def bets(self, state: Point) -> Sequence[Candidates]:
        bets: list[Candidates] = self.copies.bets(state.places)
        guess = self.guesses.get(state.at)
        if guess is not None:
            bets.append(Candidates(("guess", _far(state.at - self.length)), {guess: 1.0}))
        pooled = self.pool.get(state.before)
        if pooled is not None:
            bets.append(Candidates("pool", {pooled: 1.0}))
        return bets

    def follow(self, state: Point, token: int) -> Point:
        return Point(state.at + 1, (state.before[1], token), self.copies.follow(state.places, token))

    def _window(self, rows: int) -> int:
        """Rows that the window is worth; those of a probe, where there is time for one.

        With so many guesses standing, a step yields the tokens that they promise, and as many rows more
        are needed for as many guesses to stand after it.
        """
        best, window, tokens, reached = MARGIN, 1, 1.0, 1.0
        for guesses in range(1, self.block):
            reached *= self.ahead[_far(guesses - 1)]
            tokens += reached
            if reached < LEAST or guesses + int(tokens) > self.block:
                break
            wanted = guesses + int(tokens)
            rate = tokens / self.builder.budget.cost(wanted)
            if rate > best and self.builder.budget.affords(wanted):
                best, window = rate, wanted
        probe = min(PROBE, self.block)
        if max(rows, window) >= probe:
            return window
        self.probing += SHARE
        extra = self.builder.budget.cost(probe) - self.builder.budget.cost(max(rows, window))
        if extra > self.probing or not self.builder.budget.affords(probe):
            return window
        self.probing -= extra
        return probe

    def _refill(self, tree: Tree, tokens: Sequence[int], window: int) -> Tree:
        """The tree, its first line of rows made as long as the window where there is room."""
        row = 0
        line = list(tokens[-2:])
        for child, parent in enumerate(tree.parents[1:], start=1):
            if parent == row:
                row = child
                line.append(tree.tokens[child])
        more: list[int] = []
        first = len(tokens) + tree.depth[row]
        for at in range(first, min(len(tokens) + window - 1, first + self.block - len(tree))):
            known = self.guesses.get(at, self.pool.get((line[-2], line[-1])) if len(line) > 1 else None)
            line.append(self._unknown(tokens) if known is None else known)
            more.append(line[-1])
        return tree.hang(row, more) if more else tree

    def _unknown(self, tokens: Sequence[int]) -> int:
        return self.dice.choice(tokens) if self.filler is None else self.filler

    def _remember(self, step: Step) -> None:
        """The picks off the path: guesses for positions to come, n-grams for the pool."""
        tree, path = step.tree, set(step.path)
        far = len(step.path)
        self.guesses = {}
        for row, depth in enumerate(tree.depth):
            if depth >= far:
                self.guesses.setdefault(self.length + depth, step.picks[row])
            if row not in path and row:
                self.pool[tree.tokens[tree.parents[row]], tree.tokens[row]] = step.picks[row]


def _far(ahead: int) -> int:
    return min(ahead.bit_length(), len(AHEAD) - 1)


def _calibrated(look: Lookahead) -> Sequence[float]:
    table = look.odds.get(GUESSED, ())
    return table[0] if [len(row) for row in table] == [len(AHEAD)] else TAUGHT


class FaithfulDrafter:
    def __init__(self, block: int, dice: random.Random, filler: int | None = None) -> None:
        self.block = block
        self.dice = dice
        self.filler = filler
        self.guess: Sequence[int] | None = None  # None: the block is used up

    def propose(self, tokens: Sequence[int]) -> Tree:
        if self.guess is None:
            unknown = tokens if self.filler is None else [self.filler]
            self.guess = self.dice.choices(unknown, k=self.block - 1)
        return Tree.chain([tokens[-1], *self.guess])

    def observe(self, step: Step) -> None:
        kept = len(step.path)
        # The pick after row i is the new guess for row i + 1; the pick after the last row lies
        # outside the block and is dropped, as in the published code.
        self.guess = step.picks[kept : len(step.tree) - 1] if kept < len(step.tree) else None
