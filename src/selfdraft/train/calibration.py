"""Calibration: how often an adapter's candidates are accepted, counted on held-out sequences.

The counts by offset and rank are for the card; those by offset and hazard are for the drafter (`mask_tree`),
which uses the probabilities of the candidates at hand. Candidates are predicted as in decoding: a sampler
head sees the model's own pick at the first mask, and at the others the likeliest candidate of the mask
before. A candidate counts for the drafter only where it would stand in the tree and the walk would reach it:
where the likeliest candidates before it were right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..drafting import mask_tree
from ..drafting.jacobi import RATES, JacobiDrafter
from ..drafting.mask_tree import FIRST_ONWARD, HAZARDS, ODDS, ONWARD, WIDTH, Candidate
from ..drafting.method import DraftContext, Drafter, free
from ..models.transformers import TransformersModel
from ..params import SamplingParams
from .student import IGNORED, Student
from .tuning_cost import answer_all

PRIOR_WEIGHT = 20.0  # observations that the prior of a kind counts for
BLOCK = 16  # rows of the window in which candidates are counted
DRAFTED = 2  # candidates per offset that a tree is assumed to hold when the value of masks is counted


@dataclass
class Counts:
    """Counts of one offset, as pairs of accepted and proposed."""

    # By rank.
    ranks: list[list[float]] = field(default_factory=lambda: [[0.0, 0.0] for _ in range(WIDTH)])
    # By class of hazard.
    kinds: list[list[float]] = field(default_factory=lambda: [[0.0, 0.0] for _ in range(len(HAZARDS) + 1)])
    # Walks that passed this offset, and walks that reached it.
    onward: list[float] = field(default_factory=lambda: [0.0, 0.0])


@dataclass(frozen=True)
class Calibration:
    """What calibration found."""

    # By offset and rank: how often the candidate of that rank is the next token.
    accuracy: Sequence[Sequence[float]]
    # Acceptance rates for the drafter; see `Lookahead`.
    odds: Mapping[str, Sequence[Sequence[float]]]


@torch.no_grad()
def calibrate(student: Student, batches: Iterable[Mapping[str, Tensor]]) -> Calibration:
    """Count over batches whose labels are the model's own answers."""
    offsets = [Counts() for _ in range(student.adapter.config.masks)]
    ids = student.adapter.vocabulary
    vocabulary = None if ids is None else ids.tolist()
    for batch in batches:
        scores = student.as_decoded(batch["ids"], batch["anchors"])
        labels = batch["labels"].flatten(0, 1)
        for mine, came in zip(scores.split(len(offsets)), labels.tolist(), strict=True):
            if came[0] != IGNORED:
                _count(offsets, mask_tree.candidates(mine, vocabulary), came)
    accuracy = [[won / max(1.0, made) for won, made in counts.ranks] for counts in offsets]
    odds = [
        [
            (won + PRIOR_WEIGHT * mask_tree.TRUST * middle) / (made + PRIOR_WEIGHT)
            for (won, made), middle in zip(counts.kinds, mask_tree.hazard_middles(), strict=True)
        ]
        for counts in offsets
    ]
    walks = [counts.onward for counts in offsets]
    onward = [(on + FIRST_ONWARD * PRIOR_WEIGHT) / (all_ + PRIOR_WEIGHT) for on, all_ in walks]
    return Calibration(accuracy, {ODDS: odds, ONWARD: [onward]})


def frequent_ids(rows: Iterable[Mapping[str, Any]], most: int, vocabulary: int) -> Tensor | None:
    """The ids that masks shall predict, int32: the most frequent of the rows' texts, then the lowest, which
    byte-pair encodings merge first. None, for all, where `most` is 0 or not below the vocabulary's size."""
    if not 0 < most < vocabulary:
        return None
    counts = torch.zeros(vocabulary, dtype=torch.long)
    for row in rows:
        counts += torch.tensor([*row["prompt"], *row["answer"]]).bincount(minlength=vocabulary)
    return counts.argsort(descending=True, stable=True)[:most].sort().values.int()


@dataclass
class FreeRows:
    """Jacobi decoding with long windows, because its rows cost nothing. Keeps its drafters to read their
    counts."""

    drafters: list[JacobiDrafter] = field(default_factory=list)

    def drafter(self, context: DraftContext) -> Drafter:
        made = JacobiDrafter(BLOCK, replace(context, cost=free))
        self.drafters.append(made)
        return made


def window_acceptance(
    model: TransformersModel, prompts: Iterable[Sequence[int]], params: SamplingParams
) -> Mapping[str, Sequence[Sequence[float]]]:
    """The acceptance rate of a tuned model's window by distance: the mean over greedy answers.

    See `Lookahead`.
    """
    method = FreeRows()
    answer_all(model, method, prompts, params)
    tables = [drafter.window.learned for drafter in method.drafters]
    return {RATES: [[round(fmean(column), 4) for column in zip(*tables, strict=True)]]} if tables else {}


def _count(offsets: Sequence[Counts], proposed: Sequence[Sequence[Candidate]], came: Sequence[int]) -> None:
    """Add the candidates of one anchor. came: the tokens that followed it."""
    trunk = walks = True
    for counts, offered, token in zip(offsets, proposed, came, strict=True):
        if token == IGNORED:
            return
        tokens = [candidate.token for candidate in offered]
        if walks:
            walks = trunk and token in tokens[:DRAFTED]
            counts.onward[0] += walks
            counts.onward[1] += 1
        for rank, candidate in enumerate(offered):
            counts.ranks[rank][0] += candidate.token == token
            counts.ranks[rank][1] += 1
        for candidate in offered if trunk else ():
            counts.kinds[candidate.kind][0] += candidate.token == token
            counts.kinds[candidate.kind][1] += 1
            if candidate.token == token:
                break
        trunk = trunk and token == tokens[0]
