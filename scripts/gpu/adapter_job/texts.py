"""Texts to learn from, as they are stored and as they come in batches of equal size."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfdraft.train.run import MIN_ANSWER
from selfdraft.train.sequences import Batches

STRIDE = 256  # texts are padded to a multiple of it, so that few shapes are compiled


@dataclass(frozen=True)
class Row:
    """A prompt and its answer. `row["prompt"]` is for the package's collators."""

    prompt: list[int]
    answer: list[int]
    kind: int
    held_out: bool
    temperature: float

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def save(path: Path, rows: Sequence[Row], most: int = 1 << 60) -> None:
    """Write rows, as many as have `most` tokens together."""
    count = int(np.searchsorted(np.cumsum([len(row) for row in rows]), most, side="right"))
    rows = rows[:count]
    columns = {
        "kind": np.array([row.kind for row in rows], np.uint8),
        "held_out": np.array([row.held_out for row in rows], bool),
        "temperature": np.array([row.temperature for row in rows], np.float32),
        "prompt": np.array([len(row.prompt) for row in rows], np.uint32),
        "answer": np.array([len(row.answer) for row in rows], np.uint32),
        "tokens": np.array([token for row in rows for token in (*row.prompt, *row.answer)], np.uint32),
    }
    part = path.with_suffix(".part.npz")
    np.savez_compressed(part, **columns)
    part.replace(path)


def load(paths: Iterable[Path]) -> list[Row]:
    rows = []
    for path in paths:
        with np.load(path) as file:
            found = {name: file[name] for name in file.files}
        tokens, start = found["tokens"].tolist(), 0
        for i in range(len(found["kind"])):
            middle = start + int(found["prompt"][i])
            end = middle + int(found["answer"][i])
            given = int(found["kind"][i]), bool(found["held_out"][i]), float(found["temperature"][i])
            rows.append(Row(tokens[start:middle], tokens[middle:end], *given))
            start = end
    return rows


def collated(
    rows: Sequence[Row], cut: Batches, device: torch.device, first: int | None = None
) -> dict[str, Tensor]:
    """What students take: the package's batch, and where each text ends. first: number of the first draw;
    anchors are spread evenly without one."""
    given = [{"prompt": row.prompt, "answer": row.answer} for row in rows]
    for i, row in enumerate(given if first is not None else ()):
        row["draw"] = first + i
    made = cut(given) | {"ends": torch.tensor([len(cut.cut(row.prompt, row.answer)[0]) for row in rows])}
    return {name: part.to(device, non_blocking=True) for name, part in made.items()}


def batches(
    rows: Sequence[Row], cut: Batches, tokens: int, device: torch.device, seed: int, skip: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Without end: texts of about one length, `tokens` of them and of pads. skip: batches used before; the
    others are those that would have followed."""
    by_width: dict[int, list[Row]] = {}
    for row in rows:
        if len(row.answer) >= MIN_ANSWER:
            width = min(cut.length, -(-len(row) // STRIDE) * STRIDE)
            by_width.setdefault(width, []).append(row)
    number = 0
    for epoch in range(1 << 60):
        dice = random.Random(f"{seed} {epoch}")
        plan = []
        for width, own in sorted(by_width.items()):
            lanes = max(1, tokens // width)
            order = dice.sample(own, len(own))
            order += dice.choices(own, k=-len(order) % lanes)
            plan += [order[at : at + lanes] for at in range(0, len(order), lanes)]
        for chosen in dice.sample(plan, len(plan)):
            number += 1
            if number > skip:
                yield collated(chosen, cut, device, first=(seed * 1_000_003 + number * tokens) % 2**32)
