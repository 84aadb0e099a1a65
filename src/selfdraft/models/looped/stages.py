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

Rows that join go through the prelude first. Before rows are read they all go through the coda, whatever their
depth, as in LoopSpec (arXiv 2609.17184). The coda has one sheet: a row leaves its keys and values there anew
after each stage, so a row reads those of the last pass that its ancestors have made. At full depth these have
come as far, and the readout is that of a whole forward; before, it is a guess anyway.

`lanes` has what stays between two forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from ...drafting.method import Loops
from ...engine.tree import Tree
from ...errors import InvalidTree, ModelUnsupported
from ..kv_cache import Lanes
from ..protocol import Cache
from ..transformers import TransformersModel, TransformersRows
from .decoder import LoopedModel, Pass
from .lanes import Flight, StageLane, StageLanes


@dataclass(frozen=True)
class Spots:
    """Where some rows of a request go in its sheets; all but `rows` and `most` are tensors, one entry a row.

    rows: which rows of the tree they are, as order. sheet: of the request's own. rank: a row's place in its
    sheet; most: how many rows one sheet has, at most. depth: its own in the tree. visible: [rows, rows of
    the tree] bool."""

    rows: Sequence[int]
    most: int
    order: Tensor
    sheet: Tensor
    rank: Tensor
    depth: Tensor
    visible: Tensor


@lru_cache(maxsize=1024)
def _spots(parents: tuple[int, ...], rows: tuple[int, ...], sheets: tuple[int, ...]) -> Spots:
    """sheets: of each row. Follows from its arguments alone, which come again from step to step: so it is
    remembered."""
    tree = Tree((0,) * len(parents), parents)
    counts, rank = [0] * (max(sheets, default=0) + 1), []
    for sheet in sheets:
        rank.append(counts[sheet])
        counts[sheet] += 1
    order, ranks = torch.tensor(rows, dtype=torch.long), torch.tensor(rank, dtype=torch.long)
    sheet_of, depth = torch.tensor(sheets, dtype=torch.long), torch.tensor(tree.depth)[order]
    return Spots(rows, max(counts), order, sheet_of, ranks, depth, tree.visible[order])


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


Chosen = tuple[tuple[int, ...], tuple[int, ...]]  # rows of a tree, and the sheet of each


@dataclass(frozen=True)
class Layers:
    """Layers that rows go through together. run: [sheets, width, hidden] -> the same, of sheets of these
    passes, [sheets] int64. first: index of their first in the cache. loops: sheets of a request there."""

    run: Callable[..., Tensor]
    first: int
    loops: int = 1


class StagedModel(TransformersModel):
    """A looped model behind the engine's interface: whole forwards as any other model, and stages."""

    @property
    def loops(self) -> Loops | None:
        config = self.model.config
        return Loops(config.loops, tuple(config.exit_agreement or ())) if config.loops > 1 else None

    @property
    def _looped(self) -> LoopedModel:
        return cast(LoopedModel, self.model.model)

    def pool(self, memory: int | None = None) -> Lanes:
        if self.adapter is not None:  # its prefix differs from pass to pass; it does not run by stages
            return super().pool(memory)
        config = self.model.config
        return StageLanes(*self._stored(), config.loops, config.unique_layers, config.prelude)

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
        self._join(flights, lanes)
        for _ in range(min(stages or loops, loops)):
            if all(made == loops for in_flight in flights for made in in_flight.passes):
                break
            self._advance(flights, lanes)
        states = torch.cat(self._read(flights, lanes))
        start = [sum(len(tree) for tree in trees[:i]) for i in range(len(trees))]
        done = [[made == loops for made in in_flight.passes] for in_flight in flights]
        return TransformersRows(self._looped.readout(states), start, done)

    def _begin(self, tree: Tree, lane: StageLane) -> Flight:
        last = lane.length + max(tree.depth)
        if last >= self.context:
            raise InvalidTree(
                f"a row in flight stands at position {last}; the model's context is {self.context}"
            )
        embedding = self.model.get_input_embeddings()
        return lane.begin(tree, lambda tokens: embedding(torch.tensor(tokens, device=self.device)))

    def _join(self, flights: Sequence[Flight], lanes: Sequence[StageLane]) -> None:
        """Take the rows that have just started through the prelude."""
        part = self._looped.prelude
        new = [[row for row, made in enumerate(f.passes) if made == 0] for f in flights]
        if len(part) and any(new):
            chosen = [(tuple(rows), (0,) * len(rows)) for rows in new]
            layers = Layers(self._once(part), 0)
            self._move(flights, chosen, self._run_rows(flights, lanes, chosen, layers))

    def _advance(self, flights: Sequence[Flight], lanes: Sequence[StageLane]) -> None:
        """Take all rows that are not done through the group once."""
        config = self.model.config
        chosen = []
        for in_flight in flights:
            rows = tuple(row for row, made in enumerate(in_flight.passes) if made < config.loops)
            chosen.append((rows, tuple(in_flight.passes[row] for row in rows)))
        layers = Layers(self._looped.group, config.prelude, config.loops)
        self._move(flights, chosen, self._run_rows(flights, lanes, chosen, layers))
        for in_flight, (rows, _) in zip(flights, chosen, strict=True):
            for row in rows:
                in_flight.passes[row] += 1

    def _read(self, flights: Sequence[Flight], lanes: Sequence[StageLane]) -> list[Tensor]:
        """The states of all rows behind the coda."""
        part = self._looped.coda
        if not len(part):
            return [in_flight.states for in_flight in flights]
        chosen = [(tuple(range(len(f.tree))), (0,) * len(f.tree)) for f in flights]
        layers = Layers(self._once(part), self.model.config.num_hidden_layers - len(part))
        return self._run_rows(flights, lanes, chosen, layers)

    def _once(self, part: torch.nn.ModuleList) -> Callable[..., Tensor]:
        """Layers that do not ask which pass it is."""
        through = self._looped.through
        return lambda hidden, passes, cache, **given: through(part, hidden, cache, **given)

    def _move(self, flights: Sequence[Flight], chosen: Sequence[Chosen], states: Sequence[Tensor]) -> None:
        """Note how far the chosen rows have come."""
        for in_flight, (rows, _), new in zip(flights, chosen, states, strict=True):
            if len(rows) == len(in_flight.tree):
                in_flight.states = new
            else:
                in_flight.states[list(rows)] = new

    def _run_rows(
        self,
        flights: Sequence[Flight],
        lanes: Sequence[StageLane],
        chosen: Sequence[Chosen],
        layers: Layers,
    ) -> list[Tensor]:
        """States of the chosen rows of each request behind some layers, [rows, hidden]."""
        order = sorted(range(len(lanes)), key=lambda i: lanes[i].index)
        spots = [_spots(flights[i].tree.parents, *chosen[i]) for i in order]
        pool = cast(StageLanes, lanes[0].lanes)
        stage = self._stage([flights[i] for i in order], [lanes[i] for i in order], spots, pool, layers.loops)
        out = self._run_stage(stage, pool, layers).flatten(0, 1)[stage.places]
        parts = dict(zip(order, out.split([len(own.rows) for own in spots]), strict=True))
        return [parts[i] for i in range(len(lanes))]

    def _stage(
        self,
        flights: Sequence[Flight],
        lanes: Sequence[StageLane],
        spots: Sequence[Spots],
        pool: StageLanes,
        loops: int,
    ) -> Stage:
        """Lay the rows out, each in its sheet, of which a request has as many as `loops`, behind those of its
        request already there."""
        dtype = pool.dtype or self.dtype
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
            f.states if len(own.rows) == len(f.tree) else f.states[list(own.rows)]
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

    def _run_stage(self, stage: Stage, pool: StageLanes, layers: Layers) -> Tensor:
        """States of all places, [sheets, width, hidden], in calls whose row counts keep the bits."""
        cosines, sines = self._looped.rotary_emb(stage.hidden, stage.positions)
        cache = Pass(pool, layers.first)
        passes = torch.tensor(stage.sheets, device=self.device) % layers.loops
        out = torch.zeros_like(stage.hidden)
        for first, last in self._calls(len(stage.sheets)):
            for start, stop in self.rows.pieces(stage.most, last - first):
                part = slice(first, last), slice(start, stop)
                with pool.stage(stage.sheets[first:last], stage.slots[part]):
                    out[part] = layers.run(
                        stage.hidden[part],
                        passes[first:last],
                        cache,
                        attention_mask=stage.seen[first:last, :, start:stop],
                        position_embeddings=(cosines[part], sines[part]),
                    )
        return out

    def _calls(self, sheets: int) -> list[tuple[int, int]]:
        """Spans of sheets that one call of layers can have together, in order."""
        spans, at = [], 0
        while at < sheets:
            stop = at + self.rows.together(sheets - at)
            spans.append((at, stop))
            at = stop
        return spans
