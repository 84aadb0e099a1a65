"""LLMA (arXiv 2304.04487): copy spans from reference text and verify them in one pass.

The end of the text is looked up in the references, the prompt and the text so far, and what followed there is
drafted as a tree, the longest matches first. How likely a copied token is right is learned by the length of
its context (including tokens already copied) and by whether the places agree. So the copy grows with the
match and with past success, and where nothing is likely enough to pay for its rows, nothing is drafted
(`draft_tree`). Where the engine keeps earlier answers (`answers`), copies are taken from them, too: the
paper's cache-assisted generation.

`faithful` is the method as published: when the last tokens generated occur in a reference, propose the tokens
that follow there. The longest match counts, its first occurrence is taken, references in the order given.
Only generated tokens trigger, so the first step drafts nothing. The published code rebuilds the n-grams of
the whole output at every step; this one indexes the references once. Without references the prompt serves as
one: the paper's multi-turn setting. Earlier answers are copied from only if they are given as references.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from ..engine.step import Step
from ..engine.tree import Tree
from ..errors import InvalidOption
from .acceptance import AcceptanceStats
from .draft_tree import DraftTreeBuilder, TreeDrafter
from .method import DraftContext, Drafter, drawn_noise
from .ngrams import PRIOR, copies


@dataclass(frozen=True)
class Llma:
    """Copy from references, the prompt and the text so far."""

    # Rows of a step, at most, the last token's own included (k). None: 64, or 20 if faithful.
    block: Annotated[int, Ge(1)] | None = None
    trigger: Annotated[int, Ge(1)] = 1  # the shortest match that drafts (n)
    faithful: bool = False  # draft as published
    match: Annotated[int, Ge(1)] = 5  # if faithful, the longest match looked up

    def __post_init__(self) -> None:
        if self.faithful and self.trigger > self.match:
            raise InvalidOption(
                f"trigger ({self.trigger}) is above match ({self.match}): nothing would match"
            )

    def drafter(self, context: DraftContext) -> Drafter:
        if self.faithful:
            return FaithfulDrafter(self, context)
        source, noise = copies(context, self.trigger), drawn_noise(context)
        rates = AcceptanceStats(PRIOR)
        return TreeDrafter(DraftTreeBuilder(source, rates, context.cost, noise, self.block or 64))


class FaithfulDrafter:
    def __init__(self, options: Llma, context: DraftContext) -> None:
        self.shortest, self.longest = options.trigger, options.match
        self.block = options.block or 20
        self.references = context.references or [context.prompt]
        self.start = len(context.prompt)
        self.index = self._read()

    def propose(self, tokens: Sequence[int]) -> Tree:
        return Tree.chain([tokens[-1], *self._copy(tokens)])

    def observe(self, step: Step) -> None:
        pass

    def _copy(self, tokens: Sequence[int]) -> Sequence[int]:
        longest = min(self.longest, len(tokens) - self.start)
        for length in range(longest, self.shortest - 1, -1):
            found = self.index.get(tuple(tokens[-length:]))
            if found is not None:
                which, end = found
                return self.references[which][end : end + self.block - 1]
        return []

    def _read(self) -> dict[tuple[int, ...], tuple[int, int]]:
        """Each n-gram of the references -> the reference and the place after its first occurrence."""
        index: dict[tuple[int, ...], tuple[int, int]] = {}
        for which, reference in enumerate(self.references):
            for length in range(self.shortest, self.longest + 1):
                for end in range(length, len(reference) + 1):
                    index.setdefault(tuple(reference[end - length : end]), (which, end))
        return index
