"""From trees to what a forward takes: ids, positions, what each row sees.

One layout for all forwards, of decoding and of training, so that they cannot drift apart. Ids at or above
the vocabulary are an adapter's: such a row carries any ordinary id, its embedding comes from the adapter
(`adapter`), and it alone sees the slots of a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.tree import Tree


@dataclass(frozen=True)
class Layout:
    """ids, positions: [lanes, width]. seen: the additive mask, [lanes, 1, width, slots]. masks: which mask
    token each row carries, [lanes, width], -1 for none; None where no row does."""

    ids: Tensor
    positions: Tensor
    seen: Tensor
    masks: Tensor | None

    def rows(self, start: int, stop: int) -> Tensor | None:
        """`masks` of these rows; None where none of them carries one."""
        if self.masks is None:
            return None
        part = self.masks[:, start:stop]
        return part if bool((part >= 0).any()) else None


def layout(
    trees: Sequence[Tree],
    lengths: Sequence[int],
    width: int,
    slots: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    fixed: int = 0,
) -> Layout:
    """One tree per lane, each behind a history of `lengths` tokens, which follows `fixed` slots of a prefix.

    Rows beyond a tree's own, up to `width`, repeat its row 0.
    """
    ids, positions = [], []
    seen = torch.full((len(trees), 1, width, slots), torch.finfo(dtype).min, dtype=dtype)
    for tree, length, see in zip(trees, lengths, seen[:, 0], strict=True):
        rows, start = len(tree), fixed + length
        pads = width - rows
        ids.append([*tree.tokens, *tree.tokens[:1] * pads])
        positions.append([*(length + depth for depth in tree.depth), *[length] * pads])
        see[:, fixed : start + 1] = 0
        if rows > 1:
            see[:rows, start : start + rows].masked_fill_(tree.visible, 0)
    masks = None
    made = torch.tensor(ids)
    if any(tree.tokens[-1] >= vocabulary for tree in trees):  # mask tokens stand behind the others
        masks = (made - vocabulary).clamp_(min=-1)
        made = made.masked_fill(masks >= 0, 0)
        seen[..., :fixed].masked_fill_((masks >= 0)[:, None, :, None], 0)
        masks = masks.to(device)
    return Layout(made.to(device), torch.tensor(positions, device=device), seen.to(device), masks)
