"""The training loss of a looped model that is read out after every pass, and the quality of its readouts.

As in SPEED (arXiv 2310.12072), the loss is the sum of the cross-entropies after every pass, all through one
norm and head, with larger weights for later passes (`exit_weights`). Three options are ours. Early passes may
learn the distribution of the last pass instead of its target ("last"), since an early pick helps only where
it is the final pick. The last pass may learn a teacher's distribution, which holds more information than the
next token. And early passes are read at a random share of the positions. This keeps the expected loss and
saves most of the head, which costs as much as a pass of a small model.

A coda runs after every pass at all positions. There it sees the states after the same pass, as if it were the
last; in a pipeline it sees tokens before that have come further.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..models.looped.decoder import LoopedForCausalLM, exit_weights
from .windows import IDS

Early = Literal["last", "same"]


@dataclass(frozen=True)
class Places:
    """A data collator that draws the positions at which early passes are read, keyed by a row's "draw".

    Returns ids, [windows, length], and places, [windows * read]: indices into the flattened positions that
    have a next token.
    """

    # Share of a window's positions to read.
    share: float

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = torch.stack([torch.as_tensor(row[IDS], dtype=torch.long) for row in rows])
        room = ids.shape[1] - 1
        count = max(1, round(self.share * room))
        places = [i * room + _drawn(room, count, row["draw"]) for i, row in enumerate(rows)]
        return {"ids": ids, "places": torch.cat(places)}


def _drawn(room: int, count: int, draw: int) -> Tensor:
    return torch.randperm(room, generator=torch.Generator().manual_seed(draw))[:count]


def exit_loss(
    model: LoopedForCausalLM, ids: Tensor, places: Tensor, early: Early, teacher: Tensor | None = None
) -> Tensor:
    """The loss of a batch of `Places`.

    teacher: a distribution to learn instead of the next tokens, [windows * (length - 1), vocabulary]. With
    all places, early="same" and no teacher this is the loss that the model computes from labels.
    """
    aim = ids[:, 1:].flatten() if teacher is None else teacher
    return readout_loss(model, _states(model, ids), aim, places, early)


@torch.no_grad()
def distribution(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """A model's probabilities at the positions that have a next token, [windows * (length - 1),
    vocabulary]."""
    logits: Tensor = model(input_ids=ids[:, :-1], use_cache=False).logits
    return logits.flatten(0, 1).float().softmax(-1)


def readout_loss(
    model: LoopedForCausalLM, states: Sequence[Tensor], aim: Tensor, places: Tensor, early: Early
) -> Tensor:
    """The loss from hidden states after every pass, each [rows, hidden]; the last pass is read at all rows.

    aim: the target of the last pass, tokens [rows] or distributions [rows, vocabulary].
    """
    last = model.lm_head(model.model.readout(states[-1])).float()
    *weights, weight = exit_weights(len(states))
    loss = weight * cross_entropy(last, aim)
    target = last[places].detach().softmax(-1) if early == "last" else aim[places]
    for weight, state in zip(weights, states[:-1], strict=True):
        logits = model.lm_head(model.model.readout(_read(state, places))).float()
        loss = loss + weight * cross_entropy(logits, target)
    return loss


def _read(state: Tensor, places: Tensor) -> Tensor:
    return state[places]


def _states(model: LoopedForCausalLM, ids: Tensor) -> list[Tensor]:
    """States after every pass as they are read out, behind the coda, at positions that have a next token,
    [windows * (length - 1), hidden]."""
    out = model.model(ids, output_exits=True, use_cache=False)
    return [state[:, :-1].flatten(0, 1) for state in out.exits]


@dataclass(frozen=True)
class Exits:
    """The quality of the readouts on held-out windows, by pass."""

    tokens: int
    # Nats per token.
    loss: list[float]
    # Share of the positions at which the most likely token is that of the last pass.
    agreement: list[float]

    def figures(self, prefix: str) -> dict[str, float]:
        """The figures as entries of a flat log."""
        named = {"loss": self.loss, "agreement": self.agreement}
        return {
            f"{prefix}_{name}_{g}": x for name, all_ in named.items() for g, x in enumerate(all_, start=1)
        }


@torch.no_grad()
def measure(model: LoopedForCausalLM, rows: Any, batch: int, autocast: bool) -> Exits:
    """Measure the readouts. autocast: multiply in bfloat16, as in training, not in the dtype of the
    weights."""
    sums, same, count = torch.zeros(model.config.loops), torch.zeros(model.config.loops), 0
    with evaluating(model), torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        for part in rows.iter(batch):
            ids = torch.as_tensor(part[IDS], dtype=torch.long).to(model.device)
            labels = ids[:, 1:].flatten()
            states = _states(model, ids)
            final = model.lm_head(model.model.readout(states[-1])).argmax(-1)
            for i, state in enumerate(states):
                logits = model.lm_head(model.model.readout(state)).float()
                sums[i] += cross_entropy(logits, labels, reduction="sum").cpu()
                same[i] += (logits.argmax(-1) == final).sum().cpu()
            count += len(labels)
    return Exits(count, _rounded(sums / count), _rounded(same / count))


def _rounded(figures: Tensor) -> list[float]:
    return [round(x, 4) for x in figures.tolist()]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
