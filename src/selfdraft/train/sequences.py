"""From rows of prompt and answer to batches for a student: text, anchors, labels.

An anchor is a row of the text under which a group of masks hangs, and from which decoding could go on: the
prompt's last row and the answer's rows. Its masks should tell the tokens two and more places after it.

Each time a sequence is used its anchors are drawn anew: each use is an item of its own (`Draws`), by whose
number they are drawn. So a run that was interrupted draws what it would have drawn without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .student import IGNORED

STRIDE = 32  # texts are padded to a multiple of it


class Draws(Dataset[Any]):
    """Rows for so many uses, in turn; "draw" is the number of the use. seed: other numbers."""

    def __init__(self, rows: Any, count: int, seed: int = 0) -> None:
        self.rows, self.count, self.first = rows, count, seed * 1_000_003 % 2**32

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, use: int) -> dict[str, Any]:
        return {**self.rows[use % len(self.rows)], "draw": self.first + use}


@dataclass(frozen=True)
class Batches:
    """A data collator. length: tokens of text, at most. anchors: per sequence; of a row without a "draw" they
    are spread evenly. masks: per anchor."""

    length: int
    anchors: int
    masks: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        texts = [self.cut(row["prompt"], row["answer"]) for row in rows]
        width = -(-max(len(text) for text, _ in texts) // STRIDE) * STRIDE
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        anchors, labels = [], []
        draws = [row.get("draw") for row in rows]
        for row, (text, start), draw in zip(ids, texts, draws, strict=True):
            row[: len(text)] = torch.tensor(text)
            where, known = self._anchors(start, len(text), draw)
            ahead = where[:, None] + 2 + torch.arange(self.masks)
            told = row[ahead.clamp(max=width - 1)].masked_fill(ahead >= len(text), IGNORED)
            anchors.append(where)
            labels.append(told.masked_fill(~known[:, None], IGNORED))
        return {"ids": ids, "anchors": torch.stack(anchors), "labels": torch.stack(labels)}

    def cut(self, prompt: Sequence[int], answer: Sequence[int]) -> tuple[Sequence[int], int]:
        """The text, and the row at which the first anchor may be. Of a long prompt the end is kept."""
        whole = [*prompt, *answer]
        start = max(0, min(len(prompt) - self.length // 2, len(whole) - self.length))
        text = whole[start : start + self.length]
        return text, max(0, len(prompt) - 1 - start)

    def _anchors(self, start: int, length: int, draw: int | None) -> tuple[Tensor, Tensor]:
        """Rows, and which of them count: where there are too few, the rest are idle."""
        room = max(0, length - 2 - start)  # an anchor needs the token two places after it
        count = min(room, self.anchors)
        if draw is None:
            chosen = start + torch.arange(count) * room // max(1, count)
        else:
            chosen = start + torch.randperm(room, generator=_dice(draw))[:count]
        idle = torch.zeros(self.anchors - count, dtype=torch.long)
        known = torch.arange(self.anchors) < count
        return torch.cat([chosen, idle]), known


def _dice(draw: int) -> torch.Generator:
    return torch.Generator().manual_seed(draw)
