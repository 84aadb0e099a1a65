"""BiTA (arXiv 2401.12522): a frozen model drafts a tree in the pass that verifies the last one.

Mask tokens behind a row guess the tokens after the next one; they see a soft prefix that no other row sees
(section 3). By default the tree is sparse and grown from how sure the guesses are (`mask_tree`).

`faithful` draws it up as published, the same shape at every step, `width` candidates per offset and a
whole group of masks under every row. Only the first guess of an offset has others under it, save in
`full`: "upper-triangle" has one candidate less at each offset, "half" as many at each, "full" all
combinations. The published code has neither a cache nor sampling for it; here it has both, and the first
step, which has no guesses yet, runs one group alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from .mask_tree import FixedDrafter, GroupDrafter, lookahead
from .method import DraftContext, Drafter


@dataclass(frozen=True)
class Bita:
    """block: rows a step may have. faithful: draft as published, by `tree` with `width` candidates (K)."""

    adapted: ClassVar[bool] = True
    block: Annotated[int, Ge(1)] = 64
    faithful: bool = False
    tree: Literal["upper-triangle", "half", "full"] = "upper-triangle"
    width: Annotated[int, Ge(1)] = 5

    def drafter(self, context: DraftContext) -> Drafter:
        look = lookahead(context, "bita")
        if self.faithful:
            return FixedDrafter(look, self._nodes(len(look.ids)))
        return GroupDrafter(look, context.cost, self.block, context.mask_cost)

    def _nodes(self, masks: int) -> list[tuple[int, int, int]]:
        nodes: list[tuple[int, int, int]] = []
        above = [0]  # rows that have candidates under them
        for offset in range(masks):
            width = max(1, self.width - offset) if self.tree == "upper-triangle" else self.width
            first = len(nodes) + 1
            nodes += [(parent, offset, rank) for parent in above for rank in range(width)]
            above = list(range(first, len(nodes) + 1)) if self.tree == "full" else [first]
        return nodes
