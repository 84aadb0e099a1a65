"""From rows of prompt and answer to training trees for a tuned student: the text with branches.

`Masked` adds groups of mask tokens under anchors of the text (SPACE). `Noisy` adds blocks of a recorded
Jacobi trajectory beside the answer (CLLM), and if the row has one, an answer by somebody else from which the
text's loss is taken. Each noisy block follows the text before its place; in a window of several blocks it
follows the noisy block before it, so that a row sees as much noise as in decoding with several blocks (the
packed training of Jacobi Forcing). The noise of a block is drawn at random or increases over the window.

A noisy row has a loss from the first wrong token on, because a row before it sees the text alone, and none
after the end of the text. All draws are keyed by the number of the use (`Draws`): masks and states differ
each time a row is used, and a run that was interrupted draws the same ones.
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

PAD = -2  # the parent of a padding row


@dataclass
class Packing:
    """The tree of one sequence while it is built."""

    text: Sequence[int]
    # Of all rows, those of the text first.
    tokens: list[int] = field(init=False)
    parents: list[int] = field(init=False)
    # Pairs of a branch row and its target row; NO_ROW if it has none.
    groups: list[list[tuple[int, int]]] = field(default_factory=list)
    # The token that a row learns to say, by row, instead of the text's own; none: the text's.
    labels: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens = list(self.text)
        self.parents = list(range(-1, len(self.text) - 1))

    def hang(self, row: int, tokens: Sequence[int]) -> range:
        """Add a chain of tokens under a row. Returns its rows."""
        first = len(self.tokens)
        self.tokens += tokens
        self.parents += [row, *range(first, first + len(tokens) - 1)][: len(tokens)]
        return range(first, first + len(tokens))

    def teach(self, row: int, answer: Sequence[int]) -> None:
        """Add another answer under a row, to be learned instead of the text."""
        hung = self.hang(row, answer[:-1])
        self.labels = dict(zip((row, *hung), answer, strict=True))


@dataclass(frozen=True)
class Masked:
    """A data collator that adds mask tokens (SPACE)."""

    # Cuts texts and draws anchors; the published training has one anchor per sequence.
    cut: Batches
    # The ids of the mask tokens, in order.
    ids: Sequence[int]
    # True if the rows of the prompt have a loss, too.
    prompts: bool

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        drawn = self.cut(rows)
        made, starts = [], []
        for row, anchors, labels in zip(
            rows, drawn["anchors"].tolist(), drawn["labels"].tolist(), strict=True
        ):
            text, start = self.cut.cut(row["prompt"], row["answer"])
            packing = Packing(text)
            for anchor, targets in zip(anchors, labels, strict=True):
                if targets[0] == IGNORED:
                    continue
                hung = packing.hang(anchor, self.ids)
                aims = range(anchor + 1, anchor + 1 + len(targets))
                ends = [NO_ROW if token == IGNORED else row for row, token in zip(aims, targets, strict=True)]
                packing.groups.append(list(zip(hung, ends, strict=True)))
            made.append(packing)
            starts.append(0 if self.prompts else start)
        return batch(made, starts, len(self.ids))


Noise = Literal["random", "progressive", "reverse"]


@dataclass(frozen=True)
class NoiseConfig:
    """Which noisy blocks a sequence gets."""

    # Noisy blocks in a row; the published training has 1.
    window: Annotated[int, Ge(1)] = 1
    # Which state of its trajectory a block has: a random one, or one that is noisier (progressive) or less
    # noisy (reverse) the later the block stands in its window.
    noise: Noise = "random"
    # The target of a noisy row: the text (global) or the next state (local, only with a window of 1).
    consistency: Literal["global", "local"] = "global"
    # Noisy copies of the answer, each with its own draws.
    copies: Annotated[int, Ge(1)] = 3
    # A token that stands for positions not known yet. With it, the states of the first copy end in it, as in
    # decoding, and the other copies are blocks of it alone, `reach` rows each, from a random row on.
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
            if row.get("label"):
                packing.teach(start, row["label"][: self.cut.length // 2])
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
        if packing.labels:
            rows, learned = zip(*packing.labels.items(), strict=True)
            labels[lane, torch.tensor(rows)] = torch.tensor(learned)
        else:
            labels[lane, start : len(packing.text) - 1] = torch.tensor(packing.text[start + 1 :])
        for number, group in enumerate(packing.groups):
            if group:
                pairs[:, lane, number, : len(group)] = torch.tensor(group).T
    return {"tokens": tokens, "parents": parents, "labels": labels, "hung": pairs[0], "aims": pairs[1]}
