"""Faults to plant, each in one place; what they break must be seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from selfdraft import Sampler, Tree, session
from selfdraft.cache import Lanes
from selfdraft.draw import Draw
from selfdraft.models.hf import HfModel
from selfdraft.noise import Noise

Patch = Callable[[pytest.MonkeyPatch], None]


def tree_mask(patch: pytest.MonkeyPatch) -> None:
    """Rows see their elder siblings."""
    patch.setattr(Tree, "visible", property(lambda tree: torch.ones(len(tree), len(tree)).tril().bool()))


def rows_kept(patch: pytest.MonkeyPatch) -> None:
    """Accepted rows are not moved to the end of the history."""
    patch.setattr(Lanes, "move", lambda self, lane, path: None)


def positions(patch: pytest.MonkeyPatch) -> None:
    """Positions count rows instead of depth."""
    layout = HfModel.layout

    def shifted(self: HfModel, trees: Sequence[Tree], lengths: Sequence[int], width: int, *rest: Any) -> Any:
        laid = layout(self, trees, lengths, width, *rest)
        return replace(laid, positions=torch.arange(width)[None] + torch.tensor(lengths)[:, None])

    patch.setattr(HfModel, "layout", shifted)


def noise_key(patch: pytest.MonkeyPatch) -> None:
    """Noise drawn in call order."""
    at = Noise.at

    def in_call_order(self: Noise, positions: Sequence[int], *rest: Any) -> torch.Tensor:
        start = getattr(self, "drawn", positions[0])  # one row a step: the positions themselves
        self.drawn = start + len(positions)  # type: ignore[attr-defined]
        return at(self, range(start, start + len(positions)), *rest)

    patch.setattr(Noise, "at", in_call_order)


def eos_cut(patch: pytest.MonkeyPatch) -> None:
    """The end of text is looked for in the last emitted token alone."""
    patch.setattr(session, "first_end", lambda tokens, eos: len(tokens) - 1 if tokens[-1] in eos else None)


def filters(patch: pytest.MonkeyPatch) -> None:
    """Filters are skipped where several rows are scored at once."""
    keep = Sampler._filter
    patch.setattr(Sampler, "_filter", lambda self, logits: logits if len(logits) > 1 else keep(self, logits))


def penalties(patch: pytest.MonkeyPatch) -> None:
    """Penalties count the text, but not a row's ancestors in the tree."""
    patch.setattr(Draw, "_before", lambda self, tails: (self._counts[None], self._seen[None]))


FAULTS = [tree_mask, rows_kept, positions, noise_key, eos_cut, filters, penalties]
