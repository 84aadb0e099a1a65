"""SPEED (arXiv 2310.12072): tokens at several depths through one read of shared layers.

A looped model reads a token out after every pass through its layers. The pick after the first pass is mostly
that of the full depth already, so the next token starts on its way at once: each step (a stage) takes all
rows under way one pass further, the oldest one at full depth is the text's, and in the best case each stage
yields a token where plain decoding needs all passes.

After every stage the row's new pick is compared with the token that stands behind it. Where they disagree,
that token and all behind it are flushed, and the new pick starts instead (`revise`, as published); or, with
`second`, both stay and the full depth decides (LoopSpec, arXiv 2609.17184, has a second proposal too). Picks
include the noise of their position, so sampling drafts like greedy decoding. What enters the text is the pick
at full depth alone: the engine's walk sees to that.

Two rates say how a pipeline fares: how often the pick after each pass is the final one (`readouts`), and how
many of the tokens that started on such a pick came to be text; the others were flushed (`sources`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, ClassVar

from annotated_types import Ge, Le

from ..engine.step import Step
from ..engine.tree import Tree, matches
from .acceptance import DraftCount
from .method import Cost, DraftContext, Drafter, Loops

CHOSEN = 32  # stages after which the spawn depth is chosen anew
WEIGHT = 20.0  # tokens that the measured agreement counts for


@dataclass(frozen=True)
class Speed:
    """spawn: passes after which a token's pick starts on its way; 0: chosen by what was measured, of the
    model and on the way. revise: flush at the first disagreement; without it only the full depth decides.
    second: keep a second proposal beside the first instead of flushing. gate: least share of a pick that
    starts in the softmax of the scores, noise included. block: rows under way, at most."""

    early: ClassVar[bool] = True
    spawn: Annotated[int, Ge(0)] = 0
    revise: bool = True
    second: bool = False
    gate: Annotated[float, Ge(0), Le(1)] = 0.0
    block: Annotated[int, Ge(1)] = 64

    def drafter(self, context: DraftContext) -> Drafter:
        assert context.loops is not None, "the engine lets no other model come so far"
        return SpeedDrafter(self, Depth(context.loops, context.cost, self.spawn), context.temperature)


class Depth:
    """After how many passes a token's pick starts on its way. fixed: so many; 0 chooses.

    Where the pick after d passes is the final one with probability a(d), the next token starts after d
    stages, or after the g > d at which the pick becomes right: d a(d) + sum of g (a(g) - a(g - 1)) stages a
    token. A stage is taken to cost what a forward of its rows would, about loops / d of them; it costs
    rather less (docs/LOG.md). The least product is taken."""

    def __init__(self, loops: Loops, cost: Cost, fixed: int) -> None:
        self.loops, self.cost = loops.count, cost
        known = list(loops.agreement) or [1.0] * loops.count  # the first pass, until something is known
        weight = WEIGHT if loops.agreement else 1.0
        self.right = [weight * share for share in known]
        self.seen = weight
        self.read = [DraftCount() for _ in range(loops.count)]  # by pass, of this text alone
        self.steps = 0
        self.fixed = min(fixed, loops.count)
        self.spawn = self.fixed or self.choose()

    def learn(self, heard: Sequence[int]) -> None:
        """The picks of a row after each of its passes, the last being that of the full depth."""
        self.seen += 1
        for i, pick in enumerate(heard):
            self.right[i] += pick == heard[-1]
        if len(heard) == self.loops:  # else some of its stages were not heard of
            self.read = [
                count + DraftCount(1, int(pick == heard[-1]))
                for count, pick in zip(self.read, heard, strict=True)
            ]

    def count(self) -> None:
        """A stage has passed."""
        self.steps += 1
        if not self.fixed and self.steps % CHOSEN == 0:
            self.spawn = self.choose()

    def choose(self) -> int:
        agreed = [min(1.0, right / self.seen) for right in self.right]
        gained = [max(0.0, b - a) for a, b in pairwise(agreed)]  # by passes, from the second on
        time = {}
        for spawn in range(1, self.loops + 1):
            later = sum(passes * gain for passes, gain in enumerate(gained[spawn - 1 :], start=spawn + 1))
            time[spawn] = (spawn * agreed[spawn - 1] + later) * self.cost(-(-self.loops // spawn))
        return min(time, key=lambda spawn: time[spawn])


@dataclass
class SpeedDrafter:
    """grown: the tree to propose next, its rows in flight first. heard: by its rows, their picks so far.
    started: by its rows, after which pass of the row before they started; 0 for a row that did not start on
    a pick. counts: tokens that started after each pass, as soon as it is known what became of them."""

    options: Speed
    depth: Depth
    temperature: float = 0.0
    grown: Tree | None = None
    heard: list[list[int]] = field(default_factory=lambda: [[]])
    started: list[int] = field(default_factory=lambda: [0])
    counts: defaultdict[int, DraftCount] = field(default_factory=lambda: defaultdict(DraftCount))

    @property
    def sources(self) -> Mapping[str, DraftCount]:
        return {f"pass {after}": self.counts[after] for after in sorted(self.counts)}

    @property
    def readouts(self) -> Mapping[str, DraftCount]:
        return {f"pass {i}": count for i, count in enumerate(self.depth.read[:-1], start=1)}

    def propose(self, tokens: Sequence[int]) -> Tree:
        if self.grown is None or self.grown.tokens[0] != tokens[-1]:  # or a stage was not heard of
            self.grown, self.heard, self.started = Tree.chain(tokens[-1:]), [[]], [0]
        return self.grown

    def observe(self, step: Step) -> None:
        self._hear(step)
        self.depth.count()
        if not step.in_flight:
            self._settle(step, [])
            self.grown = None
            return
        kept, spawned = self._revised(step)
        self._settle(step, kept)
        new = {row: i for i, row in enumerate(kept)}
        tokens = [*(step.tree.tokens[row] for row in kept), *(token for _, token in spawned)]
        parents = [new.get(step.tree.parents[row], -1) for row in kept] + [new[row] for row, _ in spawned]
        self.grown = Tree(tuple(tokens), tuple(parents))
        self.started = [
            *(self.started[row] for row in kept),
            *(len(self.heard[row]) for row, _ in spawned),
        ]
        self.heard = [*(self.heard[row] for row in kept), *([] for _ in spawned)]

    def _settle(self, step: Step, kept: Sequence[int]) -> None:
        """Count the tokens that became text, and those that were flushed. kept: rows that stay in flight."""
        accepted = {*step.path[1:], *(step.in_flight[:1] if step.path else ())}
        for row in range(1, len(step.tree)):
            if self.started[row] and (row in accepted or row not in kept):
                self.counts[self.started[row]] += DraftCount(1, int(row in accepted))

    def _hear(self, step: Step) -> None:
        """Note the picks of this stage, and compare those of tokens that are through with their last."""
        assert self.grown is not None
        if step.tree != self.grown:  # rows were left out, or text that a grammar forces was added
            same, rows = matches(step.tree, self.grown), range(len(step.tree))
            self.heard = [self.heard[same[row]] if row in same else [] for row in rows]
            self.started = [self.started[same[row]] if row in same else 0 for row in rows]
        for own, pick in zip(self.heard, step.picks, strict=True):
            own.append(pick)
        for row in step.path:
            self.depth.learn(self.heard[row])

    def _revised(self, step: Step) -> tuple[list[int], list[tuple[int, int]]]:
        """Rows that stay in flight; and those that start, each as the row it stands behind and its token."""
        tree, options = step.tree, self.options
        sure = self._sure(step)
        behind: dict[int, list[int]] = {row: [] for row in step.in_flight}
        for row in step.in_flight[1:]:
            behind[tree.parents[row]].append(row)
        kept, spawned, left = [], [], {step.in_flight[0]}
        for row in step.in_flight:
            if row not in left:
                continue
            kept.append(row)
            ready = len(self.heard[row]) >= self.depth.spawn and sure[row]
            new = ready and tree.child(row, step.picks[row]) not in behind[row]
            if new and behind[row] and options.second:
                new = len(behind[row]) < 2
            elif new and behind[row]:
                new = options.revise
                behind[row] = [] if new else behind[row]
            left.update(behind[row])
            if new:
                spawned.append((row, step.picks[row]))
        return kept, spawned[: max(0, options.block - len(kept))]

    def _sure(self, step: Step) -> list[bool]:
        """By row, is its pick likely enough to start?"""
        if not self.options.gate:
            return [True] * len(step.tree)
        likeliest = (step.scores / (self.temperature or 1.0)).softmax(-1).amax(-1)
        return (likeliest >= self.options.gate).tolist()
