"""Plain decoding: the method that proposes nothing. Every other method must yield its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.step import Step
from ..engine.tree import Tree
from .method import DraftContext


@dataclass(frozen=True)
class Plain:
    """One row, one token per forward."""

    def drafter(self, context: DraftContext) -> PlainDrafter:
        return PlainDrafter()


class PlainDrafter:
    def propose(self, tokens: Sequence[int]) -> Tree:
        return Tree.chain(tokens[-1:])

    def observe(self, step: Step) -> None:
        pass
