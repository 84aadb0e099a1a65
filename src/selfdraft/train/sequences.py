"""From rows of prompt and answer to batches for a student: text, anchors, labels.

An anchor is a row of the text under which a group of masks hangs, and from which decoding could go on: the
prompt's last row and the answer's rows. Its masks should tell the tokens two and more places after it. Each
time a sequence is used its anchors are drawn anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .student import IGNORED

STRIDE = 32  # texts are padded to a multiple of it


@dataclass(frozen=True)
class Batches:
    """A data collator. length: tokens of text, at most. anchors: per sequence. masks: per anchor. fixed: the
    same anchors whenever a row is used, evenly spread."""

    length: int
    anchors: int
    masks: int
    fixed: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        texts = [self._cut(row["prompt"], row["answer"]) for row in rows]
        width = -(-max(len(text) for text, _ in texts) // STRIDE) * STRIDE
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        anchors, labels = [], []
        for row, (text, start) in zip(ids, texts, strict=True):
            row[: len(text)] = torch.tensor(text)
            where, known = self._anchors(start, len(text))
            ahead = where[:, None] + 2 + torch.arange(self.masks)
            told = row[ahead.clamp(max=width - 1)].masked_fill(ahead >= len(text), IGNORED)
            anchors.append(where)
            labels.append(told.masked_fill(~known[:, None], IGNORED))
        return {"ids": ids, "anchors": torch.stack(anchors), "labels": torch.stack(labels)}

    def _cut(self, prompt: Sequence[int], answer: Sequence[int]) -> tuple[Sequence[int], int]:
        """The text, and the row at which the first anchor may be. Of a long prompt the end is kept."""
        whole = [*prompt, *answer]
        start = max(0, min(len(prompt) - self.length // 2, len(whole) - self.length))
        text = whole[start : start + self.length]
        return text, max(0, len(prompt) - 1 - start)

    def _anchors(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Rows, and which of them count: where there are too few, the rest are idle."""
        room = max(0, length - 2 - start)  # an anchor needs the token two places after it
        count = min(room, self.anchors)
        if self.fixed:
            chosen = start + torch.arange(count) * room // max(1, count)
        else:
            chosen = start + torch.randperm(room)[:count]
        idle = torch.zeros(self.anchors - count, dtype=torch.long)
        known = torch.arange(self.anchors) < count
        return torch.cat([chosen, idle]), known
