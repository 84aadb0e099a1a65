"""From rows of prompt and answer to trees for a tuned student: the text, and what hangs from it.

`Masked` hangs groups of mask tokens under anchors of the text (SPACE). `Noisy` hangs blocks of a recorded
Jacobi trajectory beside the answer (CLLM), each behind the text before its block; or, for a window of several
blocks, behind the noisy block before it, so that a row sees noise as far back as in decoding with several
blocks (the packed training of Jacobi Forcing). How noisy a block is, is drawn at random, or rises over its
window.

A noisy row counts from the first wrong token on, since before it sees nothing wrong and is the text's own
row; and not where it stands behind the end of the text. All draws are keyed by the number of the use
(`Draws`), so masks and states are other ones each time a row is used, and the same ones in a run that was
interrupted.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from ..errors import InvalidOption
from .sequences import Batches
from .student import IGNORED
from .tuned import NO_ROW

PAD = -2  # the parent of a row that pads


@dataclass
class Packing:
    """The tree of one sequence, as it grows. groups: pairs of hung row and aim, NO_ROW
    where it has none."""

    text: Sequence[int]
    tokens: list[int] = field(init=False)
    parents: list[int] = field(init=False)
    groups: list[list[tuple[int, int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = list(self.text)
        self.parents = list(range(-1, len(self.text) - 1))

    def hang(self, row: int, tokens: Sequence[int]) -> range:
        """A chain of tokens under a row; the rows it became."""
        first = len(self.tokens)
        self.tokens += tokens
        self.parents += [row, *range(first, first + len(tokens) - 1)][: len(tokens)]
        return range(first, first + len(tokens))


@dataclass(frozen=True)
class Masked:
    """A data collator. anchors: groups of masks a sequence; 1 is as published. ids: of the masks, in order.
    prompts: do the rows of the prompt count, too, in what the text's rows learn?"""

    cut: Batches
    ids: Sequence[int]
    prompts: bool

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        drawn = self.cut(rows)
        made, starts = [], []
        for row, anchors, labels in zip(
            rows, drawn["anchors"].tolist(), drawn["labels"].tolist(), strict=True
        ):
            text, start = self.cut.cut(row["prompt"], row["answer"])
            packing = Packing(text)
            for anchor, told in zip(anchors, labels, strict=True):
                if told[0] == IGNORED:
                    continue
                hung = packing.hang(anchor, self.ids)
                aims = range(anchor + 1, anchor + 1 + len(told))
                ends = [NO_ROW if token == IGNORED else row for row, token in zip(aims, told, strict=True)]
                packing.groups.append(list(zip(hung, ends, strict=True)))
            made.append(packing)
            starts.append(0 if self.prompts else start)
        return batch(made, starts, len(self.ids))


Noise = Literal["random", "progressive", "reverse"]


@dataclass(frozen=True)
class NoiseConfig:
    """window: noisy blocks in a row; 1 is as published. noise: how noisy they are: random; progressive, which
    rises over the window; reverse. consistency: to what a noisy row should agree, the text (global) or the
    next state (local; with a window of 1). copies: of the noisy answer, each with its own draws. filler: a
    token that stands for those not known yet: all copies but the first are then blocks of it alone, `reach`
    rows each, from a random row on, and in the first it takes the end of each state, as it does when
    decoding."""

    window: Annotated[int, Ge(1)] = 1
    noise: Noise = "random"
    consistency: Literal["global", "local"] = "global"
    copies: Annotated[int, Ge(1)] = 3
    filler: Annotated[int, Ge(0)] | None = None
    reach: Annotated[int, Ge(1)] = 8

    def __post_init__(self) -> None:
        if self.consistency == "local" and self.window > 1:
            raise InvalidOption(
                f"local consistency has no window of blocks; got window={self.window}, give 1"
            )


@dataclass(frozen=True)
class Noisy:
    """A data collator. block: tokens of a block. eos: tokens that end a text. prompts: as in `Masked`."""

    cut: Batches
    block: int
    config: NoiseConfig
    eos: frozenset[int]
    prompts: bool

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        made, starts = [], []
        for row in rows:
            text, start = self.cut.cut(row["prompt"], row["answer"])
            packing = Packing(text)
            for copy in range(self.config.copies):
                dice = random.Random(f"{row.get('draw', 0)} {copy}")
                if self.config.filler is not None and copy:
                    self._fill(packing, start + 1, self.config.filler, dice)
                else:
                    self._hang(packing, start + 1, row["states"], dice)
            made.append(packing)
            starts.append(0 if self.prompts else start)
        return batch(made, starts, max(self.block, self.config.reach))

    def _fill(self, packing: Packing, first: int, filler: int, dice: random.Random) -> None:
        """Blocks of which nothing is known, beside the answer."""
        reach, text = self.config.reach, packing.text
        for at in range(first + dice.randrange(min(reach, max(1, len(text) - first))), len(text), reach):
            aims = range(at, min(at + reach, len(text)))
            hung = packing.hang(at - 1, [filler] * len(aims))
            ends = [NO_ROW if text[row] in self.eos else row for row in aims]
            packing.groups.append(list(zip(hung, ends, strict=True)))

    def _hang(self, packing: Packing, first: int, states: Sequence[Any], dice: random.Random) -> None:
        """A noisy copy of the answer, whose first token is row `first` of the text."""
        phase, under = dice.randrange(self.config.window), 0
        starts = range(first, len(packing.text), self.block)
        for number, (at, known) in enumerate(zip(starts, states, strict=False)):
            aim = list(packing.text[at : at + self.block])
            place = (number + phase) % self.config.window
            if place == 0 or number == 0:
                under = at - 1
            line = [[*state][: len(aim)] for state in known] + [aim]
            chosen = self._choose(line, aim, place, dice)
            state = line[chosen]
            if self.config.filler is not None:
                known_ones = dice.randrange(1, len(state) + 1)
                state = [*state[:known_ones], *[self.config.filler] * (len(state) - known_ones)]
            hung = packing.hang(under, state)
            target = range(at, at + len(aim))
            if self.config.consistency == "local" and chosen + 2 < len(line):
                target = packing.hang(at - 1, line[chosen + 1])
            ends = [NO_ROW if token in self.eos else row for row, token in zip(target, aim, strict=True)]
            packing.groups.append(list(zip(hung, ends, strict=True)))
            under = hung[-1]

    def _choose(
        self, line: Sequence[Sequence[int]], aim: Sequence[int], place: int, dice: random.Random
    ) -> int:
        """Which state of a block to show; the last one of the line is the text."""
        if len(line) == 1:
            return 0
        if self.config.noise == "random":
            return dice.randrange(len(line) - 1)
        share = (place + 1) / self.config.window
        if self.config.noise == "reverse":
            share = 1 - place / self.config.window
        noisy = [sum(a != b for a, b in zip(state, aim, strict=True)) / len(aim) for state in line[:-1]]
        return min(range(len(noisy)), key=lambda i: abs(noisy[i] - share))


def batch(packings: Sequence[Packing], starts: Sequence[int], size: int) -> dict[str, Tensor]:
    """What `TunedStudent.forward` takes. starts: the first row of each text that counts; it tells the token
    after it. Groups are at most `size` rows."""
    lanes, width = len(packings), max(len(packing.tokens) for packing in packings)
    count = max(1, *(len(packing.groups) for packing in packings))
    tokens = torch.zeros(lanes, width, dtype=torch.long)
    parents = torch.full((lanes, width), PAD)
    labels = torch.full((lanes, width), IGNORED)
    pairs = torch.full((2, lanes, count, size), NO_ROW)
    for lane, (packing, start) in enumerate(zip(packings, starts, strict=True)):
        tokens[lane, : len(packing.tokens)] = torch.tensor(packing.tokens)
        parents[lane, : len(packing.parents)] = torch.tensor(packing.parents)
        labels[lane, start : len(packing.text) - 1] = torch.tensor(packing.text[start + 1 :])
        for number, group in enumerate(packing.groups):
            if group:
                pairs[:, lane, number, : len(group)] = torch.tensor(group).T
    return {"tokens": tokens, "parents": parents, "labels": labels, "hung": pairs[0], "aims": pairs[1]}
