"""What steps of the decoder need beside the model: pages of keys and values, scratch memory, results."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .decoder_build import Build
from .kernels import structures
from .kernels.library import Library
from .paged_cache import PagePool
from .weights import GROUP

PARTIAL_FLOATS = 1 << 22
MAX_TILE = 8
"""Rows that products take together, at most: inputs have room for whole tiles."""


class DecoderPool(PagePool):
    """The pages of one engine's requests, and the scratch memory and results of its steps."""

    def __init__(
        self, layers: int, key_heads: int, head_size: int, wide: int, page: int, capacity: int, work: Work
    ) -> None:
        super().__init__(layers, key_heads, head_size, wide, page, capacity)
        self.work = work

    def renewed(self) -> Self:
        pool = super().renewed()
        pool.work = self.work.renewed()
        return pool


class Work:
    """Scratch memory and results of an engine's steps, which grow with the rows."""

    def __init__(
        self, built: Build, library: Library, threads: int, activations: int = 8, rank: int = 0
    ) -> None:
        """activations: bits of the inputs of products with quantised weights. rank: of an adapter's LoRA."""
        self._asked = built, library, threads, activations, rank
        self._built, self._library, self._activations, self._rank = built, library, activations, rank
        self.steps = 0
        self._rows = self._wanted = 0
        self._arrays: dict[str, NDArray[Any]] = {
            "scratch": np.zeros(threads * library.scratch_bytes, np.uint8),
            "partials": np.zeros(PARTIAL_FLOATS, np.float32),
        }
        self.structure = structures.Work()
        self.grow(64, 64)

    def renewed(self) -> Work:
        """Fresh ones: an interrupt may have left these half grown."""
        return Work(*self._asked)

    @property
    def logits(self) -> NDArray[np.float32]:
        return self._arrays["logits"]

    @property
    def picks(self) -> NDArray[np.int32]:
        """Likeliest tokens of the rows whose logits were wanted; -1 of a row that is not finite."""
        return self._arrays["pick"]

    @property
    def finite(self) -> NDArray[np.uint8]:
        return self._arrays["finite"]

    def reading(self, rows: int, vocabulary: int) -> tuple[structures.Work, NDArray[np.float32]]:
        """The same with logits of their own, of so many ids, to read rows of the last step: others may still
        be looked at."""
        self.grow(rows, 0)
        logits = np.empty((rows, self._library.padded(vocabulary)), np.float32)
        structure = structures.Work.from_buffer_copy(self.structure)
        structure.logits, structure.pick = logits.ctypes.data, None
        return structure, logits

    def grow(self, rows: int, wanted: int) -> None:
        """Have room for so many rows, and for the logits of so many."""
        if rows <= self._rows and wanted <= self._wanted:
            return
        built, padded = self._built, self._library.padded
        self._rows, self._wanted = max(self._rows, rows), max(self._wanted, wanted)
        rows, most = max(self._rows, self._wanted) + MAX_TILE, max(self._wanted, 1)
        wide = padded((built.heads + 2 * built.key_heads) * built.head_size)
        shapes: dict[str, tuple[tuple[int, ...], type]] = {
            "hidden": ((rows, built.hidden), np.float32),
            "qkv": ((rows + 1, wide), np.float32),
            "attended": ((rows + 1, built.heads * built.head_size), np.float32),
            "inner": ((rows + 1, padded(2 * built.inner)), np.float32),
            "change": ((rows + 1, padded(built.hidden)), np.float32),
            "low": ((rows, 3, self._rank), np.float32),
            "logits": ((most, padded(built.vocabulary)), np.float32),
            "pick": ((most,), np.int32),
            "finite": ((rows,), np.uint8),
            "bytes": ((rows, built.widest), np.int8),
            "low_bytes": ((rows, built.widest if self._activations == 16 else 0), np.int8),
            "scales": ((rows, built.widest // GROUP, 4), np.float32),
            "floats": ((rows, built.widest), np.float32),
            "halves": ((rows, built.widest), np.uint16),
        }
        for name, (shape, dtype) in shapes.items():
            old = self._arrays.get(name)
            if old is not None and old.shape == shape:
                continue
            self._arrays[name] = np.zeros(shape, dtype)
            if old is not None and name in ("hidden", "finite"):  # rows whose logits may still be asked for
                self._arrays[name][: len(old)] = old
        for name in ("hidden", "qkv", "attended", "inner", "change", "low", "logits", "pick", "finite"):
            setattr(self.structure, name, self._arrays[name].ctypes.data)
        self.structure.rank = self._rank
        names = ("bytes", "low_bytes", "scales", "floats", "halves")
        inputs = (self._arrays[name].ctypes.data if self._arrays[name].size else None for name in names)
        self.structure.inputs = structures.Inputs(*inputs, built.widest // GROUP)
        self.structure.scratch = self._arrays["scratch"].ctypes.data
        self.structure.partials = self._arrays["partials"].ctypes.data
        self.structure.partial_floats = PARTIAL_FLOATS
