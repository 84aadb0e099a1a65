"""From trees to the arguments of a transformers forward: ids, positions, attention masks.

One layout serves all forwards, of decoding and of training, so that they cannot drift apart. Ids at or above
the vocabulary size are an adapter's mask tokens: such a row carries id 0, its embedding comes from the
adapter, and it alone sees the slots of a soft prefix.

A mixed model has several kinds of layers (full attention, a sliding window, chunks) and takes one attention
mask for each; one mask for all would silently drop the windows. transformers states a kind as a rule over the
index of a query and the index of a key, and hands the rule to whoever builds the masks of an attention
implementation. The rules are taken from there once, at load, and applied to positions instead: slot s of the
history has position s, a row of a tree the position that its depth gives it. So a window reaches back over
ancestors and history alike.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionMaskInterface, LlamaModel, PreTrainedModel
from transformers.masking_utils import causal_mask_function, create_masks_for_generate

from ..engine.tree import Tree
from ..errors import ModelUnsupported

# transformers calls its key/value cache `cache` since 5.24; before that, and in many remote-code models:
OLD = "past_key_values"


def cache_name(forward: Callable[..., Any]) -> str | None:
    """The name by which a function takes the cache; None where it names none."""
    taken = inspect.signature(forward).parameters
    return next((name for name in ("cache", OLD) if name in taken), None)


CACHE = cache_name(LlamaModel.forward) or OLD  # what transformers' own code takes and returns
NAME = "selfdraft.rules"  # an attention implementation whose masks are the rules they are built from

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # lane, head, query, key -> may it be seen?


@dataclass(frozen=True)
class Layout:
    """The arguments of one forward, before each kind of layer gets its own mask."""

    ids: Tensor  # [lanes, width] int64
    positions: Tensor  # [lanes, width] int64
    seen: Tensor  # the additive attention mask, [lanes, 1, width, slots]
    mask_tokens: Tensor | None  # index of the mask token each row carries, [lanes, width], -1 for none

    def mask_tokens_of(self, start: int, stop: int) -> Tensor | None:
        """`mask_tokens` of these rows; None where none of them carries one."""
        if self.mask_tokens is None:
            return None
        part = self.mask_tokens[:, start:stop]
        return part if bool((part >= 0).any()) else None


def layout(
    trees: Sequence[Tree],
    lengths: Sequence[int],
    width: int,
    slots: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    fixed: int = 0,
) -> Layout:
    """One tree per lane, each behind a history of `lengths` tokens, which follows `fixed` slots of a prefix.

    Rows beyond a tree's own, up to `width`, repeat its row 0.
    """
    ids, positions = [], []
    seen = torch.full((len(trees), 1, width, slots), torch.finfo(dtype).min, dtype=dtype)
    for tree, length, see in zip(trees, lengths, seen[:, 0], strict=True):
        rows, start = len(tree), fixed + length
        pads = width - rows
        ids.append([*tree.tokens, *tree.tokens[:1] * pads])
        positions.append([*(length + depth for depth in tree.depth), *[length] * pads])
        see[:, fixed : start + 1] = 0
        if rows > 1:
            see[:rows, start : start + rows].masked_fill_(tree.visible, 0)
    mask_tokens = None
    made = torch.tensor(ids)
    if any(tree.tokens[-1] >= vocabulary for tree in trees):  # mask tokens stand behind the others
        mask_tokens = (made - vocabulary).clamp_(min=-1)
        made = made.masked_fill(mask_tokens >= 0, 0)
        seen[..., :fixed].masked_fill_((mask_tokens >= 0)[:, None, :, None], 0)
        mask_tokens = mask_tokens.to(device)
    return Layout(made.to(device), torch.tensor(positions, device=device), seen.to(device), mask_tokens)


@dataclass(frozen=True)
class LayerKind:
    """Layers that share one rule of what a row may see."""

    rule: Rule
    size: int | None  # with fewer positions the rule hides nothing; None: it never does


def layer_kinds(model: PreTrainedModel) -> Mapping[str, LayerKind]:
    """The kinds of layers a model has, by the names under which its forward takes their masks.

    Obtained as `generate` obtains masks that it prepares in advance. Raises ModelUnsupported for layers that
    keep a running state: the branches of a tree cannot share it.
    """
    config = copy.deepcopy(model.config.get_text_config())
    config._attn_implementation = NAME
    create = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    made = create(
        config=config,
        inputs_embeds=torch.empty(1, 2, 0, device=model.device),
        attention_mask=None,
        position_ids=None,
        **{CACHE: None},
    )
    if made is None:  # layer types without rules; `check_tree` finds out whether they need any
        return {"": LayerKind(cast(Rule, causal_mask_function), None)}
    named = made if isinstance(made, dict) else {"": made}
    states = sorted(name for name, kind in named.items() if kind is None)
    if states:
        names = ", ".join(states)
        raise ModelUnsupported(f"layers of type {names} are not supported: they keep a state, not keys")
    return named


def kind_masks(
    kinds: Mapping[str, LayerKind], seen: Tensor, positions: Tensor, fixed: int = 0
) -> Mapping[str, Tensor]:
    """For each kind the additive mask, [lanes, 1, rows, slots]: `seen`, less what its rule hides.

    positions: [lanes, rows], that of row 0 being the length of its lane's history. fixed: slots before the
    history, which have no position and which no rule hides.
    """
    lanes, _, rows, slots = seen.shape
    slots -= fixed
    made, at = {}, None
    for name, kind in kinds.items():
        if kind.size is None or slots <= kind.size:
            made[name] = seen
            continue
        if at is None:  # positions of the slots
            own = positions[:, :1] + torch.arange(rows, device=seen.device)
            at = torch.arange(slots, device=seen.device).repeat(lanes, 1).scatter_(1, own, positions)
        first = positions.new_zeros(())
        sees = kind.rule(first, first, positions[:, None, :, None], at[:, None, None, :])
        made[name] = seen.clone()
        made[name][..., fixed:].masked_fill_(~sees, torch.finfo(seen.dtype).min)
    return made


def mask_rows(masks: Mapping[str, Tensor], start: int, stop: int) -> Any:
    """These rows of the masks, as a forward takes them: one for all layers, or one by each name."""
    part = {name: mask[:, :, start:stop] for name, mask in masks.items()}
    return part if len(part) > 1 else next(iter(part.values()))


def _kind(*_: object, mask_function: Rule, local_size: int | None = None, **__: object) -> LayerKind:
    return LayerKind(mask_function, local_size)


AttentionMaskInterface.register(NAME, cast(Any, _kind))
