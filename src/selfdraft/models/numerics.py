"""Exact numerics: at which numbers of rows does every row of a forward keep its bits?

Matrix kernels choose their blocking by the number of rows, so the hidden state of a token can change in its
last bit with the rows that run beside it. On a trained model in bfloat16 that flips the argmax at about 1 %
of positions. The row counts fall into classes that differ by machine, dtype and layer size (seen on one CPU:
bfloat16 1-32 alike, then 33 and more; float32 1, 2-15, 16-56 alike; docs/LOG.md has more). `row_range` takes
the first of RANGES within which all counts agree: wide ones first, since they need the least padding; the
last ones are single counts, to which every call is padded.

Two classes may agree in all but one value of some ten thousands, which a short text can miss. So linear
layers are also compared by themselves, over many more rows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ..engine.tree import Tree
from ..errors import ModelUnsupported
from .protocol import Model

TEXT = 32  # rows of text that are compared
VALUES = 200_000  # outputs that are compared for each shape of linear layer, about
OUTPUTS = 8192  # outputs of one linear layer that are compared, at most
COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 20, 24, 31, 32)  # row counts that are compared


@dataclass(frozen=True)
class RowRange:
    """How many rows one call of the model may have."""

    least: int = 1  # a call with fewer rows is padded to as many
    most: int = 4096  # a forward with more rows runs in several calls

    def pieces(self, rows: int, lanes: int = 1) -> list[tuple[int, int]]:
        """Spans that cover `rows` rows of each lane; the last may reach beyond, for padding."""
        most, least = self.most // lanes, -(-self.least // lanes)
        assert least <= most, f"{lanes} lanes do not go together in {self}"
        return [(at, max(min(at + most, rows), at + least)) for at in range(0, rows, most)]

    def together(self, lanes: int) -> int:
        """How many lanes, at most, one call can have with the same number of rows each."""
        fits = (n for n in range(min(lanes, self.most), 1, -1) if -(-self.least // n) * n <= self.most)
        return next(fits, 1)


RANGES = tuple(
    RowRange(least, most)
    for least, most in (
        (1, 32),
        (2, 32),
        (4, 32),
        (8, 32),
        (16, 32),
        (4, 16),
        (8, 16),
        (8, 8),
        (16, 16),
        (32, 32),
    )
)


class MeasuredModel(Model, Protocol):
    """What this module needs of a model beside the engine's interface."""

    model: Any  # the transformers model
    rows: RowRange  # set while ranges are tried


def row_range(model: MeasuredModel) -> RowRange:
    """The row counts at which every row keeps its bits. Raises ModelUnsupported where there are none."""
    for rows in RANGES:
        if _linear_layers_keep_bits(model, rows) and _keeps_bits(model, rows):
            return rows
    raise ModelUnsupported(
        "at no number of rows does every row keep its bits here, so texts cannot be "
        'exact; use numerics="fast", or another dtype'
    )


def _linear_layers_keep_bits(model: MeasuredModel, rows: RowRange) -> bool:
    """Has each row of a linear layer the same bits with as few others as there may be as with all?"""
    layers = [
        module
        for module in model.model.modules()
        if isinstance(module, torch.nn.Linear)
        and type(module.weight) is torch.nn.Parameter  # not one of quantised values
        and module.weight.is_floating_point()
    ]
    shapes = {(*layer.weight.shape, layer.bias is not None, layer.weight.dtype) for layer in layers}
    return all(_kernel_keeps_bits(*shape, model.device, rows) for shape in sorted(shapes, key=str))


@lru_cache(maxsize=256)
@torch.inference_mode()
def _kernel_keeps_bits(
    outputs: int, inputs: int, bias: bool, dtype: torch.dtype, device: torch.device, rows: RowRange
) -> bool:
    dice, outputs = torch.Generator().manual_seed(4), min(outputs, OUTPUTS)
    weight = torch.randn(outputs, inputs, generator=dice).to(device, dtype)
    added = torch.randn(outputs, generator=dice).to(device, dtype) if bias else None
    for _ in range(max(2, VALUES // (outputs * rows.most))):
        some = torch.randn(rows.most, inputs, generator=dice).to(device, dtype)
        parts = [part for part in some.split(rows.least) if len(part) == rows.least]
        few = torch.cat([torch.nn.functional.linear(part, weight, added) for part in parts])
        if not torch.equal(few, torch.nn.functional.linear(some, weight, added)[: len(few)]):
            return False
    return True


def _keeps_bits(model: MeasuredModel, rows: RowRange) -> bool:
    """Do rows alone, in groups, in a tree and in a batch have the bits of one full call?"""
    model.rows = rows
    text = random_tokens(model, 2 * TEXT, seed=3)
    (whole,) = logits_behind(model, [Tree.chain(text[TEXT:])], [text[:TEXT]])
    for count in (c for c in COUNTS if c >= rows.least or rows.least == rows.most):
        start = TEXT - count  # the same rows, at another place in the call and behind another prefix
        (part,) = logits_behind(model, [Tree.chain(text[TEXT + start :])], [text[: TEXT + start]])
        if not torch.equal(part, whole[start:]):
            return False
    fork = Tree.chain(text[TEXT : TEXT + 6]).hang(2, text[:4]).hang(2, text[TEXT + 3 : TEXT + 9])
    alone = Tree.chain(text[TEXT : TEXT + 1])
    batch = logits_behind(model, [fork, alone, Tree.chain(text[TEXT:])], [text[:TEXT]] * 3)
    right = [0, 1, 2, *range(10, 16)]  # the path of `fork` that follows the text
    return (
        torch.equal(batch[0][right], whole[: len(right)])
        and torch.equal(batch[1], whole[:1])
        and torch.equal(batch[2], whole)
        and (model.loops is None or torch.equal(staged_logits(model, text[:TEXT], text[TEXT:]), whole))
    )


def staged_logits(model: MeasuredModel, history: Sequence[int], text: Sequence[int]) -> Tensor:
    """Logits of a text behind a history, [tokens, vocabulary], of a looped model driven by stages: one token
    more starts at each, as long as there are any."""
    cache = model.pool().open()
    model.forward([Tree.chain(history)], [cache])
    cache.keep(range(len(history)), [])
    at, under, made = 0, 1, []
    while at < len(text):
        tree = Tree.chain(text[at : at + under])
        rows = model.forward([tree], [cache], 1)
        through = int(rows.done[0][0])
        if through:
            made += model.head(rows, [[0]])
        cache.keep(range(through), range(through, len(tree)))
        at, under = at + through, under + 1 - through
    return torch.cat(made)


def logits_behind(
    model: MeasuredModel,
    trees: Sequence[Tree],
    histories: Sequence[Sequence[int]],
    piece: int | None = None,
) -> list[Tensor]:
    """Logits of all rows, each tree behind its history, which is read in calls of at most so many rows."""
    pool = model.pool()
    caches = [pool.open() for _ in trees]
    for cache, history in zip(caches, histories, strict=True):
        for start in range(0, len(history), piece or len(history)):
            chunk = history[start : start + (piece or len(history))]
            model.forward([Tree.chain(chunk)], [cache])
            cache.keep(range(len(chunk)), [])
    rows = model.forward(trees, caches)
    return model.head(rows, [range(len(tree)) for tree in trees])


def random_tokens(model: MeasuredModel, count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(model.vocab_size), k=count)
