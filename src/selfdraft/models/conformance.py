"""What is asked of a model at load, by measurement: does it verify trees, and at which row counts
does every row keep its bits?

Matrix kernels choose their blocking by the number of rows, so a token's hidden state can change in
its last bit with the company it runs in; on a trained model in bfloat16 that flips the argmax at
about 1 % of positions. The counts fall into classes that differ by machine, dtype and layer size
(seen on one CPU: bfloat16 1-32 alike, then 33 and more; float32 1, 2-15, 16-56 alike; docs/LOG.md has
more). The probe takes the first range of RANGES within which all counts agree: wide ones first, for they
pad least; at the end a single count, every call padded to just that.

Two classes may agree in all but one value of some ten thousands, which a short text can miss: so linear
layers are also asked by themselves, with many more rows."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..engine.tree import Tree
from ..errors import ModelUnsupported
from . import attention_masks as masks

if TYPE_CHECKING:
    from .transformers import TransformersModel

HISTORY = 13  # tokens before the tree that is compared
# The tree: bushy, and wide before its last branch, so that rows counted for positions are far off.
SHAPE = (-1, 0, 0, 1, 1, 2, 3, 0, 7, 3, *[0] * 16, 4, 26, 27)
LEAVES = (5, 6, 8, 28)  # ends of the branches that are compared
WINDOW = 5  # tokens of a window meanwhile
LONGEST = 1024  # tokens of a window that can be probed as it is
TEXT = 32  # rows that the probe compares
VALUES = 200_000  # that it compares of each shape of linear layers, about
OUTPUTS = 8192  # of one of them, at most: more are more of the same
COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 20, 24, 31, 32)
# Relative, in norm; 16-bit types: 0.2. Parts of most models round to float32 even in float64.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}


@dataclass(frozen=True)
class RowRange:
    """How many rows one call of the model may have."""

    least: int = 1
    most: int = 4096

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


@contextmanager
def naming(model: PreTrainedModel, fault: str) -> Iterator[None]:
    """Whatever goes wrong inside says which model it went wrong with, as ModelUnsupported."""
    try:
        yield
    except ModelUnsupported as error:
        raise ModelUnsupported(f"{_name(model)}: {error}") from error
    except Exception as error:  # whatever a forward raises that was not written for trees
        raise ModelUnsupported(f"{_name(model)}: {fault} ({type(error).__name__}: {error})") from error


def context(model: PreTrainedModel) -> int:
    """Most tokens a text may have.

    Where rotary frequencies switch with the longest position of a call (longrope), rows would depend on
    their company; such a model is held to the length at which they switch.
    """
    config = model.config.get_text_config()
    most: int = getattr(config, "max_position_embeddings", None) or 2**31
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    for kind in kinds:
        if kind.get("rope_type") == "longrope":
            name = "original_max_position_embeddings"
            most = min(most, int(kind.get(name) or getattr(config, name, None) or most))
    return most


def staged(model: TransformersModel, history: Sequence[int], text: Sequence[int]) -> Tensor:
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


def check_tree(model: TransformersModel) -> None:
    """Compare a bushy tree, over a history of more than two windows, with the model's own forward.

    Real windows are long, so they are made short meanwhile, if the model's own forward follows that.
    Raises ModelUnsupported where the two differ by more than rounding.
    """
    sizes = [kind.size for kind in model.kinds.values() if kind.size is not None]
    if not sizes:
        return _compare(model, HISTORY)
    text = _tokens(model, HISTORY, seed=1)
    own = model.reference(text)
    with _short_windows(model):
        if not torch.equal(model.reference(text), own):
            return _compare(model, HISTORY)
    if max(sizes) > LONGEST:
        raise ModelUnsupported(
            f"its windows of {max(sizes)} tokens are too long to probe, and its forward keeps them when its "
            "config gives shorter ones"
        )
    _compare(model, 5 * max(sizes) // 2)


@contextmanager
def _short_windows(model: TransformersModel) -> Iterator[None]:
    """All windows and chunks that the model's config gives are of WINDOW tokens meanwhile."""
    config = model.model.config.get_text_config()
    names = [name for name in ("sliding_window", "attention_chunk_size") if getattr(config, name, None)]
    before, kinds = {name: getattr(config, name) for name in names}, model.kinds
    try:
        for name in names:
            setattr(config, name, WINDOW)
        model.kinds = masks.kinds(model.model)
        yield
    finally:
        model.kinds = kinds
        for name, size in before.items():
            setattr(config, name, size)


def _compare(model: TransformersModel, length: int) -> None:
    """A tree behind a history of this length, read in two pieces and run beside another request, against
    the model's own forward of some of the tree's branches.

    That is the forward with the attention the model came with, or else with the model's own code for it:
    others have dropped caps and the like without a word.
    """
    history = _tokens(model, length, seed=1)
    tree = Tree(tuple(_tokens(model, len(SHAPE), seed=2)), SHAPE)
    beside = Tree.chain(history[5:8])
    _, ours = _logits(model, [beside, tree], [history[:5], history], piece=1 + 3 * length // 5)
    tolerance = TOLERANCE.get(model.dtype, 0.2)
    if model.loops is not None:
        _check_stages(model, history, tolerance)
    error = _error(model, history, tree, ours, model.own_attention)
    if not error <= tolerance:
        error = min(error, _error(model, history, tree, ours, "eager"))
    if not error <= tolerance:
        raise ModelUnsupported(
            f"it does not verify a tree: logits differ from its own forward by {error:.1e} "
            f"of their size (tolerance {tolerance:.0e})"
        )


def _check_stages(model: TransformersModel, text: list[int], tolerance: float) -> None:
    """Compare a text run by stages with the same in whole forwards. Raises ModelUnsupported."""
    (own,) = (logits.double() for logits in _logits(model, [Tree.chain(text[5:])], [text[:5]]))
    ours = staged(model, text[:5], text[5:]).double()
    error = float(((ours - own).norm(dim=-1) / own.norm(dim=-1)).median())
    if not error <= tolerance:
        raise ModelUnsupported(f"run by stages, its logits differ by {error:.1e} of their size")


def _error(model: TransformersModel, history: list[int], tree: Tree, ours: Tensor, attention: str) -> float:
    """The largest difference of a branch, relative to the logits' size.

    Of each branch the middle row counts: rounding that sends a token to another expert hits one row, a
    wrong mask, window or position all rows from some depth on.
    """
    middle = []
    for leaf in LEAVES:
        branch = tree.visible[leaf].nonzero().flatten().tolist()
        text = [*history, *(tree.tokens[row] for row in branch)]
        own = model.reference(text, attention)[len(history) :].double()
        errors = (ours[branch].double() - own).norm(dim=-1) / own.norm(dim=-1)
        middle.append(errors.sort().values[len(branch) // 2])
    return torch.stack(middle).max().item()


def row_range(model: TransformersModel) -> RowRange:
    """The row counts at which every row keeps its bits. Raises ModelUnsupported where there are none."""
    for rows in RANGES:
        if _linear_layers_keep_bits(model, rows) and _keeps_bits(model, rows):
            return rows
    raise ModelUnsupported(
        "at no number of rows does every row keep its bits here, so texts cannot be "
        'exact; use numerics="fast", or another dtype'
    )


def _linear_layers_keep_bits(model: TransformersModel, rows: RowRange) -> bool:
    """Has each row of a linear layer the same bits with as few others as there may be as with all?"""
    layers = [module for module in model.model.modules() if type(module) is torch.nn.Linear]
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


def _keeps_bits(model: TransformersModel, rows: RowRange) -> bool:
    """Do rows alone, in groups, in a tree and in a batch have the bits of one full call?"""
    model.rows = rows
    text = _tokens(model, 2 * TEXT, seed=3)
    (whole,) = _logits(model, [Tree.chain(text[TEXT:])], [text[:TEXT]])
    for count in (c for c in COUNTS if c >= rows.least or rows.least == rows.most):
        start = TEXT - count  # the same rows, at another place in the call and behind another prefix
        (part,) = _logits(model, [Tree.chain(text[TEXT + start :])], [text[: TEXT + start]])
        if not torch.equal(part, whole[start:]):
            return False
    fork = Tree.chain(text[TEXT : TEXT + 6]).hang(2, text[:4]).hang(2, text[TEXT + 3 : TEXT + 9])
    alone = Tree.chain(text[TEXT : TEXT + 1])
    batch = _logits(model, [fork, alone, Tree.chain(text[TEXT:])], [text[:TEXT]] * 3)
    right = [0, 1, 2, *range(10, 16)]  # the path of `fork` that follows the text
    return (
        torch.equal(batch[0][right], whole[: len(right)])
        and torch.equal(batch[1], whole[:1])
        and torch.equal(batch[2], whole)
        and (model.loops is None or torch.equal(staged(model, text[:TEXT], text[TEXT:]), whole))
    )


def _logits(
    model: TransformersModel,
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


def _tokens(model: TransformersModel, count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(model.vocab_size), k=count)


def _name(model: PreTrainedModel) -> str:
    return f"model type {model.config.model_type!r} in {model.dtype}"
