"""Static key/value buffers, one lane per request.

Each layer has a buffer [lanes, heads, slots, dim] for keys and one for values. A request's history fills its
lane from slot 0; a forward writes its rows right behind, and `keep` moves the accepted ones down to the end
of the history. A chain that is accepted from its root, the usual case, moves nothing.

What a mask hides is still multiplied by zero, and zero times NaN is NaN. So everything written is made
finite, and lanes are zeroed when they are opened. Rows whose keys or values were not finite are noted first
(`Lanes.finite`), since a row must not seem sound because its keys were mended.

Live requests sit in the first lanes so that attention reads a view. When one leaves, the last lane takes its
place: one copy per departure, none per step. A forward over lanes that are not neighbours (while a prompt is
read beside running requests) gathers them, which is slower.

Buffers grow by a sixteenth at least, in blocks of slots: a slot is copied some 16 times in all, which is
little beside the attention that reads it at every step, and little memory lies idle. In exact mode they hold
float64, converted once here.

The soft prefix of an adapter stands in the first slots of every lane, per key/value head, without a position.
Attention masks show it to the rows of mask tokens alone, so no attention code has to know of it.

A looped model passes through the same layers several times, and each pass has keys and values of its own: a
lane is then as many neighbouring sheets of such a layer's buffer, so that the passes can be the batch of one
attention (`models.looped.stages`). In the layers before and after them it has one sheet, as anywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

Pair = tuple[Tensor, Tensor]  # keys and values

BLOCK = 256  # slots a buffer grows by, at least
STRIDE = 32  # attention reads a multiple of this many slots, so that its shapes repeat


class Layer(CacheLayerMixin):
    """Buffers of one layer, [lanes * loops, heads, slots, dim], in transformers' interface. loops: how often
    a forward passes through it."""

    is_sliding = False

    def __init__(self, lanes: Lanes, prefix: Pair | None = None, loops: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lanes = lanes
        self.prefix = prefix or (None, None)
        self.loops = loops

    def update(
        self, key_states: Tensor, value_states: Tensor, loop: int = 0, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the rows of this forward, [lanes, heads, rows, dim], and return all that is read."""
        keys = self.keys = self._write(self.keys, key_states, self.prefix[0], loop)
        values = self.values = self._write(self.values, value_states, self.prefix[1], loop)
        return self.lanes.read(self, keys, loop), self.lanes.read(self, values, loop)

    def _write(self, buffer: Tensor | None, new: Tensor, prefix: Tensor | None, loop: int) -> Tensor:
        buffer = self.lanes.fit(self, buffer, new, prefix)
        self.lanes.write(self, buffer, new, loop)
        return buffer

    def sheets(self, index: int) -> slice:
        """The part of a buffer that a lane has."""
        return slice(index * self.loops, (index + 1) * self.loops)

    def buffers(self) -> list[Tensor]:
        return [buffer for buffer in (self.keys, self.values) if buffer is not None]

    def get_seq_length(self) -> int:
        return 0  # positions and masks are always given, so nothing is derived from this

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.lanes.reach, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass


class Lanes(transformers.Cache):
    """The buffers of all requests of one engine.

    dtype: what they hold; None is the model's own. prefix: per layer, keys and values that stand before
    every history, each [heads, fixed, dim]; None for a layer that keeps none. loops: passes through the
    same layers; unique: how many layers those are; prelude: how many stand before them. unique None: one
    pass through all there are.
    """

    @torch.no_grad()
    def __init__(
        self,
        dtype: torch.dtype | None = None,
        prefix: Sequence[Pair | None] = (),
        loops: int = 1,
        unique: int | None = None,
        prelude: int = 0,
    ) -> None:
        self.own: list[Layer] = []  # the same list as `layers`, by its narrower type
        super().__init__(layers=self.own)  # type: ignore[arg-type]
        self.dtype = dtype
        self.loops, self.unique, self.prelude = loops, unique, prelude
        self.prefix = [pair and (finite_(pair[0].clone()), finite_(pair[1].clone())) for pair in prefix]
        self.fixed = next((pair[0].shape[1] for pair in prefix if pair is not None), 0)  # slots it takes
        self.lanes: list[Lane] = []
        self.idle: Lane | None = None  # the last one to be closed, while no other is open
        # Of the current forward:
        self.where: Sequence[tuple[int, int]] = ()  # lane and first free slot of each request
        self.checks: Tensor | None = None  # sums of keys and values by row, [lanes, rows]
        self.rows = 0  # its rows
        self.start = 0  # first row, where a wide forward runs in pieces
        self.reach = 0  # slots its attention reads

    @torch.inference_mode()
    def open(self, tokens: Sequence[int] = (), salt: str = "") -> Lane:
        """A lane that holds what another one of that salt holds of these tokens, the last token apart."""
        others = [lane for lane in (*self.lanes, self.idle) if lane is not None and lane.salt == salt]
        source = max(others, key=lambda other: other.shares(tokens), default=None)
        shared = source.shares(tokens) if source is not None else 0
        lane, self.idle = self.idle or self.lane(len(self.lanes)), None
        lane.salt, lane.text = salt, ()
        self.lanes.append(lane)
        if lane is source:
            lane.cut(shared)
            return lane
        lane.cut(0)
        for layer in self.own:
            for buffer in layer.buffers():
                buffer[lane.index * layer.loops :, :, self.fixed :].zero_()
        if source is not None and shared:
            self.copy(source.index, lane.index, shared)
            lane.length = shared
        return lane

    tokens = None  # buffers grow as they are written
    free = None

    def renewed(self) -> Self:
        return type(self)(self.dtype, self.prefix, self.loops, self.unique, self.prelude)

    def lane(self, index: int) -> Lane:
        return Lane(self, index)

    def bind(self, lanes: Sequence[Lane], rows: int) -> int:
        """Take these lanes (ascending) for a forward of `rows` rows; the slots its masks must cover."""
        self.checks, self.rows = None, rows
        self.where = [(lane.index, self.fixed + lane.length) for lane in lanes]
        return self.extend(self.fixed + max(lane.length for lane in lanes) + rows)

    def extend(self, slots: int) -> int:
        """Let attention read so many slots, or some more; how many it reads."""
        self.reach = -(-slots // STRIDE) * STRIDE
        return self.reach

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        layer, loop = self.place(layer_idx)
        while layer >= len(self.own):
            index = len(self.own)
            looped = self.unique is not None and 0 <= index - self.prelude < self.unique
            prefix = self.prefix[index] if index < len(self.prefix) else None
            self.own.append(Layer(self, prefix, self.loops if looped else 1))
        return self.own[layer].update(key_states, value_states, loop)

    def place(self, depth: int) -> tuple[int, int]:
        """Which layer the one at a depth is, and which pass through it."""
        if self.unique is None or depth < self.prelude:
            return depth, 0
        loop, layer = divmod(depth - self.prelude, self.unique)
        if loop < self.loops:
            return self.prelude + layer, loop
        return depth - (self.loops - 1) * self.unique, 0

    def write(self, layer: Layer, buffer: Tensor, new: Tensor, loop: int) -> None:
        """Put the rows of this forward behind the bound lanes' histories."""
        rows = new.shape[2]
        for place, (index, at) in enumerate(self.where):
            there = buffer.narrow(0, index * layer.loops + loop, 1).narrow(2, at + self.start, rows)
            there.copy_(new.narrow(0, place, 1))
            finite_(there)
        if self.checks is None:
            self.checks = new.new_zeros(len(self.where), self.rows, dtype=_wide(new.dtype))
        # One reduction finds what is not finite: a sum with NaN or infinity in it is not finite either.
        self.checks[:, self.start : self.start + rows] += new.sum((1, 3), dtype=self.checks.dtype)

    def finite(self) -> Tensor | None:
        """Rows of the current forward whose keys and values were finite when they were written, [lanes, rows]
        bool; None where nothing was written."""
        return None if self.checks is None else self.checks.isfinite()

    def fit(self, layer: Layer, buffer: Tensor | None, new: Tensor, prefix: Tensor | None) -> Tensor:
        """A buffer with room for the bound lanes and slots; contents kept, the prefix in every lane."""
        lanes, slots = (0, 0) if buffer is None else (buffer.shape[0] // layer.loops, buffer.shape[2])
        if buffer is not None and self.reach <= slots and len(self.lanes) <= lanes:
            return buffer
        if self.reach > slots:
            slots = -(-max(self.reach, slots + slots // 16) // BLOCK) * BLOCK
        if len(self.lanes) > lanes:
            lanes = max(len(self.lanes), 2 * lanes)
        if buffer is None:
            buffer = new.new_zeros((0, new.shape[1], 0, new.shape[3]), dtype=self.dtype or new.dtype)
        return self._grow(buffer, lanes * layer.loops, slots, prefix)

    def _grow(self, buffer: Tensor, sheets: int, slots: int, prefix: Tensor | None) -> Tensor:
        """A larger buffer with the same contents, the prefix in every sheet, zeroed elsewhere."""
        grown = buffer.new_zeros((sheets, buffer.shape[1], slots, buffer.shape[3]))
        grown[: buffer.shape[0], :, : buffer.shape[2]] = buffer
        if prefix is not None:
            grown[:, :, : self.fixed] = prefix
        return grown

    def read(self, layer: Layer, buffer: Tensor, loop: int) -> Tensor:
        """The bound lanes' slots, a view where the lanes are neighbours."""
        return pick(buffer.narrow(2, 0, self.reach)[loop :: layer.loops], [index for index, _ in self.where])

    @torch.inference_mode()
    def release(self, lane: Lane) -> None:
        """Free a lane; the last one moves into its place. What the last of all holds stays until another is
        opened, whose text may begin alike."""
        last = self.lanes.pop()
        if last is not lane:
            held = self.fixed + last.held
            for layer in self.own:
                here, there = layer.sheets(lane.index), layer.sheets(last.index)
                for buffer in layer.buffers():
                    if there.start < buffer.shape[0]:  # else nothing was written to it yet
                        buffer[here, :, :held] = buffer[there, :, :held]
            self.lanes[lane.index] = last
            last.index = lane.index
        if not self.lanes:
            lane.index, self.idle = 0, lane
            for layer in self.own:
                if layer.keys is not None and layer.values is not None and len(layer.keys) > layer.loops:
                    layer.keys, layer.values = (
                        layer.keys[: layer.loops].clone(),
                        layer.values[: layer.loops].clone(),
                    )

    @torch.inference_mode()
    def move(self, lane: Lane, path: Sequence[int]) -> None:
        """Move the rows of a path down to the end of a lane's history."""
        moved = next((i for i, row in enumerate(path) if i != row), len(path))
        if moved == len(path):
            return
        self.rearrange(lane, path[moved:], range(moved, len(path)))

    @torch.inference_mode()
    def rearrange(self, lane: Lane, rows: Sequence[int], to: Sequence[int]) -> None:
        """Move rows behind a lane's history to other places there; what is not moved there is lost."""
        end = self.fixed + lane.length
        here, there = [end + row for row in rows], [end + row for row in to]
        for layer in self.own:
            sheets = layer.sheets(lane.index)
            for buffer in layer.buffers():
                buffer[sheets, :, there] = buffer[sheets][:, :, here]

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """Give one lane the first slots of another."""
        for layer in self.own:
            for name, prefix in zip(("keys", "values"), layer.prefix, strict=True):
                buffer = getattr(layer, name)
                if buffer is not None and target * layer.loops >= buffer.shape[0]:
                    sheets = max(len(self.lanes) * layer.loops, 2 * buffer.shape[0])
                    buffer = self._grow(buffer, sheets, buffer.shape[2], prefix)
                    setattr(layer, name, buffer)
                if buffer is not None:
                    held = self.fixed + length
                    buffer[layer.sheets(target), :, :held] = buffer[layer.sheets(source), :, :held]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class Lane:
    """One request's share of the buffers: its cache."""

    def __init__(self, lanes: Lanes, index: int) -> None:
        self.lanes = lanes
        self.index = index
        self.length = 0
        self.salt = ""
        self.text: Sequence[int] = ()  # of which it holds the first tokens

    @property
    def held(self) -> int:
        """Slots, from the first of the history on, that are in use between two forwards."""
        return self.length

    def keep(self, path: Sequence[int], in_flight: Sequence[int]) -> None:
        assert not in_flight, "an ordinary model finishes every row"
        self.lanes.move(self, path)
        self.length += len(path)

    def reserve(self, length: int) -> bool:
        return True  # buffers grow as they are written

    def remember(self, tokens: Sequence[int]) -> None:
        self.text = tokens

    def shares(self, tokens: Sequence[int]) -> int:
        """How many of these tokens it holds, from the first on, the last token apart."""
        most = min(self.length, len(self.text), len(tokens) - 1)
        pairs = enumerate(zip(tokens, self.text, strict=False))
        return next((i for i, (a, b) in pairs if i >= most or a != b), max(0, most))

    def cut(self, length: int) -> None:
        """Hold the first tokens only."""
        assert length <= self.length
        self.length = length

    def close(self) -> None:
        self.lanes.release(self)


def pick(buffer: Tensor, lanes: Sequence[int]) -> Tensor:
    """These lanes of a buffer, ascending; a view where they are neighbours."""
    if lanes[-1] - lanes[0] == len(lanes) - 1:
        return buffer.narrow(0, lanes[0], len(lanes))
    return buffer[list(lanes)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """A dtype in which sums of finite values do not overflow."""
    return torch.promote_types(dtype, torch.float32)


def finite_(part: Tensor) -> Tensor:
    """Zeros, in place, for what is not finite."""
    return part.nan_to_num_(0.0, 0.0, 0.0)
