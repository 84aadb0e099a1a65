"""Where a model's logits come from: hidden states by its base model, logits from them by its head.

The base is the part that holds the input embeddings. It and the head run apart, so that the head, which
with a large vocabulary decides the speed, runs on the rows asked for alone. What an architecture does to
logits beside its output layer (scales, caps) is its own code: the tail is the model object itself with
a base that returns hidden states known already. Where neither gives the whole model's logits, the whole
model is the base and there is no head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

Head = Callable[[Tensor], Tensor]  # [rows, hidden] -> [rows, vocabulary]


def split(model: PreTrainedModel, ids: Tensor, own: Tensor) -> tuple[Any, Head]:
    """Base and head which, one after the other, make `own`: the model's logits for `ids`, [1, rows]."""
    embedding = model.get_input_embeddings()
    for name, base in model.named_children():
        if all(module is not embedding for module in base.modules()):
            continue
        output = base(input_ids=ids, use_cache=False)
        for head in (model.get_output_embeddings(), Tail(model, name, type(output))):
            if head is not None and _gives(head, output[0][0], own):
                return base, head
    return model, torch.nn.Identity()


class Tail:
    """What a model does after its base model. name: where it has it. output: the type it returns."""

    def __init__(self, model: PreTrainedModel, name: str, output: type) -> None:
        self._model: Any = copy.copy(model)
        self._model._modules = {**model._modules, name: _Known(output)}

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits


class _Known(torch.nn.Module):
    """Stands in for a base model whose hidden states are given."""

    def __init__(self, output: type) -> None:
        super().__init__()
        self._output = output

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> Any:
        return self._output(last_hidden_state=inputs_embeds)


def _gives(head: Head, hidden: Tensor, own: Tensor) -> bool:
    try:
        return torch.equal(head(hidden), own)
    except (AttributeError, TypeError, RuntimeError):  # a forward that asks its base model for more
        return False
