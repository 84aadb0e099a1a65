"""The cache of a looped model that runs by stages: what is under way stays with the lane.

Tokens, depth and state of each row that is under way are kept with the lane. A later forward takes a row up
where it stands only if its own tree holds that row on the same path of tokens behind the same history; it
starts all others from their embedding, and forgets what it does not hold. So no drafter, whatever it
proposes, can change a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ...engine.tree import Tree, matches
from ..kv_cache import Lane, Lanes, Layer, finite_, pick


@dataclass
class Flight:
    """Rows that a lane has under way. passes: how many each has made. states: [rows, hidden], after them."""

    tree: Tree
    passes: list[int]
    states: Tensor

    def take(self, rows: Sequence[int]) -> Flight:
        """These rows, the first of which is above all others."""
        new = {row: i for i, row in enumerate(rows)}
        tokens = tuple(self.tree.tokens[row] for row in rows)
        parents = tuple(new.get(self.tree.parents[row], -1) for row in rows)
        passes = [self.passes[row] for row in rows]
        whole = len(rows) == len(self.passes)
        return Flight(Tree(tokens, parents), passes, self.states if whole else self.states[list(rows)])


class StageLane(Lane):
    """A lane that knows what is under way behind its history."""

    in_flight: Flight | None = None

    @property
    def held(self) -> int:
        return self.length + (len(self.in_flight.tree) if self.in_flight is not None else 0)

    def keep(self, path: Sequence[int], in_flight: Sequence[int]) -> None:
        rows = [*path, *in_flight]
        self.lanes.move(self, rows)
        self.length += len(path)
        self.in_flight = self.in_flight.take(in_flight) if self.in_flight is not None and in_flight else None

    def cut(self, length: int) -> None:
        super().cut(length)
        self.in_flight = None

    def begin(self, tree: Tree, embed: Callable[[Sequence[int]], Tensor]) -> Flight:
        """The rows of a tree, each as far as it has come. embed: tokens to where they start, [rows,
        hidden]."""
        held = self.in_flight
        same = matches(tree, held.tree) if held is not None else {}
        new = [row for row in range(len(tree)) if row not in same]
        passes = [0] * len(tree)
        states = embed([tree.tokens[row] for row in new]) if new else torch.empty(0)
        if same:
            assert held is not None
            old = list(same.values())
            if any(row != old for row, old in same.items()):
                self.lanes.rearrange(self, old, list(same))
            for row, at in same.items():
                passes[row] = held.passes[at]
            kept = held.states if old == list(range(len(held.tree))) else held.states[old]
            states = torch.cat([kept, states]) if new else kept
            if [*same, *new] != list(range(len(tree))):
                states = states[_inverse([*same, *new])]
        self.in_flight = Flight(tree, passes, states)
        return self.in_flight


def _inverse(order: Sequence[int]) -> list[int]:
    """Where each number stands in an order of all of them."""
    return sorted(range(len(order)), key=lambda at: order[at])


class StageLanes(Lanes):
    """Buffers with a sheet per pass. While a stage is bound, forwards of its layers write and read by it."""

    sheets_bound: Sequence[int] = ()  # of the stage under way, ascending
    slots: Tensor  # where their rows are written, [sheets, width]
    index: Tensor  # the sheets, [sheets, 1]

    def lane(self, index: int) -> Lane:
        return StageLane(self, index)

    def write(self, layer: Layer, buffer: Tensor, new: Tensor, loop: int) -> None:
        if self.sheets_bound:
            # The states of a row that is not finite show it themselves; only the cache is mended.
            buffer[self.index, :, self.slots] = finite_(new.transpose(1, 2).to(buffer.dtype, copy=True))
        else:
            super().write(layer, buffer, new, loop)

    def read(self, layer: Layer, buffer: Tensor, loop: int) -> Tensor:
        if self.sheets_bound:
            return pick(buffer.narrow(2, 0, self.reach), self.sheets_bound)
        return super().read(layer, buffer, loop)

    @contextmanager
    def stage(self, sheets: Sequence[int], slots: Tensor) -> Iterator[None]:
        """Meanwhile forwards write to these slots, [sheets, width], and read these sheets."""
        self.sheets_bound, self.slots = sheets, slots
        self.index = torch.tensor(sheets, device=slots.device)[:, None]
        try:
            yield
        finally:
            self.sheets_bound = ()
