"""Jacobi trajectories: how blocks of guesses become the model's answer, for it to learn to skip steps of
(CLLM, arXiv 2403.00835, section 3.3.1).

An answer is decoded in blocks of n tokens. The first state of a block is tokens drawn from the text so far;
each pass maps a state to the next, the picks after its tokens, until the block is the model's own text. They
are recorded while the engine decodes by `jacobi` as published, with its cache and in batches: the right
prefix of a block leaves it, and what is left, with that prefix, is the state that a pass over all of the text
would come to. So each row is an answer, as `selfdraft distill` writes them, with its states beside it.

A text ends where it ends: an end inside a block cuts all states of the block there. Answers that loop are cut
where they begin to; one that has less than a block left, or is the same token again and again, keeps no
states and is counted.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from statistics import fmean
from typing import Annotated, Any

from annotated_types import Ge

from .._common.repetition import fresh
from ..drafting.jacobi import FaithfulDrafter
from ..drafting.method import DraftContext, Drafter
from ..engine.request import Limits, Request
from ..engine.step import Step
from ..engine.tree import Tree
from ..models.transformers import TransformersModel
from .distill import Distillation, Progress
from .shards import DEGENERATE, Row
from .tuning_cost import answer_all

State = Sequence[int]
SAME = 10  # equal tokens in a row that make an answer degenerate, as published


@dataclass(frozen=True)
class Recorded:
    """Jacobi decoding as published, remembered. block: tokens of a block (n)."""

    block: Annotated[int, Ge(2)] = 16

    def drafter(self, context: DraftContext) -> Drafter:
        return Recorder(self.block, context)


class Recorder:
    """blocks: of each its states, the first one drawn, the last one the text."""

    def __init__(self, block: int, context: DraftContext) -> None:
        filler = context.lookahead.filler if context.lookahead is not None else None
        self.inner = FaithfulDrafter(block, random.Random(context.seed), filler)
        self.dice = random.Random(f"{context.seed} last")  # its own: `inner` draws what it would draw alone
        self.blocks: list[list[State]] = []
        self.known: list[int] = []  # the right prefix of the block

    def propose(self, tokens: Sequence[int]) -> Tree:
        begins = self.inner.drafts is None
        tree = self.inner.propose(tokens)
        if begins:  # a pass runs the token before the block and all guesses but the last
            self.known = []
            unknown = tokens if self.inner.filler is None else [self.inner.filler]
            self.blocks.append([[*tree.tokens[1:], self.dice.choice(unknown)]])
        return tree

    def observe(self, step: Step) -> None:
        self.inner.observe(step)
        self.known += step.emitted
        self.blocks[-1].append([*self.known, *step.picks[len(step.path) :]])


def states(blocks: Iterable[Sequence[State]], answer: Sequence[int], block: int) -> list[list[list[int]]]:
    """Of each block of an answer the states before the text itself, cut where the answer ends."""
    kept = []
    for start, recorded in zip(range(0, len(answer), block), blocks, strict=False):
        aim = answer[start : start + block]
        short = [list(state[: len(aim)]) for state in recorded]
        kept.append([state for state in short if state != aim])
    return kept


def augmented(block: Sequence[State], aim: State, dice: random.Random) -> list[list[int]]:
    """States in which up to half of the wrong tokens, never the first, are put right, but for the one before
    the text; so states are seen that the model does not come by."""
    made = [list(state) for state in block]
    for state in made[:-1]:
        wrong = [i for i, (a, b) in enumerate(zip(state, aim, strict=True)) if a != b][1:]
        for i in dice.sample(wrong, dice.randint(0, len(wrong) // 2)):
            state[i] = aim[i]
    return made


@dataclass
class Recording(Distillation):
    """A distillation whose method is `Recorded`. augment: see `augmented`."""

    augment: bool = False

    def _row(self, index: int, request: Request) -> Row:
        row = super()._row(index, request)
        recorder, method = request.drafter, self.generator.method
        assert isinstance(recorder, Recorder)
        assert isinstance(method, Recorded)
        if degenerate(row, method.block):
            return replace(row, finish_reason=DEGENERATE)
        found = states(recorder.blocks, list(row.answer), method.block)
        if self.augment:
            dice = random.Random(f"{self.recipe.seed} {index} augment")
            starts = range(0, len(row.answer), method.block)
            aims = (row.answer[start : start + method.block] for start in starts)
            found = [augmented(mine, aim, dice) for mine, aim in zip(found, aims, strict=True)]
        return replace(row, states=found)

    def _summary(self, progress: Progress) -> dict[str, Any]:
        return {**super()._summary(progress), "degenerate": self.shards.reasons[DEGENERATE]}


def degenerate(row: Row, block: int) -> bool:
    """Is there nothing to learn? The same token ten times, or less than a block before it loops."""
    if row.finish_reason == "loop" and len(row.answer) < block:
        return True
    return any(len(list(same)) >= SAME for _, same in groupby(row.answer))


@dataclass(frozen=True)
class Convergence:
    """Per block (paper, section 4.3), means. fast_forwarded: tokens that the right prefix gained beyond one
    in a pass. stationary: tokens that were right behind a wrong one, and stayed. passes: from the first state
    to the text. tokens: of a block, ends of answers being shorter. progress: the share of whole blocks'
    tokens that are right up to the first wrong one, after 0, 1, ... passes."""

    blocks: int
    tokens: float
    passes: float
    fast_forwarded: float
    stationary: float
    progress: Sequence[float]


def convergence(rows: Iterable[Mapping[str, Any]], block: int) -> Convergence:
    """Counted over rows with `answer` and `states`."""
    counts, whole = [], []
    for row in rows:
        for i, mine in enumerate(row["states"]):
            aim = row["answer"][i * block : (i + 1) * block]
            right = [[a == b for a, b in zip(state, aim, strict=True)] for state in (*mine, aim)]
            counts.append(_count(right))
            if len(aim) == block:
                whole.append([_prefix(one) for one in right])
    means = [fmean(column) for column in zip(*counts, strict=True)] if counts else [0.0] * 4
    longest = range(max(map(len, whole), default=0))
    progress = [fmean(one[min(i, len(one) - 1)] for one in whole) / block for i in longest]
    tokens, passes, forwarded, stationary = means
    shares = [round(share, 4) for share in progress]
    return Convergence(len(counts), tokens, passes, forwarded, stationary, shares)


def _prefix(right: Sequence[bool]) -> int:
    return right.index(False) if False in right else len(right)


def _count(right: Sequence[Sequence[bool]]) -> tuple[int, int, int, int]:
    """tokens, passes, fast-forwarded and stationary ones of one block. right: by state, by token."""
    prefix = [_prefix(row) for row in right]
    gained = [max(0, after - before - 1) for before, after in pairwise(prefix)]
    settled = set()
    for j in range(1, len(right)):  # the first state is drawn: what is right there is so by chance
        stays = [all(row[i] for row in right[j:]) for i in range(len(right[j]))]
        settled |= {i for i, stay in enumerate(stays) if stay and i > prefix[j]}
    return len(right[0]), len(right) - 1, sum(gained), len(settled)


def watch(
    model: TransformersModel, prompts: Iterable[Sequence[int]], block: int, limits: Limits
) -> list[dict[str, Any]]:
    """Greedy answers to prompts with their trajectories, all at once."""
    rows = []
    for request in answer_all(model, Recorded(block), prompts, limits):
        assert isinstance(request.drafter, Recorder)
        answer = list(request.emitted)
        answer = answer[: fresh(answer)]
        rows.append({"answer": answer, "states": states(request.drafter.blocks, answer, block)})
    return rows
