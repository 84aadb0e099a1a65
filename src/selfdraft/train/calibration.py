"""How good an adapter's guesses are: counted on held-out sequences.

By offset and rank, for people; by offset and hazard, for the drafter (`groups`), which goes by how sure the
guesses are at a place. A guess counts where the walk would come to it: where the guesses before it, of some
rank, were right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from torch import Tensor

from ..drafting import mask_tree
from ..drafting.jacobi import RATES, JacobiDrafter
from ..drafting.mask_tree import FIRST_ONWARD, HAZARDS, ODDS, ONWARD, WIDTH, Candidate
from ..drafting.method import DraftContext, Drafter, free
from ..engine.request import Limits
from ..models.transformers import TransformersModel
from .student import IGNORED, Student
from .tuning_cost import answer_all

LEAST = 20.0  # outcomes that the untrained odds of a kind count for
BLOCK = 16  # rows of a window that guesses are counted in
DRAFTED = 2  # candidates per offset that a tree is taken to hold where the masks' worth is counted


@dataclass
class Counts:
    """Of one offset. ranks, kinds: won and made, by rank and by hazard. onward: walks that went
    on through this offset, and that came to it."""

    ranks: list[list[float]] = field(default_factory=lambda: [[0.0, 0.0] for _ in range(WIDTH)])
    kinds: list[list[float]] = field(default_factory=lambda: [[0.0, 0.0] for _ in range(len(HAZARDS) + 1)])
    onward: list[float] = field(default_factory=lambda: [0.0, 0.0])


@dataclass(frozen=True)
class Calibration:
    """accuracy: by offset and rank, how often the guess of that rank is the token that came. odds: see
    `Lookahead`."""

    accuracy: Sequence[Sequence[float]]
    odds: Mapping[str, Sequence[Sequence[float]]]


@torch.no_grad()
def calibrate(student: Student, batches: Iterable[Mapping[str, Tensor]]) -> Calibration:
    """Count over some batches, whose labels are what the model said itself."""
    offsets = [Counts() for _ in range(student.adapter.config.masks)]
    for batch in batches:
        scores, _ = student.scores(batch["ids"], batch["anchors"])
        labels = batch["labels"].flatten(0, 1)
        for mine, told in zip(scores.split(len(offsets)), labels.tolist(), strict=True):
            if told[0] != IGNORED:
                _count(offsets, mask_tree.candidates(mine), told)
    accuracy = [[won / max(1.0, made) for won, made in counts.ranks] for counts in offsets]
    odds = [
        [
            (won + LEAST * mask_tree.TRUST * middle) / (made + LEAST)
            for (won, made), middle in zip(counts.kinds, mask_tree.hazard_middles(), strict=True)
        ]
        for counts in offsets
    ]
    walks = [counts.onward for counts in offsets]
    onward = [(on + FIRST_ONWARD * LEAST) / (came + LEAST) for on, came in walks]
    return Calibration(accuracy, {ODDS: odds, ONWARD: [onward]})


@dataclass
class Unpriced:
    """Jacobi decoding whose rows cost nothing, so that its windows are long. drafters: all there were."""

    drafters: list[JacobiDrafter] = field(default_factory=list)

    def drafter(self, context: DraftContext) -> Drafter:
        made = JacobiDrafter(BLOCK, replace(context, cost=free))
        self.drafters.append(made)
        return made


def ahead(
    model: TransformersModel, prompts: Iterable[Sequence[int]], limits: Limits
) -> Mapping[str, Sequence[Sequence[float]]]:
    """How often the guesses of a tuned model come true, by how far ahead they stand: the mean over greedy
    answers. See `Lookahead`."""
    method = Unpriced()
    answer_all(model, method, prompts, limits)
    tables = [[drafter.rates[far] for far in range(len(drafter.rates.counts))] for drafter in method.drafters]
    return {RATES: [[round(fmean(column), 4) for column in zip(*tables, strict=True)]]} if tables else {}


def _count(offsets: Sequence[Counts], guessed: Sequence[Sequence[Candidate]], told: Sequence[int]) -> None:
    """One anchor. told: the tokens that came."""
    walked = runs = True
    for counts, offered, token in zip(offsets, guessed, told, strict=True):
        if token == IGNORED:
            return
        tokens = [guess.token for guess in offered]
        if runs:
            runs = token in tokens[:DRAFTED]
            counts.onward[0] += runs
            counts.onward[1] += 1
        for rank, guess in enumerate(offered):
            counts.ranks[rank][0] += guess.token == token
            counts.ranks[rank][1] += 1
        for guess in offered if walked else ():
            counts.kinds[guess.kind][0] += guess.token == token
            counts.kinds[guess.kind][1] += 1
            if guess.token == token:
                break
        walked = walked and token in tokens
