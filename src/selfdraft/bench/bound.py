"""What the machine could do at best: memory bandwidth, and what a step of n rows costs.

Decoding one token at a time reads all weights once per forward, so bandwidth bounds it. The share of
that bound is bytes of weights read per forward x forwards per second / bandwidth, the bandwidth being
that of a large copy (bytes read and written) in the same run. Keys and values are left out. A model
that fits the processor's last cache can pass 1.

T(n) / T(1) is the time of a greedy engine step with a tree of n rows over that of one row, both on the same
text: how much a draft costs if nothing of it is accepted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..drafting.method import DraftContext
from ..engine.engine import Engine
from ..engine.request import Limits
from ..engine.step import Step
from ..engine.tree import Tree
from ..models.transformers import TransformersModel
from .interval import median

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
HISTORY = 300  # tokens of text before the rows
ROUNDS = 15
SECONDS = 30.0  # rounds stop after this long; there are at least three
COPY = 2**28  # bytes of the copy: far more than any cache


@dataclass
class Wide:
    """Proposes `rows` rows, whatever the text: as a method, and as its drafter."""

    rows: int = 1

    def drafter(self, context: DraftContext) -> Wide:
        return self

    def propose(self, tokens: Sequence[int]) -> Tree:
        return Tree.chain([*tokens[-1:], *tokens[: self.rows - 1]])

    def observe(self, step: Step) -> None:
        pass


def bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.ones(COPY // 4, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * COPY / min(seconds[1:])


def weight_bytes(model: TransformersModel) -> int:
    """Bytes of weights that a forward reads: all but an input embedding that is not the output's too; shared
    layers at every pass."""
    table = model.model.get_input_embeddings().weight
    head = model.model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is table
    total = _bytes(model.model.parameters())
    if model.loops is not None:
        total += (model.loops.count - 1) * _bytes(model.model.model.layers.parameters())
    return total if tied else total - table.numel() * table.element_size()


def _bytes(weights: Iterable[torch.Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)


def row_costs(model: TransformersModel) -> dict[str, object]:
    """T(1) in seconds and T(n) / T(1), medians over rounds in which each n had its turn."""
    room = model.context - 1
    history = [i % model.vocab_size for i in range(min(HISTORY, room // 2))]
    counts = [n for n in ROWS if n + len(ROWS) + 1 <= room - len(history)]
    rounds: list[dict[int, float]] = []
    begun = time.perf_counter()
    while len(rounds) < ROUNDS and (len(rounds) < 4 or time.perf_counter() - begun < SECONDS):
        rounds.append(_round(model, history, counts))
    rounds = rounds[1:]  # the first warms up
    return {
        "seconds": median([one[1] for one in rounds]),
        "ratio": {n: median([one[n] / one[1] for one in rounds]) for n in counts},
        "rounds": len(rounds),
    }


def _round(model: TransformersModel, history: Sequence[int], counts: Sequence[int]) -> dict[int, float]:
    wide = Wide()
    engine = Engine(model)
    request = engine.submit(history, wide, limits=Limits(model.context))
    engine.step()
    out = {}
    for wide.rows in counts:
        start = time.perf_counter()
        engine.step()
        out[wide.rows] = time.perf_counter() - start
    if request.finish_reason is None:
        engine.cancel(request)
    return out


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
