"""What a step costs by its number of rows, measured on this machine. Drafts are sized by it.

Measured are forward and head of chains of several lengths behind a short history, in turn, and the best of a
few rounds counts. Between the lengths measured the time is interpolated, beyond them extrapolated. A step
never counts as cheaper than one with fewer rows: where a measurement says so, it is noise.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from itertools import accumulate, count

import torch

from ..engine.tree import Tree
from .numerics import RowRange
from .protocol import Model

ROWS = (1, 2, 4, 8, 16, 32, 64)
HISTORY = 192
ROUNDS = 3  # at least
SECONDS = 0.5  # and as many more as fit


class StepTimes:
    """Seconds by rows -> what so many rows cost in units of one."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self.rows = sorted(seconds)
        times = list(accumulate((seconds[rows] for rows in self.rows), max))
        self.costs = [t / times[0] for t in times]

    def __call__(self, rows: int) -> float:
        at = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        (a, b), (low, high) = self.rows[at - 1 : at + 1], self.costs[at - 1 : at + 1]
        return max(1.0, low + (high - low) * (rows - a) / (b - a))


def step_times(model: Model, rows_per_call: RowRange) -> StepTimes:
    """Measure a model: the least of several rounds, so that a busy machine is seen through."""
    history = min(HISTORY, max(1, model.context - max(ROWS)))
    widths = [
        rows for rows in _widths(rows_per_call.least, rows_per_call.most) if rows + history <= model.context
    ]
    pool = model.pool()
    cache = pool.open()
    model.forward([Tree.chain([0] * history)], [cache])
    cache.keep(range(history), [])
    trees = {rows: _tree(model, rows) for rows in widths}
    best: dict[int, float] = {}
    started = time.perf_counter()
    for rounds in count():
        if rounds > ROUNDS and time.perf_counter() - started > SECONDS:
            break
        for rows in widths:
            at = time.perf_counter()
            tree, own, masks = trees[rows]
            out = model.forward([tree], [cache])
            model.head(out, [own])
            if masks:
                model.mask_logits(out, [masks], [0], lambda *_: 0)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            took = time.perf_counter() - at
            if rounds:  # the first round warms up
                best[rows] = min(took, best.get(rows, took))
    return StepTimes(best)


def _tree(model: Model, rows: int) -> tuple[Tree, range, range]:
    """A tree of so many rows, its ordinary ones, and a group of its mask rows. With an adapter half of the
    rows carry mask tokens, as in its drafts."""
    look = model.lookahead
    if look is None or not look.ids or rows == 1:
        return Tree.chain([0] * rows), range(rows), range(0)
    own = rows - rows // 2
    masks = [look.ids[i % len(look.ids)] for i in range(rows - own)]
    return Tree.chain([0] * own).hang(own - 1, masks), range(own), range(own, min(rows, own + len(look.ids)))


def _widths(least: int, most: int) -> Iterable[int]:
    """Where to measure: also on both sides of where calls begin to be padded or cut in pieces."""
    return sorted({*ROWS, *(rows for rows in (least, most, most + 1) if rows <= max(ROWS))})
