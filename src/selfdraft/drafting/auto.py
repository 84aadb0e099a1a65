"""Everything there is to draft from, in one tree a step: the default method.

Copies from references, the prompt and the text so far, and from earlier answers if the engine keeps some
(`ngrams`), the predictions of mask tokens where the model has an adapter with some (`mask_tree`), and what
the model picked off the path earlier in this request (`jacobi`), where these picks are known anyway. A model
that was tuned for Jacobi decoding also gets its window. Each kind of candidate has an acceptance rate, which
is learned, and the tree takes the rows that yield most expected tokens per measured time (`draft_tree`).
Where nothing pays, nothing is drafted.

Rates start with what the requests before it on the same engine have learned, greedy and sampled ones apart.
Rates are all that goes from one request to another: no token of one is ever a candidate in another, unless
the engine was told to keep answers (`Limits.earlier_answers`), and then only among requests of one salt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from ..engine.step import Step
from ..engine.tree import Tree
from .draft_tree import DraftTreeBuilder, Sources, TreeDrafter
from .jacobi import SOURCE, Picks, Window, pick_rates
from .mask_tree import MaskCandidates, MaskTreeBuilder
from .method import DraftContext, Drafter, drawn_noise
from .ngrams import PRIOR, copies


@dataclass(frozen=True)
class Auto:
    """Draft from all sources that there are."""

    adaptable: ClassVar[bool] = True
    block: Annotated[int, Ge(1)] = 64  # rows of a step, at most

    def drafter(self, context: DraftContext) -> Drafter:
        return AutoDrafter(self.block, context)


class AutoDrafter(TreeDrafter):
    def __init__(self, block: int, context: DraftContext) -> None:
        look, noise = context.lookahead, drawn_noise(context)
        parts: list[Picks | MaskCandidates] = []
        self.picks: Picks | None = None
        self.window: Window | None = None
        self.masks: MaskCandidates | None = None
        tuned = look is not None and look.filler is not None
        # Off the path the picks of a greedy request are known anyway, those of a sampled one must be drawn.
        if tuned or noise is None:
            rates = pick_rates(look)
            self.picks = Picks(rates)
            parts.append(self.picks)
            if tuned and look is not None and not look.ids:
                self.window = Window(self.picks, rates, block, context)
        if look is not None and look.ids:
            self.masks = MaskCandidates(look)
            parts.append(self.masks)
        kinds = dict(PRIOR)
        for part in parts:
            kinds |= part.prior
        source = Sources(copies(context), *parts)
        given = context.acceptance.start(("auto", noise is None), kinds), context.cost, noise, block
        if look is None or self.masks is None:
            super().__init__(DraftTreeBuilder(source, *given))
        else:
            super().__init__(MaskTreeBuilder(source, self.masks, look, *given, context.mask_cost))
        self.builder.hung = SOURCE

    def propose(self, tokens: Sequence[int]) -> Tree:
        tree = super().propose(tokens)
        return tree if self.window is None else self.window.refill(tree, tokens, self.builder.budget)

    def observe(self, step: Step) -> None:
        super().observe(step)
        if self.window is not None:
            self.window.learn(step.emitted)
        if self.picks is not None:
            self.picks.remember(step)
        if self.masks is not None:
            self.masks.predict(step.mask_scores)
