"""From rows of prompt and answer to batches for a student: text, anchors, labels.

An anchor is a row of the text with a group of masks under it: the last row of the prompt or a row of the
answer, from which decoding could continue. Its masks learn the tokens two and more places after it.

Anchors are drawn each time a sequence is used. Each use is an item of its own (`Draws`), whose number keys
the draw, so a run that was interrupted draws the same anchors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .student import IGNORED

STRIDE = 32  # see `Batches.stride`


class Draws(Dataset[Any]):
    """Rows repeated in turn for `count` uses; "draw" is the number of the use, which depends on the seed."""

    def __init__(self, rows: Any, count: int, seed: int = 0) -> None:
        self.rows, self.count, self.first = rows, count, seed * 1_000_003 % 2**32

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, use: int) -> dict[str, Any]:
        return {**self.rows[use % len(self.rows)], "draw": self.first + use}


@dataclass(frozen=True)
class Batches:
    """A data collator: ids [rows, width], anchors [rows, anchors], labels [rows, anchors, masks]."""

    # Maximum tokens of a text.
    length: int
    # Anchors per sequence: drawn by the row's "draw", evenly spread without one.
    anchors: int
    # Masks per anchor.
    masks: int
    # Texts are padded to a multiple of it.
    stride: int = STRIDE

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        texts = [self.cut(row["prompt"], row["answer"]) for row in rows]
        width = -(-max(len(text) for text, _ in texts) // self.stride) * self.stride
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        anchors, labels = [], []
        draws = [row.get("draw") for row in rows]
        for row, (text, start), draw in zip(ids, texts, draws, strict=True):
            row[: len(text)] = torch.tensor(text)
            where, known = self._anchors(start, len(text), draw)
            places = where[:, None] + 2 + torch.arange(self.masks)
            targets = row[places.clamp(max=width - 1)].masked_fill(places >= len(text), IGNORED)
            anchors.append(where)
            labels.append(targets.masked_fill(~known[:, None], IGNORED))
        return {"ids": ids, "anchors": torch.stack(anchors), "labels": torch.stack(labels)}

    def cut(self, prompt: Sequence[int], answer: Sequence[int]) -> tuple[Sequence[int], int]:
        """The text, and its first row that may be an anchor. Of a long prompt the end is kept."""
        whole = [*prompt, *answer]
        start = max(0, min(len(prompt) - self.length // 2, len(whole) - self.length))
        text = whole[start : start + self.length]
        return text, max(0, len(prompt) - 1 - start)

    def _anchors(self, start: int, length: int, draw: int | None) -> tuple[Tensor, Tensor]:
        """Anchor rows, and which of them are used; the others only fill the tensor."""
        room = max(0, length - 2 - start)  # an anchor needs the token two places after it
        count = min(room, self.anchors)
        if draw is None:
            chosen = start + torch.arange(count) * room // max(1, count)
        else:
            chosen = start + torch.randperm(room, generator=_dice(draw))[:count].sort().values
        idle = torch.zeros(self.anchors - count, dtype=torch.long)
        known = torch.arange(self.anchors) < count
        return torch.cat([chosen, idle]), known


def _dice(draw: int) -> torch.Generator:
    return torch.Generator().manual_seed(draw)
