"""Jacobi decoding, the decoding of CLLM (arXiv 2403.00835, section 3).

A window of draft tokens stands behind the last token. Each pass replaces every draft token by the model's
pick after the token before it; the right prefix is emitted, and the rest moves up. The window is refilled
from the n-grams of the text and from those of discarded tails (the pool of lookahead decoding, arXiv
2402.02057), so that no row is random where something is known. These are candidates like the draft tokens
themselves (`draft_tree`), and they may branch. Where nothing is known, a row carries a random token of the
text, or the one that a tuned model was taught to read as unknown (`Lookahead.filler`).

The length of the window follows from the acceptance rates of its tokens, by distance, and from what rows
cost: on an ordinary model it is short or empty, on one tuned for consistency (CLLM) tens of rows. Draft
tokens are compared with the text as it comes, whether or not they were run; where there are none, a small
share of the time is spent on producing some. When sampling, a draft token already includes the noise of its
position.

`faithful` is the method as published (`blocks`): a block of `block` tokens, the first of them known, the rest
drawn at random from the text so far; it is iterated until all of it has been emitted. On an ordinary model
this gains little; on one tuned for consistency several tokens per pass converge. A block shrinks while it
converges, so its last passes settle few tokens; Jacobi Forcing (arXiv 2512.14681) therefore begins the next
block before (`blocks`, `spawn`) and recycles what was rejected (`recycled`). The window of the default way is
refilled in every pass and has no blocks to begin, and its pool recycles in all of its rows: these options are
for `faithful` alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from annotated_types import Ge, Gt, Le

from ..engine.step import Step
from ..engine.tree import MAX_DRAFT, Tree
from ..errors import InvalidOption
from .acceptance import AcceptanceStats, Budget, Candidates, Kind
from .blocks import BlockDrafter
from .draft_tree import MARGIN, MIN_REACHED, DraftTreeBuilder, Sources, TreeDrafter
from .method import DraftContext, Drafter, Lookahead, drawn_noise
from .ngrams import PRIOR, NgramCopies
from .suffix_index import SuffixIndex

SOURCE = "jacobi"
# Acceptance rates of a draft token 1, 2, 3-4, 5-8, ... rows ahead, where those before it were right:
UNTUNED = (0.15, 0.3, 0.5, 0.6, 0.6, 0.6, 0.6)
TUNED = (0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6)  # of a model that was tuned for it but not calibrated
RATES = "ahead"  # the name of calibrated rates in an adapter
POOL = 4096  # n-grams of discarded tails that are kept
POOL_RATE = 0.1  # acceptance rate of what once followed the same two tokens, off the text
PROBE = 8  # rows of a window that is run to learn
PROBING_TIME = 0.01  # share of the time that goes to such windows


@dataclass(frozen=True)
class Jacobi:
    """Iterate a window of draft tokens towards the model's own picks."""

    # Rows of a step, at most, the known token's own included (n). None: 64, or 16 if faithful.
    block: Annotated[int, Ge(1)] | None = None
    faithful: bool = False  # draft as published
    # If faithful: blocks in flight, at most (K). Jacobi Forcing has 2.
    blocks: Annotated[int, Ge(1)] = 1
    # If there are several: the share of the newest block that is settled before the next one begins (r).
    spawn: Annotated[float, Gt(0), Le(1)] = 0.85
    # If faithful: rejected tails that are kept to draft from. Jacobi Forcing keeps 4.
    recycled: Annotated[int, Ge(0)] = 0

    def __post_init__(self) -> None:
        for name, value, off in (("blocks", self.blocks, 1), ("recycled", self.recycled, 0)):
            if not self.faithful and value != off:
                raise InvalidOption(
                    f"{name}={value} is for blocks as published: give faithful=true, or leave {name} out",
                    option=name,
                )
        if self.blocks == 1 and self.spawn != Jacobi.spawn:
            raise InvalidOption(
                f"spawn={self.spawn} says when a further block begins, and blocks=1 has none; give blocks=2",
                option="spawn",
            )
        rows = self.blocks * self._rows + self.recycled * (self._rows - 1)
        if rows > MAX_DRAFT:
            raise InvalidOption(
                f"block={self._rows}, blocks={self.blocks} and recycled={self.recycled} make {rows} rows of "
                f"drafts; the limit is {MAX_DRAFT}: give a smaller block",
                option="block",
            )

    @property
    def _rows(self) -> int:
        return self.block or (16 if self.faithful else 64)

    def drafter(self, context: DraftContext) -> Drafter:
        if not self.faithful:
            return JacobiDrafter(self._rows, context)
        filler = context.lookahead.filler if context.lookahead is not None else None
        dice = random.Random(context.seed)
        return BlockDrafter(self._rows, dice, filler, self.blocks, self.spawn, self.recycled)


class Point(NamedTuple):
    """A point of a draft."""

    at: int  # index in the text of the next token
    before: tuple[int, int]  # the two tokens before it


class Picks:
    """What the model picked off the path, as a `draft_tree.Source`: draft tokens of positions to come, and
    the n-grams of discarded tails."""

    def __init__(self, prior: Sequence[float]) -> None:
        """prior: acceptance rates of draft tokens by distance."""
        self.prior: dict[Kind, float] = {(SOURCE, i): rate for i, rate in enumerate(prior)}
        self.prior[SOURCE, "pool"] = POOL_RATE
        self.length = 0
        self.drafts: dict[int, int] = {}  # index in the text -> the pick of the last pass
        # Two tokens -> what last followed them, off the text; the oldest first. What followed them earlier is
        # not kept: it was accepted at 0.1 where the last one was at 0.25, and saved no step.
        self.pool: dict[tuple[int, int], int] = {}

    def read(self, tokens: Sequence[int]) -> Point:
        self.length = len(tokens)
        return Point(len(tokens), (tokens[-2] if len(tokens) > 1 else -1, tokens[-1]))

    def candidates(self, state: Point) -> Sequence[Candidates]:
        found = []
        draft = self.drafts.get(state.at)
        if draft is not None:
            kind = (SOURCE, _distance(state.at - self.length))
            found.append(Candidates(kind, {draft: 1.0}, drawn=True))
        pooled = self.pool.get(state.before)
        if pooled is not None:
            found.append(Candidates((SOURCE, "pool"), {pooled: 1.0}))
        return found

    def follow(self, state: Point, token: int) -> Point:
        return Point(state.at + 1, (state.before[1], token))

    def remember(self, step: Step) -> None:
        """Keep the picks off the path."""
        tree, path = step.tree, set(step.path)
        far = len(step.path)
        self.drafts = {}
        for row in range(1, len(step.picks)):  # rows behind them carry mask tokens
            depth = tree.depth[row]
            if row in path or step.picks[row] < 0:  # below 0: the row was not finite
                continue
            if depth >= far:
                self.drafts.setdefault(self.length + depth, step.picks[row])
            before = tree.tokens[tree.parents[row]], tree.tokens[row]
            self.pool.pop(before, None)
            self.pool[before] = step.picks[row]
        while len(self.pool) > POOL:
            del self.pool[next(iter(self.pool))]


class Window:
    """Rows behind a tree that are run for their picks, where that pays, or to learn whether it does."""

    def __init__(self, picks: Picks, prior: Sequence[float], block: int, context: DraftContext) -> None:
        """prior: as of `Picks`. block: rows of a step, at most."""
        self.picks, self.block = picks, block
        self.rates = AcceptanceStats({(SOURCE, i): rate for i, rate in enumerate(prior)})
        self.dice = random.Random(context.seed)
        self.filler = context.lookahead.filler if context.lookahead is not None else None
        self.probing = 0.0  # time that may go to probing, in steps of one row

    @property
    def learned(self) -> Sequence[float]:
        """Acceptance rates by distance."""
        return [self.rates[kind] for kind in self.rates.counts]

    def refill(self, tree: Tree, tokens: Sequence[int], budget: Budget) -> Tree:
        """The tree, its first line of rows made as long as the window where there is room."""
        window = self._rows(len(tree), budget)
        row = 0
        line = list(tokens[-2:])
        for child, parent in enumerate(tree.parents[1:], start=1):
            if parent == row:
                row = child
                line.append(tree.tokens[child])
        more: list[int] = []
        first = len(tokens) + tree.depth[row]
        picks = self.picks
        for at in range(first, min(len(tokens) + window - 1, first + self.block - len(tree))):
            known = picks.drafts.get(at, picks.pool.get((line[-2], line[-1])) if len(line) > 1 else None)
            line.append(self._unknown(tokens) if known is None else known)
            more.append(line[-1])
        return tree.hang(row, more) if more else tree

    def learn(self, emitted: Sequence[int]) -> None:
        """Compare the drafts of the last pass with the tokens of this one."""
        for i, token in enumerate(emitted):
            draft = self.picks.drafts.get(self.picks.length + i)
            if draft is not None:
                self.rates.learn((SOURCE, _distance(i)), draft == token)
            if draft != token:
                return

    def _rows(self, rows: int, budget: Budget) -> int:
        """Rows of the window that pay beside a tree of so many rows; those of a probe, where there is time
        for one.

        With so many draft tokens in the window, a step yields the tokens that they promise, and needs as many
        rows more so that the window is as long after it.
        """
        best, window, tokens, reached = MARGIN, 1, 1.0, 1.0
        for drafts in range(1, self.block):
            reached *= self.rates[SOURCE, _distance(drafts - 1)]
            tokens += reached
            if reached < MIN_REACHED or drafts + int(tokens) > self.block:
                break
            wanted = drafts + int(tokens)
            rate = tokens / budget.cost(wanted)
            if rate > best and budget.affords(wanted):
                best, window = rate, wanted
        probe = min(PROBE, self.block)
        if max(rows, window) >= probe:
            return window
        self.probing += PROBING_TIME
        extra = budget.cost(probe) - budget.cost(max(rows, window))
        if extra > self.probing or not budget.affords(probe):
            return window
        self.probing -= extra
        return probe

    def _unknown(self, tokens: Sequence[int]) -> int:
        return self.dice.choice(tokens) if self.filler is None else self.filler


class JacobiDrafter(TreeDrafter):
    def __init__(self, block: int, context: DraftContext) -> None:
        copies = NgramCopies(SuffixIndex((), context.prompt), context.prompt)
        prior = pick_rates(context.lookahead)
        self.picks = Picks(prior)
        self.window = Window(self.picks, prior, block, context)
        rates, noise = AcceptanceStats(PRIOR | self.picks.prior), drawn_noise(context)
        sources = Sources(copies, self.picks)
        super().__init__(DraftTreeBuilder(sources, rates, context.cost, noise, block))
        self.builder.hung = SOURCE

    def propose(self, tokens: Sequence[int]) -> Tree:
        return self.window.refill(super().propose(tokens), tokens, self.builder.budget)

    def observe(self, step: Step) -> None:
        super().observe(step)
        self.window.learn(step.emitted)
        self.picks.remember(step)


def _distance(ahead: int) -> int:
    """The class of a distance, as in UNTUNED."""
    return min(ahead.bit_length(), len(UNTUNED) - 1)


def pick_rates(look: Lookahead | None) -> Sequence[float]:
    """Acceptance rates of draft tokens by distance, at first: as calibrated, where weights are tuned."""
    if look is None or look.filler is None:
        return UNTUNED
    table = look.odds.get(RATES, ())
    return table[0] if [len(row) for row in table] == [len(UNTUNED)] else TUNED
