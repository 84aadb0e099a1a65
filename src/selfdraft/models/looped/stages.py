"""Driving a looped model by stages: rows at different depths in one pass through the shared layers (SPEED,
arXiv 2310.12072).

A stage takes every row that is under way once through the group of layers, each from the depth it has
reached. The linear layers see one batch of rows, so the weights are read once for all of them. Attention
differs by depth: a row reads the keys and values that its history and ancestors left in the same pass. Each
lane of the cache has a sheet per pass, and a stage is one ordinary forward of the group over [requests *
loops] of them, a row standing in the sheet of the pass that it is about to make. Sheets in which no row
stands carry one row that nobody reads: so the shape is the same at every stage, and the buffers are read by
view.

A row never overtakes its parent: all rows under way move by one pass a stage, and a child joins no earlier
than its parent. So what a row attends to is there.

What is under way stays with the lane, tokens, depth and state of each row. A later forward takes a row up
where it stands only if its own tree holds that row on the same path of tokens behind the same history; it
starts all others from their embedding, and forgets what it does not hold. So no drafter, whatever it
proposes, can change a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from ...drafting.method import Loops
from ...engine.tree import Tree
from ...errors import InvalidTree, ModelUnsupported
from ..kv_cache import Lane, Lanes, finite_, pick
from ..protocol import Cache
from ..transformers import TransformersModel, TransformersRows
from .decoder import LoopedModel


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


def matches(tree: Tree, held: Tree) -> dict[int, int]:
    """Rows of a tree that stand on the same path of tokens in another one, and where they are there."""
    same = {0: 0} if tree.tokens[0] == held.tokens[0] else {}
    for row in range(1, len(tree)):
        above = same.get(tree.parents[row])
        old = held.child(above, tree.tokens[row]) if above is not None else None
        if old is not None:
            same[row] = old
    return same


class StageLanes(Lanes):
    """Buffers with a sheet per pass. While a stage is bound, forwards of the group write and read by it."""

    sheets_bound: Sequence[int] = ()  # of the stage under way, ascending
    slots: Tensor  # where their rows are written, [sheets, width]
    index: Tensor  # the sheets, [sheets, 1]

    def lane(self, index: int) -> Lane:
        return StageLane(self, index)

    def write(self, buffer: Tensor, new: Tensor, loop: int) -> None:
        if self.sheets_bound:
            # The states of a row that is not finite show it themselves; only the cache is mended.
            buffer[self.index, :, self.slots] = finite_(new.transpose(1, 2).to(buffer.dtype, copy=True))
        else:
            super().write(buffer, new, loop)

    def read(self, buffer: Tensor, loop: int) -> Tensor:
        if self.sheets_bound:
            return pick(buffer.narrow(2, 0, self.reach), self.sheets_bound)
        return super().read(buffer, loop)

    @contextmanager
    def stage(self, sheets: Sequence[int], slots: Tensor) -> Iterator[None]:
        """Meanwhile forwards of the group write to these slots, [sheets, width], and read these sheets."""
        self.sheets_bound, self.slots = sheets, slots
        self.index = torch.tensor(sheets, device=slots.device)[:, None]
        try:
            yield
        finally:
            self.sheets_bound = ()


@dataclass(frozen=True)
class Stage:
    """What one stage runs. sheets: of the buffers, ascending. most: rows that count in one of them. hidden:
    [sheets, width, size]. positions, slots: [sheets, width]. seen: additive mask, [sheets, 1, width, slots].
    places: of the rows that count, in [sheets * width], request by request."""

    sheets: Sequence[int]
    most: int
    hidden: Tensor
    positions: Tensor
    slots: Tensor
    seen: Tensor
    places: Tensor


class StagedModel(TransformersModel):
    """A looped model behind the engine's interface: whole forwards as any other model, and stages."""

    @property
    def loops(self) -> Loops | None:
        config = self.model.config
        return Loops(config.loops, tuple(config.exit_agreement or ())) if config.loops > 1 else None

    @property
    def _group(self) -> LoopedModel:
        return cast(LoopedModel, self.model.model)

    def pool(self, memory: int | None = None) -> Lanes:
        if self.adapter is not None:  # its prefix differs from pass to pass; it does not run by stages
            return super().pool(memory)
        config = self.model.config
        return StageLanes(*self._stored(), loops=config.loops, unique=config.unique_layers)

    @torch.inference_mode()
    def forward(
        self,
        trees: Sequence[Tree],
        caches: Sequence[Cache],
        stages: int | None = None,
        wanted: Sequence[int] | None = None,
    ) -> TransformersRows:
        lanes = [lane for lane in caches if isinstance(lane, StageLane)]
        if stages is None and all(lane.in_flight is None for lane in lanes):
            return super().forward(trees, caches)
        if len(lanes) < len(caches):
            raise ModelUnsupported("stages do not go together with an adapter's mask tokens")
        loops = self.model.config.loops
        flights = [self._begin(tree, lane) for tree, lane in zip(trees, lanes, strict=True)]
        for _ in range(min(stages or loops, loops)):
            if all(made == loops for in_flight in flights for made in in_flight.passes):
                break
            self._advance(flights, lanes)
        start = [sum(len(tree) for tree in trees[:i]) for i in range(len(trees))]
        states = torch.cat([in_flight.states for in_flight in flights])
        done = [[made == loops for made in in_flight.passes] for in_flight in flights]
        return TransformersRows(self._group.readout(states), start, done)

    def _begin(self, tree: Tree, lane: StageLane) -> Flight:
        last = lane.length + max(tree.depth)
        if last >= self.context:
            raise InvalidTree(
                f"a row in flight stands at position {last}; the model's context is {self.context}"
            )
        embedding = self.model.get_input_embeddings()
        return lane.begin(tree, lambda tokens: embedding(torch.tensor(tokens, device=self.device)))

    def _advance(self, flights: Sequence[Flight], lanes: Sequence[StageLane]) -> None:
        """Take all rows that are not done through the group once."""
        order = sorted(range(len(lanes)), key=lambda i: lanes[i].index)
        flights, lanes = [flights[i] for i in order], [lanes[i] for i in order]
        pool = cast(StageLanes, lanes[0].lanes)
        loops = self.model.config.loops
        spots = [_spots(in_flight.tree.parents, tuple(in_flight.passes), loops) for in_flight in flights]
        stage = self._stage(flights, lanes, spots, pool)
        out = self._run_stage(stage, pool).flatten(0, 1)[stage.places]
        parts = out.split([len(own.rows) for own in spots])
        for in_flight, own, states in zip(flights, spots, parts, strict=True):
            if len(own.rows) == len(in_flight.tree):
                in_flight.states = states
            else:
                in_flight.states[own.rows] = states
            for row in own.rows:
                in_flight.passes[row] += 1

    def _stage(
        self,
        flights: Sequence[Flight],
        lanes: Sequence[StageLane],
        spots: Sequence[Spots],
        pool: StageLanes,
    ) -> Stage:
        """Lay the rows out: each in the sheet of its next pass, behind those of its request already there."""
        loops, dtype = self.model.config.loops, pool.dtype or self.dtype
        sheets = [lane.index * loops + loop for lane in lanes for loop in range(loops)]
        most = max(own.most for own in spots)
        width = max(self.rows.pieces(most, b - a)[-1][1] for a, b in self._calls(len(sheets)))
        firsts = [pool.fixed + lane.length for lane in lanes]
        ends = [first + len(in_flight.tree) for first, in_flight in zip(firsts, flights, strict=True)]
        reach = pool.extend(max(ends) + width)
        # What carries no row writes behind the tree, and is read by nobody.
        slots = torch.tensor(ends).repeat_interleave(loops)[:, None] + torch.arange(width)
        positions = torch.zeros_like(slots)
        seen = torch.full((len(sheets) * width, reach), torch.finfo(dtype).min, dtype=dtype)
        every = []
        for i, (first, own) in enumerate(zip(firsts, spots, strict=True)):
            mine = (own.sheet + i * loops) * width + own.rank
            seen[i * loops * width : (i + 1) * loops * width, pool.fixed : max(first, 1)] = 0
            hidden_from = seen.new_zeros(own.visible.shape).masked_fill_(~own.visible, torch.finfo(dtype).min)
            seen[mine, first : first + own.visible.shape[1]] = hidden_from
            slots.view(-1)[mine] = own.order + first
            positions.view(-1)[mine] = own.depth + lanes[i].length
            every.append(mine)
        device = self.device
        places = (torch.cat(every) if len(every) > 1 else every[0]).to(device)
        states = [
            f.states if len(own.rows) == len(f.tree) else f.states[own.rows]
            for f, own in zip(flights, spots, strict=True)
        ]
        together = torch.cat(states) if len(states) > 1 else states[0]
        hidden = together.new_zeros(len(sheets) * width, together.shape[-1])
        hidden[places] = together
        return Stage(
            sheets,
            most,
            hidden.view(len(sheets), width, -1),
            positions.to(device),
            slots.to(device),
            seen.view(len(sheets), 1, width, reach).to(device),
            places,
        )

    def _run_stage(self, stage: Stage, pool: StageLanes) -> Tensor:
        """States of all places, [sheets, width, hidden], in calls whose row counts keep the bits."""
        group = self._group
        cosines, sines = group.rotary_emb(stage.hidden, stage.positions)
        out = torch.zeros_like(stage.hidden)
        for first, last in self._calls(len(stage.sheets)):
            for start, stop in self.rows.pieces(stage.most, last - first):
                part = slice(first, last), slice(start, stop)
                mask = stage.seen[first:last, :, start:stop]
                with pool.stage(stage.sheets[first:last], stage.slots[part]):
                    rotation = cosines[part], sines[part]
                    out[part] = group.group(stage.hidden[part], mask, rotation, pool)
        return out

    def _calls(self, sheets: int) -> list[tuple[int, int]]:
        """Spans of sheets that one call of the group can have together, in order."""
        spans, at = [], 0
        while at < sheets:
            stop = at + self.rows.together(sheets - at)
            spans.append((at, stop))
            at = stop
        return spans


@dataclass(frozen=True)
class Spots:
    """Where the rows of a request go that are under way; all but `rows` and `most` are tensors, one entry a
    row.

    rows: which rows of the tree they are, as order. sheet: the passes that each has made. rank: its place
    among those that have made as many; most: how many such there are, at most. depth: its own in the tree.
    visible: [rows, rows of the tree] bool."""

    rows: list[int]
    most: int
    order: Tensor
    sheet: Tensor
    rank: Tensor
    depth: Tensor
    visible: Tensor


@lru_cache(maxsize=1024)
def _spots(parents: tuple[int, ...], passes: tuple[int, ...], loops: int) -> Spots:
    """Follows from its arguments alone, which come again from step to step: so it is remembered."""
    tree = Tree((0,) * len(parents), parents)
    rows = [row for row, made in enumerate(passes) if made < loops]
    counts, rank = [0] * loops, []
    for row in rows:
        rank.append(counts[passes[row]])
        counts[passes[row]] += 1
    order = torch.tensor(rows, dtype=torch.long)
    sheet, depth = torch.tensor(passes)[order], torch.tensor(tree.depth)[order]
    return Spots(
        rows, max(counts), order, sheet, torch.tensor(rank, dtype=torch.long), depth, tree.visible[order]
    )
