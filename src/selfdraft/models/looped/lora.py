"""A low-rank delta per pass beside each shared matrix (Relaxed Recursive Transformers, arXiv 2410.20672).

The weights of U layers serve all passes, and each pass adds a small matrix of its own: W + B_g A_g in pass g.
All A stand in one matrix, all B in another. A row is multiplied by all of A, what belongs to other passes is
set to zero, and the rest is multiplied by all of B: adding zeros changes no bit, so rows of different passes
share these two products as they share that with W, and every row's delta is the same chain of operations in a
stage and in a whole forward.

A layer is told which passes its rows make, and lets its matrices know by a `Turn`, since transformers' layers
hand them nothing but the rows. It is an argument of each layer's call so that gradient checkpointing, which
calls layers once more in the backward pass, gives it again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .config import LoopedConfig


class Turn(threading.local):
    """Which columns of A x the rows of a layer's current call have no part in. Each thread has its own, so
    that several can run one model at the same time."""

    closed: Tensor | None = None  # as `closed` makes it

    @contextmanager
    def of(self, closed: Tensor) -> Iterator[None]:
        """For the time of one call."""
        self.closed = closed
        try:
            yield
        finally:
            self.closed = None

    def __reduce__(self) -> Any:
        """A copy of a model has one of its own."""
        return type(self), ()


class RelaxedLinear(torch.nn.Linear):
    """A shared linear layer with a delta per pass. down: all A, [loops * rank, in]; up: all B, [out,
    loops * rank]."""

    def __init__(self, shared: torch.nn.Linear, loops: int, rank: int, turn: Turn) -> None:
        super().__init__(shared.in_features, shared.out_features, shared.bias is not None)
        self.rank, self.turn = rank, turn
        self.down = torch.nn.Linear(shared.in_features, loops * rank, bias=False)
        self.up = torch.nn.Linear(loops * rank, shared.out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        assert self.turn.closed is not None, "layers with deltas run inside a pass"
        delta: Tensor = self.up(self.down(input).masked_fill(self.turn.closed, 0.0))
        return super().forward(input) + delta

    @torch.no_grad()
    def approach(self, loop: int, weight: Tensor) -> None:
        """Make the matrix of a pass as near to this one as its rank allows: by the truncated singular value
        decomposition of the difference, each half of the delta having the roots of the singular values."""
        delta = weight.to(self.weight.device, torch.float32) - self.weight.float()
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        roots, own = values[: self.rank].sqrt(), slice(loop * self.rank, (loop + 1) * self.rank)
        self.down.weight[own] = (roots[:, None] * right[: self.rank]).to(self.weight.dtype)
        self.up.weight[:, own] = (left[:, : self.rank] * roots).to(self.weight.dtype)


class RelaxedLayer(LlamaDecoderLayer):
    """A layer whose matrices have a delta per pass."""

    def __init__(self, config: LoopedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        assert config.lora_rank is not None
        self.turn = Turn()
        for name, module in list(self.named_modules()):
            if type(module) is torch.nn.Linear:
                self.set_submodule(name, RelaxedLinear(module, config.loops, config.lora_rank, self.turn))

    def forward(self, hidden_states: Tensor, *, closed: Tensor, **kwargs: Any) -> Tensor:
        """closed: see there."""
        with self.turn.of(closed):
            return cast(Tensor, super().forward(hidden_states, **kwargs))


def closed(passes: int | Tensor, config: LoopedConfig, device: torch.device) -> Tensor:
    """Which columns of A x rows have no part in, those of other passes: bool, [loops * rank] or [lanes, 1,
    loops * rank]. passes: that of all rows, or [lanes] int64."""
    assert config.lora_rank is not None
    own = torch.eye(config.loops, dtype=torch.bool, device=device).repeat_interleave(config.lora_rank, 1)
    others = ~own[passes]
    return others if others.ndim == 1 else others[:, None]


def relaxed(layer: torch.nn.Module) -> dict[str, RelaxedLinear]:
    """Those of its linear layers that have a delta, by name."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, RelaxedLinear)}
