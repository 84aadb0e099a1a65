"""Jacobi trajectories: the states of blocks while they converge to the model's answer. Consistency training
learns to skip steps of them (CLLM, arXiv 2403.00835, section 3.3.1).

An answer is decoded in blocks of n tokens. The first state of a block is drawn from the tokens of the text so
far. Each forward pass maps a state to the next one, the picks after its tokens, until the block is the
model's own text. The states are recorded while the engine decodes by `jacobi` as published, with its KV cache
and in batches: the correct prefix of a block is committed, and the rest of the block together with that
prefix is the state that a pass over the whole text would give. A row is an answer as `selfdraft distill`
writes it, with its states. Where memory for keys and values is short a pass may run a part of a block; the
tokens that it does not replace stay in the state.

An end of text inside a block cuts all states of the block there. Answers that repeat themselves are cut where
they begin to; an answer that has less than a block left, or is one token repeated, is counted as degenerate
and has no states.
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
from ..drafting.blocks import BlockDrafter
from ..drafting.method import DraftContext, Drafter
from ..engine.request import Request
from ..engine.scheduler import Limits
from ..engine.step import Step
from ..engine.tree import MAX_DRAFT, Tree
from ..errors import InvalidOption
from ..models.transformers import TransformersModel
from ..params import SamplingParams
from .distill import Distillation, Progress
from .shards import DEGENERATE, Row
from .tuning_cost import answer_all

State = Sequence[int]
MAX_EQUAL = 10  # equal tokens in a row that make an answer degenerate, as published


@dataclass(frozen=True)
class Recorded:
    """A method: Jacobi decoding as published, which records its states."""

    # Tokens of a block (n).
    block: Annotated[int, Ge(2)] = 16

    def __post_init__(self) -> None:
        if self.block > MAX_DRAFT:
            raise InvalidOption(
                f"block={self.block}: a draft has at most {MAX_DRAFT} rows; give a smaller block, such as 16",
                option="block",
            )

    def drafter(self, context: DraftContext) -> Drafter:
        return Recorder(self.block, context)

    def limits(self, requests: int) -> Limits:
        """Of an engine with rows enough for the blocks of so many requests."""
        return Limits(max_rows=max(Limits.max_rows, requests * self.block))


class Recorder:
    """The drafter of `Recorded`."""

    def __init__(self, block: int, context: DraftContext) -> None:
        filler = context.lookahead.filler if context.lookahead is not None else None
        self.inner = BlockDrafter(block, random.Random(context.seed), filler)
        self.dice = random.Random(f"{context.seed} last")  # so that `inner` draws what it would draw alone
        # The states of each block: the first one is drawn, the last one is the text.
        self.blocks: list[list[State]] = []
        self.known: list[int] = []  # the correct prefix of the block

    def propose(self, tokens: Sequence[int]) -> Tree:
        begins = not self.inner.left
        tree = self.inner.propose(tokens)
        if begins:  # a pass runs the token before the block and all of its tokens but the last
            self.known = []
            unknown = tokens if self.inner.filler is None else [self.inner.filler]
            self.blocks.append([[*tree.tokens[1:], self.dice.choice(unknown)]])
        return tree

    def observe(self, step: Step) -> None:
        self.inner.observe(step)
        self.known += step.emitted
        state = [*self.known, *step.picks[len(step.path) :]]
        self.blocks[-1].append([*state, *self.blocks[-1][-1][len(state) :]])


def states(blocks: Iterable[Sequence[State]], answer: Sequence[int], block: int) -> list[list[list[int]]]:
    """The states of each block before the final text, cut where the answer ends."""
    kept = []
    for start, recorded in zip(range(0, len(answer), block), blocks, strict=False):
        aim = answer[start : start + block]
        short = [list(state[: len(aim)]) for state in recorded]
        kept.append([state for state in short if state != aim])
    return kept


def augmented(block: Sequence[State], aim: State, dice: random.Random) -> list[list[int]]:
    """States with up to half of their wrong tokens corrected, but not the first wrong one; the state before
    the text stays. So training sees states that decoding does not pass through."""
    made = [list(state) for state in block]
    for state in made[:-1]:
        wrong = [i for i, (a, b) in enumerate(zip(state, aim, strict=True)) if a != b][1:]
        for i in dice.sample(wrong, dice.randint(0, len(wrong) // 2)):
            state[i] = aim[i]
    return made


@dataclass
class Recording(Distillation):
    """A distillation whose method is `Recorded`."""

    # See `augmented`.
    augment: bool = False

    @property
    def _method(self) -> Recorded:
        assert isinstance(self.llm.method, Recorded)
        return self.llm.method

    @property
    def _limits(self) -> Limits:
        return self._method.limits(self.batch)

    def _row(self, index: int, request: Request) -> Row:
        row = super()._row(index, request)
        recorder, method = request.drafter, self._method
        assert isinstance(recorder, Recorder)
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
    """True if there is nothing to learn: one token ten times, or repetition within the first block."""
    if row.finish_reason == "loop" and len(row.answer) < block:
        return True
    return any(len(list(same)) >= MAX_EQUAL for _, same in groupby(row.answer))


@dataclass(frozen=True)
class Convergence:
    """Convergence of blocks (paper, section 4.3); the figures are means per block."""

    blocks: int
    # Tokens of a block; the last block of an answer may be shorter.
    tokens: float
    # Forward passes from the first state to the text.
    passes: float
    # Tokens that the correct prefix gained in a pass beyond one.
    fast_forwarded: float
    # Tokens that were correct after a wrong one, and stayed so.
    stationary: float
    # Share of a whole block that is correct up to the first wrong token, after 0, 1, ... passes.
    progress: Sequence[float]


def convergence(rows: Iterable[Mapping[str, Any]], block: int) -> Convergence:
    """Count over rows with `answer` and `states`."""
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
    """Tokens, passes, fast-forwarded and stationary tokens of one block. right: by state and token."""
    prefix = [_prefix(row) for row in right]
    gained = [max(0, after - before - 1) for before, after in pairwise(prefix)]
    settled = set()
    for j in range(1, len(right)):  # the first state is drawn: tokens are correct there by chance
        stays = [all(row[i] for row in right[j:]) for i in range(len(right[j]))]
        settled |= {i for i, stay in enumerate(stays) if stay and i > prefix[j]}
    return len(right[0]), len(right) - 1, sum(gained), len(settled)


def watch(
    model: TransformersModel, prompts: Iterable[Sequence[int]], block: int, params: SamplingParams
) -> list[dict[str, Any]]:
    """Greedy answers to prompts with their trajectories, decoded as one batch."""
    rows, method, asked = [], Recorded(block), list(prompts)
    for request in answer_all(model, method, asked, params, method.limits(len(asked))):
        assert isinstance(request.drafter, Recorder)
        answer = list(request.emitted)
        answer = answer[: fresh(answer)]
        rows.append({"answer": answer, "states": states(request.drafter.blocks, answer, block)})
    return rows
