"""Muon for the hidden matrices, AdamW for embeddings and norms; or AdamW for all.

The schedule knows no horizon: after a short warmup the rate stays. A decay is a branch that starts
at some step of the stable run and takes the rate to zero in a given number of steps, as
1 - sqrt(part done).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from selfdraft.train.optimizer import kinds, muon

from settings import Optimizer as Choice
from settings import SettingsError


def make(model: nn.Module, choice: Choice) -> torch.optim.Optimizer:
    if choice.name not in ("muon", "adamw"):
        raise SettingsError(f"optimizer {choice.name!r} is unknown; take 'muon' or 'adamw'")
    if choice.name == "muon":
        return muon(model, choice.muon_lr, choice.adamw_lr, choice.weight_decay, choice.betas)
    found = kinds(model)
    matrices = [*found.hidden, *found.matrices]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": choice.weight_decay},
            {"params": found.vectors, "weight_decay": 0.0},
        ],
        lr=choice.adamw_lr,
        betas=choice.betas,
        fused=True,
    )


def rate(warmup: int, decay: tuple[int, int] | None = None) -> Callable[[int], float]:
    """Factor of the learning rate at a step; `decay` is (first step, number of steps)."""

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, warmup))
        if decay is None or step < decay[0]:
            return warm
        done = min(1.0, (step - decay[0]) / max(1, decay[1]))
        return float(warm * (1.0 - done**0.5))

    return factor
