"""The limits of the machine: memory bandwidth, and the cost of a step by its number of rows.

Decoding one token at a time reads all weights once per forward, so memory bandwidth bounds its speed. The
share of that bound is the bytes of weights read per forward, times forwards per second, over the bandwidth
of a large copy (bytes read and written) measured in the same run. Keys and values are left out. A model that
fits into the processor's last cache can exceed 1.

T(n) / T(1) is the time of a greedy engine step with a tree of n rows over that of one row, both on the same
text: the cost of a draft of which nothing is accepted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..drafting.method import DraftContext
from ..engine.engine import Engine
from ..engine.step import Step
from ..engine.tree import Tree
from ..models.loading import AnyModel
from ..params import SamplingParams
from .interval import median

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
HISTORY = 300  # tokens of text before the rows
ROUNDS = 15
SECONDS = 30.0  # rounds stop after this long; there are at least three
COPY = 2**28  # bytes of the copy: far more than any cache


@dataclass
class Wide:
    """A method, and its drafter, that proposes `rows` rows whatever the text is."""

    rows: int = 1

    def drafter(self, context: DraftContext) -> Wide:
        return self

    def propose(self, tokens: Sequence[int]) -> Tree:
        return Tree.chain([*tokens[-1:], *tokens[: self.rows - 1]])

    def observe(self, step: Step) -> None:
        pass


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.ones(COPY // 4, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * COPY / min(seconds[1:])


def row_costs(model: AnyModel) -> dict[str, object]:
    """T(1) in seconds and T(n) / T(1), as medians over rounds that measure every n once."""
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


def _round(model: AnyModel, history: Sequence[int], counts: Sequence[int]) -> dict[int, float]:
    wide = Wide()
    engine = Engine(model)
    request = engine.submit(history, wide, SamplingParams(max_new_tokens=model.context))
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
