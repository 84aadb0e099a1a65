"""What each kind of layer sees: all of the text, a window of it, or a chunk.

A mixed model has several kinds of layers and takes one mask for each; one mask for all would silently
drop the windows. transformers states a kind as a rule over the index of a query and the index of a key,
and hands the rule to whoever builds the masks of an attention implementation. The rules are taken from
there once, at load, and asked about positions instead: slot s of the history has position s, a row of a
tree the position that its depth gives it. So a window reaches back over ancestors and history alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function, create_masks_for_generate

from ..errors import ModelUnsupported
from .naming import CACHE

NAME = "selfdraft.rules"  # an attention implementation whose masks are the rules they are built from

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # lane, head, query, key -> may it be seen?


@dataclass(frozen=True)
class Kind:
    """Layers that see alike. size: positions below which `rule` hides nothing; None: it never does."""

    rule: Rule
    size: int | None


def kinds(model: PreTrainedModel) -> Mapping[str, Kind]:
    """The kinds of layers a model has, by the names its forward knows their masks by.

    Asked as `generate` asks for masks it makes in advance. Raises ModelUnsupported for layers that keep a
    running state: the branches of a tree cannot share it.
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
    if made is None:  # layer types without rules; the probe tells whether they need any
        return {"": Kind(cast(Rule, causal_mask_function), None)}
    named = made if isinstance(made, dict) else {"": made}
    states = sorted(name for name, kind in named.items() if kind is None)
    if states:
        names = ", ".join(states)
        raise ModelUnsupported(f"layers of type {names} are not supported: they keep a state, not keys")
    return named


def masks(kinds: Mapping[str, Kind], seen: Tensor, positions: Tensor, fixed: int = 0) -> Mapping[str, Tensor]:
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


def rows(masks: Mapping[str, Tensor], start: int, stop: int) -> Any:
    """These rows of the masks, as a forward takes them: one for all layers, or one by each name."""
    part = {name: mask[:, :, start:stop] for name, mask in masks.items()}
    return part if len(part) > 1 else next(iter(part.values()))


def _kind(*_: object, mask_function: Rule, local_size: int | None = None, **__: object) -> Kind:
    return Kind(mask_function, local_size)


AttentionMaskInterface.register(NAME, cast(Any, _kind))
