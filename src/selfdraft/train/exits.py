"""The loss of a looped model that is to be read after every group; and how well it can be.

As SPEED (arXiv 2310.12072) trains: the sum of the cross-entropies after every group, through the one norm and
head, later ones weighing more (`exit_weights`). Three things are ours. Early groups may learn the final
readout's own distribution instead of what that one learns ("last"): a pick after an early group is worth
something where it is the final pick. What the final readout learns may be a teacher's distribution, which
says more a token than what came. And early groups are read at a share of the positions only, drawn anew each
time, which leaves the expected loss and saves most of the head, as dear as a group of a small model.
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
    """A data collator for rows with "draw", the number of the use. share: of the positions of a window at
    which early groups are read. -> ids [windows, length], places [windows * read]: rows of the flattened
    positions that have a next token."""

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
    """ids, places: of `Places`. teacher: a distribution to learn instead of the tokens that came, [windows *
    (length - 1), vocabulary]. With all places, early="same" and no teacher it is the model's own loss of
    labels."""
    aim = ids[:, 1:].flatten() if teacher is None else teacher
    return readout_loss(model, _states(model, ids), aim, places, early)


@torch.no_grad()
def distribution(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """What a model says at the positions with a next token, [windows * (length - 1), vocabulary]."""
    logits: Tensor = model(input_ids=ids[:, :-1], use_cache=False).logits
    return logits.flatten(0, 1).float().softmax(-1)


def readout_loss(
    model: LoopedForCausalLM, states: Sequence[Tensor], aim: Tensor, places: Tensor, early: Early
) -> Tensor:
    """states: after every group, [rows, hidden]. aim: of the last one, tokens [rows] or distributions [rows,
    vocabulary]. The last group is read at all rows."""
    last = model.lm_head(model.model.readout(states[-1])).float()
    *weights, weight = exit_weights(len(states))
    loss = weight * cross_entropy(last, aim)
    told = last[places].detach().softmax(-1) if early == "last" else aim[places]
    for weight, state in zip(weights, states[:-1], strict=True):
        logits = model.lm_head(model.model.readout(_read(state, places))).float()
        loss = loss + weight * cross_entropy(logits, told)
    return loss


def _read(state: Tensor, places: Tensor) -> Tensor:
    return state[places]


def _states(model: LoopedForCausalLM, ids: Tensor) -> list[Tensor]:
    """After every group, of the positions with a next token, [windows * (length - 1), hidden]."""
    out = model.model(ids, output_hidden_states=True, use_cache=False)
    return [state[:, :-1].flatten(0, 1) for state in out.hidden_states[1:]]


@dataclass(frozen=True)
class Exits:
    """By group, on held-out windows. loss: nats per token. agreement: share of the positions at which the
    likeliest token is that after the last group."""

    tokens: int
    loss: list[float]
    agreement: list[float]

    def figures(self, prefix: str) -> dict[str, float]:
        """As a flat log has them."""
        named = {"loss": self.loss, "agreement": self.agreement}
        return {
            f"{prefix}_{name}_{g}": x for name, all_ in named.items() for g, x in enumerate(all_, start=1)
        }


@torch.no_grad()
def measure(model: LoopedForCausalLM, rows: Any, batch: int, autocast: bool) -> Exits:
    """autocast: products in bfloat16, as in training; else in the weights' own dtype."""
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
