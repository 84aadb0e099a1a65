"""An adapter as the decoder takes it. What mask rows alone use is an argument of a step, beside the model
(`PackedAdapter`; see `kernels/cpu/step.h`). LoRA for all rows is merged into the weights as they are loaded
(`TunedWeights`).

The prefix and the factors of LoRA and sampler head are held in the dtype of the KV cache. In the file of an
adapter they are bfloat16. Their products are float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import AdapterError
from ..kernels import structures
from ..kernels.library import Library
from ..weights import Stored, Weights
from .adapter import Adapter, LowRank

PRODUCTS = 7
"""Linear layers of a layer, at most: q, k, v, o, gate, up, down."""


@dataclass(frozen=True)
class Place:
    """Where a linear layer stands in the decoder."""

    layer: int
    product: int
    """Its number among the layer's PRODUCTS."""
    ins: int
    outs: int
    at: int
    """Where its outputs begin among those of the matrices that take the same inputs."""


@dataclass(frozen=True)
class Sizes:
    """What an adapter has to fit."""

    hidden: int
    layers: int
    key_heads: int
    head_size: int
    wide: int
    """Bytes of a value in the KV cache: 2 is bfloat16, 4 is float32."""
    mask_scale: float
    """Of the embeddings of mask tokens, where the model scales what its table of embeddings gives."""
    token_scale: float
    """Of the embeddings of tokens as the sampler head sees them."""


class PackedAdapter:
    """A gated adapter for the kernels."""

    def __init__(self, adapter: Adapter, sizes: Sizes, places: Mapping[str, Place], library: Library) -> None:
        """places: the decoder's linear layers by name. Raises AdapterError for LoRA on a layer that is not
        there, or of another size, and for a sampler head that is too wide."""
        config = adapter.config
        self.masks, self.rank = config.masks, config.rank
        self._wide = sizes.wide
        self._arrays: list[NDArray[Any]] = []
        self.structure = structures.Adapter()
        self.structure.embeddings = self._pointer(adapter.masks.expand(self.masks, -1) * sizes.mask_scale)
        self.structure.embedding_scale = sizes.token_scale
        if adapter.names:
            self._lora = self._low_rank(adapter, places, sizes.layers)
            self.structure.low_rank = self._lora
        if config.prefix:
            self._prefix(adapter, sizes, library.page)
        if adapter.sampler is not None:
            if 3 * sizes.hidden + config.sampler + library.lanes > library.row_floats:
                raise AdapterError(
                    f"the adapter's sampler head is {config.sampler} wide, for hidden states of "
                    f"{sizes.hidden}: more than the decoder's {library.row_floats} numbers a row"
                )
            both = adapter.sampler.inner, adapter.sampler.outer
            self.structure.sampler = self._products(*both, 1.0, 0)

    def _low_rank(self, adapter: Adapter, places: Mapping[str, Place], layers: int) -> Any:
        made = (structures.LowRank * (layers * PRODUCTS))()
        for name, part in zip(adapter.names, adapter.lora, strict=True):
            low = cast(LowRank, part)
            place = place_of(places, name, low)
            made[place.layer * PRODUCTS + place.product] = self._products(
                low.a, low.b, adapter.config.scale, place.at
            )
        return made

    def _products(self, a: Tensor, b: Tensor, scale: float, at: int) -> structures.LowRank:
        (rank, ins), outs = a.shape, len(b)
        factors = self._pointer(a, self._dtype), self._pointer(b.T, self._dtype)
        return structures.LowRank(*factors, rank, ins, outs, at, self._wide, scale)

    def _prefix(self, adapter: Adapter, sizes: Sizes, page: int) -> None:
        """Pages of keys, [layers][pages][key heads][size][page], and of values, [..][page][size]."""
        count = adapter.config.prefix
        pages = -(-count // page)
        shape = sizes.layers, sizes.key_heads, pages, page, sizes.head_size
        for name, parts in (("keys", adapter.keys), ("values", adapter.values)):
            held = torch.zeros(sizes.layers, sizes.key_heads, pages * page, sizes.head_size)
            for layer, key in adapter.kept.items():
                held[layer, :, :count] = parts[key].detach()
            paged = held.view(shape).transpose(1, 2)
            paged = paged.transpose(3, 4) if name == "keys" else paged
            setattr(self.structure, f"prefix_{name}", self._pointer(paged, self._dtype))
        self.structure.prefix_layer_bytes = held[0].numel() * self._wide
        self.structure.prefix_table = self._pointer(torch.arange(pages, dtype=torch.int32), torch.int32)
        self.structure.prefix = count

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32 if self._wide == 4 else torch.bfloat16

    def _pointer(self, part: Tensor, dtype: torch.dtype = torch.float32) -> int:
        held = part.detach().to(dtype, copy=True).contiguous()
        array = (held.view(torch.uint16) if dtype == torch.bfloat16 else held).numpy()
        self._arrays.append(array)
        return int(array.ctypes.data)


def place_of(places: Mapping[str, Place], name: str, low: LowRank) -> Place:
    """Raises AdapterError for a layer that is not there, or of another size."""
    place = places.get(name)
    if place is None or (place.ins, place.outs) != (low.a.shape[1], low.b.shape[0]):
        raise AdapterError(f"the adapter changes layer {name}, which the model has not, or of another size")
    return place


class TunedWeights:
    """A checkpoint's weights with LoRA merged into them.

    A sum is rounded once: to the format that is asked for (see `decoder.Decoder`), or as stored to the
    layer's own, if that is a float. Integers of few bits would lose what was tuned, so such layers are held
    in 8 bits: rounding then moves a weight by at most 0.4 % of the largest in its group of 32.
    """

    def __init__(self, weights: Weights, adapter: Adapter, places: Mapping[str, Place]) -> None:
        """Raises AdapterError as `place_of`."""
        self._weights, self._scale = weights, adapter.config.scale
        self._changes: dict[str, LowRank] = {}
        for name, part in zip(adapter.names, adapter.lora, strict=True):
            low = cast(LowRank, part)
            place_of(places, name, low)
            self._changes[f"{name}.weight"] = low
        self._widened = False

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def changes(self, names: Sequence[str]) -> bool:
        """Is one of these layers another than in the checkpoint?"""
        return any(f"{name}.weight" in self._changes for name in names)

    def linear(self, name: str) -> Stored:
        stored = self._weights.linear(name)
        low = self._changes.get(name)
        if low is None:
            return stored
        more = self._scale * (low.b.detach().double() @ low.a.detach().double())
        tuned = (stored.float32() + more.numpy()).astype(np.float32)
        format = stored.format if stored.format in ("f32", "f16", "bf16") else "q8"
        self._widened |= format != stored.format
        return Stored("F32", tuned.view(np.uint8), stored.ins, format)

    def vector(self, name: str) -> NDArray[np.float32]:
        return self._weights.vector(name)

    def release(self) -> None:
        self._weights.release()

    @property
    def label(self) -> str:
        return f"{self._weights.label}, tuned layers in 8 bits" if self._widened else self._weights.label
