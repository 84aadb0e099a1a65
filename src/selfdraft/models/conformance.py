"""Conformance: does a model, run through this package's forward, verify a tree?

Asked of every transformers model when it is loaded. A bushy tree runs behind a history and beside another
request, and the logits of its branches are compared with the model's own forward over the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..engine.tree import Tree
from ..errors import ModelUnsupported
from .numerics import MeasuredModel, logits_behind, random_tokens, staged_logits
from .transformers_inputs import LayerKind, layer_kinds

HISTORY = 13  # tokens before the tree that is compared
# The tree: bushy, and wide before its last branch, so that rows counted for positions are far off.
SHAPE = (-1, 0, 0, 1, 1, 2, 3, 0, 7, 3, *[0] * 16, 4, 26, 27)
LEAVES = (5, 6, 8, 28)  # ends of the branches that are compared
WINDOW = 5  # tokens of a window meanwhile
LONGEST = 1024  # tokens of a window that can be probed as it is
# Differences allowed, relative to the norm of the logits; 16-bit types: 0.2. Parts of most models round to
# float32 even in float64.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}


class ComparedModel(MeasuredModel, Protocol):
    """What this module needs of a model beside that."""

    dtype: torch.dtype
    own_attention: str  # the attention implementation that the model came with
    kinds: Mapping[str, LayerKind]

    def reference(self, tokens: Sequence[int], attention: str | None = None) -> Tensor:
        """Logits of transformers' own forward, [tokens, vocabulary]."""


@contextmanager
def naming_the_model(model: PreTrainedModel, fault: str) -> Iterator[None]:
    """Whatever goes wrong inside says which model it went wrong with, as ModelUnsupported."""
    try:
        yield
    except ModelUnsupported as error:
        raise ModelUnsupported(f"{_name(model)}: {error}") from error
    except Exception as error:  # whatever a forward raises that was not written for trees
        raise ModelUnsupported(f"{_name(model)}: {fault} ({type(error).__name__}: {error})") from error


def context_length(model: PreTrainedModel) -> int:
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


def check_tree(model: ComparedModel) -> None:
    """Compare a bushy tree, over a history of more than two windows, with the model's own forward.

    Real windows are long, so they are made short meanwhile, if the model's own forward follows that.
    Raises ModelUnsupported where the two differ by more than rounding.
    """
    sizes = [kind.size for kind in model.kinds.values() if kind.size is not None]
    if not sizes:
        return _compare(model, HISTORY)
    text = random_tokens(model, HISTORY, seed=1)
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
def _short_windows(model: ComparedModel) -> Iterator[None]:
    """All windows and chunks that the model's config gives are of WINDOW tokens meanwhile."""
    config = model.model.config.get_text_config()
    names = [name for name in ("sliding_window", "attention_chunk_size") if getattr(config, name, None)]
    before, kinds = {name: getattr(config, name) for name in names}, model.kinds
    try:
        for name in names:
            setattr(config, name, WINDOW)
        model.kinds = layer_kinds(model.model)
        yield
    finally:
        model.kinds = kinds
        for name, size in before.items():
            setattr(config, name, size)


def _compare(model: ComparedModel, length: int) -> None:
    """A tree behind a history of this length, read in two pieces and run beside another request, against
    the model's own forward of some of the tree's branches.

    That is the forward with the attention the model came with, or else with the model's own code for it:
    others have dropped caps and the like without a word.
    """
    history = random_tokens(model, length, seed=1)
    tree = Tree(tuple(random_tokens(model, len(SHAPE), seed=2)), SHAPE)
    beside = Tree.chain(history[5:8])
    _, ours = logits_behind(model, [beside, tree], [history[:5], history], piece=1 + 3 * length // 5)
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


def _check_stages(model: ComparedModel, text: list[int], tolerance: float) -> None:
    """Compare a text run by stages with the same in whole forwards. Raises ModelUnsupported."""
    (own,) = (logits.double() for logits in logits_behind(model, [Tree.chain(text[5:])], [text[:5]]))
    ours = staged_logits(model, text[:5], text[5:]).double()
    error = float(((ours - own).norm(dim=-1) / own.norm(dim=-1)).median())
    if not error <= tolerance:
        raise ModelUnsupported(f"run by stages, its logits differ by {error:.1e} of their size")


def _error(model: ComparedModel, history: list[int], tree: Tree, ours: Tensor, attention: str) -> float:
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


def _name(model: PreTrainedModel) -> str:
    return f"model type {model.config.model_type!r} in {model.dtype}"
