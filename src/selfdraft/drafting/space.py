"""SPACE (arXiv 2402.11809): mask tokens draft and verify in one pass.

The published method tunes all weights: `space-tuned`, whose text is that of the tuned model. In `space` what
is tuned is a LoRA that works on the rows of mask tokens alone (Samragh et al., 2507.11851), so the text is
the base model's. Both draft alike; what differs is the adapter. By default the tree is sparse and grown from
how sure the guesses are (`mask_tree`).

`faithful` draws it up as published: one candidate per mask, one under the other, and a whole group of masks
under every row, so that wherever the walk ends the next candidates are at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from .mask_tree import FixedDrafter, GroupDrafter, lookahead
from .method import DraftContext, Drafter


@dataclass(frozen=True)
class Space:
    """block: rows a step may have. faithful: draft as published."""

    adapted: ClassVar[bool] = True
    label: ClassVar[str] = "space"
    block: Annotated[int, Ge(1)] = 64
    faithful: bool = False

    def drafter(self, context: DraftContext) -> Drafter:
        look = lookahead(context, self.label)
        if self.faithful:
            return FixedDrafter(look, [(offset, offset, 0) for offset in range(len(look.ids))])
        return GroupDrafter(look, context.cost, self.block, context.mask_cost)


@dataclass(frozen=True)
class SpaceTuned(Space):
    """The same with an adapter that tunes the model. block: rows a step may have. faithful: draft as
    published."""

    label: ClassVar[str] = "space-tuned"
