"""Muon for the hidden matrices, AdamW for embeddings, head and norms.

Where a whole model learned, this trained better than AdamW alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn


class Together(torch.optim.Optimizer):
    """Several optimizers as one. They share the list of parameter groups; each keeps its own state."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the trainer gives no closure"
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        # Loading replaces a part's groups; the schedule must act on the new ones.
        self.param_groups = [group for part in self.parts for group in part.param_groups]


class Kinds(NamedTuple):
    """The parameters of a model by kind."""

    # Matrices between hidden states.
    hidden: list[nn.Parameter]
    # Embeddings and heads.
    matrices: list[nn.Parameter]
    # Norms and biases.
    vectors: list[nn.Parameter]


def kinds(model: nn.Module) -> Kinds:
    found = Kinds([], [], [])
    for name, parameter in model.named_parameters():
        outer = "embed" in name or "lm_head" in name
        kind = found.vectors if parameter.ndim != 2 else found.matrices if outer else found.hidden
        kind.append(parameter)
    return found


def muon(
    model: nn.Module, rate: float, adamw_rate: float, weight_decay: float, betas: tuple[float, float]
) -> Together:
    """The optimizer of a whole model. rate: of Muon, whose update is scaled to AdamW's. Vectors do not
    decay."""
    found = kinds(model)
    return Together(
        torch.optim.Muon(found.hidden, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": found.matrices, "weight_decay": weight_decay},
                {"params": found.vectors, "weight_decay": 0.0},
            ],
            lr=adamw_rate,
            betas=betas,
            fused=True,
        ),
    )
