"""Weights as they are stored, by the names that transformers gives them: out of a GGUF file, or of a folder.

A linear layer's weights stay in their format (`Stored`); everything else is float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import PreTrainedModel

from ..errors import ModelCorrupt, ModelUnsupported
from .gguf.architectures import halves_apart, read_architecture, weight, weight_name
from .gguf.reader import GgufFile

GROUP = 32
"""Weights that share a scale."""
WEIGHTS = ("as-stored", "bf16", "q8", "q4")
"""Formats in which a user may ask for linear layers."""


@dataclass(frozen=True)
class Stored:
    """The weights of a linear layer, [outs, ins]."""

    kind: str
    """bf16 (as uint16), f32, q8 (int8 times a scale), q4 (0 to 15 times a scale, plus a minimum), q6 (int8
    times `scales` for the first 16 of a group, `minima` for the others)."""
    values: NDArray[Any]
    scales: NDArray[np.uint16] | None = None
    """float16 as uint16, [outs, ins / 32]."""
    minima: NDArray[np.uint16] | None = None

    def float32(self) -> NDArray[np.float32]:
        """The weights as numbers."""
        if self.kind == "bf16":
            return (self.values.astype(np.uint32) << 16).view(np.float32)
        if self.scales is None:
            return np.asarray(self.values, np.float32)
        if self.kind == "q6" and self.minima is not None:
            both = np.stack([_halves(self.scales), _halves(self.minima)], -1)[..., None]
            halves = self.values.astype(np.float32).reshape(len(self.values), -1, 2, GROUP // 2)
            return np.asarray(halves * both, np.float32).reshape(self.values.shape)
        groups = self.values.astype(np.float32).reshape(len(self.values), -1, GROUP)
        groups = groups * _halves(self.scales)[..., None]
        if self.minima is not None:
            groups = groups + _halves(self.minima)[..., None]
        return groups.reshape(self.values.shape)

    def map_rows(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Stored:
        """The same with its rows rearranged."""
        parts = (self.values, self.scales, self.minima)
        return Stored(self.kind, *(None if part is None else change(part) for part in parts))  # type: ignore[arg-type]


class Weights(Protocol):
    """A checkpoint's weights."""

    def __contains__(self, name: str) -> bool: ...

    def linear(self, name: str) -> Stored:
        """A matrix. Raises ModelCorrupt or ModelUnsupported."""

    def vector(self, name: str) -> NDArray[np.float32]:
        """Anything else, in float32."""

    @property
    def label(self) -> str:
        """The formats in which the linear layers are stored, as "Q4_1 (some Q8_0)"."""


class FolderWeights:
    """The safetensors files of a transformers folder, mapped."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not all((folder / name).is_file() for name in names):
            raise ModelUnsupported(f"{folder}: its weights are not in safetensors files")
        files: list[Any] = [safe_open(folder / name, framework="pt") for name in names]
        self._home = {key: file for file in files for key in file.keys()}  # noqa: SIM118
        self._kinds: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def linear(self, name: str) -> Stored:
        tensor = self._tensor(name)
        self._kinds.append(str(tensor.dtype).removeprefix("torch."))
        if tensor.dtype == torch.bfloat16:
            return Stored("bf16", tensor.view(torch.uint16).numpy())
        return Stored("f32", tensor.float().numpy())

    def vector(self, name: str) -> NDArray[np.float32]:
        return np.ascontiguousarray(self._tensor(name).float().numpy())

    @property
    def label(self) -> str:
        return _label(self._kinds)

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self._home:
            raise ModelCorrupt(f"the checkpoint lacks the weights {name}")
        tensor: torch.Tensor = self._home[name].get_tensor(name)
        if not tensor.is_floating_point():
            raise ModelUnsupported(f"{name} is stored as {tensor.dtype}")
        return tensor


class ModuleWeights:
    """The weights of a transformers model that is loaded, in float32."""

    label = "float32"

    def __init__(self, model: PreTrainedModel) -> None:
        self._state = model.state_dict()
        if model.config.tie_word_embeddings:
            self._state.pop("lm_head.weight", None)

    def __contains__(self, name: str) -> bool:
        return name in self._state

    def linear(self, name: str) -> Stored:
        return Stored("f32", self.vector(name))

    def vector(self, name: str) -> NDArray[np.float32]:
        if name not in self._state:
            raise ModelCorrupt(f"the model lacks the weights {name}")
        return np.ascontiguousarray(self._state[name].detach().float().numpy())


class GgufWeights:
    """The tensors of a GGUF file, in the formats in which they are stored there."""

    def __init__(self, file: GgufFile, config: Mapping[str, Any]) -> None:
        self._file, self._config = file, dict(config)
        self._names = {found: name for name in file.tensors if (found := weight_name(file, name)) is not None}
        self._kinds: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def linear(self, name: str) -> Stored:
        from gguf import GGMLQuantizationType

        own = self._own(name)
        tensor = self._file.tensors[own]
        kind = GGMLQuantizationType(tensor.kind).name
        self._kinds.append(kind)
        if kind in READERS:
            stored = READERS[kind](self._file.raw(tensor), tensor.shape)
        else:
            stored = quantised(self._file.array(tensor), "q8")
        if read_architecture(self._file).rotates_pairs and (".attn_q." in own or ".attn_k." in own):
            heads = self._config["num_attention_heads" if ".attn_q." in own else "num_key_value_heads"]
            stored = stored.map_rows(lambda part: halves_apart(part, heads))
        return stored

    def vector(self, name: str) -> NDArray[np.float32]:
        return np.ascontiguousarray(weight(self._file, self._own(name), self._config), np.float32)

    @property
    def label(self) -> str:
        return _label(self._kinds)

    def _own(self, name: str) -> str:
        if name not in self._names:
            raise ModelCorrupt(f"{self._file.name} lacks the weights {name}")
        return self._names[name]


def quantised(weights: NDArray[np.float32], kind: str) -> Stored:
    """Weights in 8 or 4 bits, by group of 32: to the nearest of evenly spaced values.

    q8: from minus to plus the group's largest magnitude. q4: from the group's minimum to its maximum.
    """
    outs, ins = weights.shape
    groups = np.asarray(weights, np.float32).reshape(outs, ins // GROUP, GROUP)
    if kind == "q8":
        scales = (np.abs(groups).max(-1) / 127).astype(np.float16)
        values = _divided(groups, scales.astype(np.float32)).clip(-127, 127).astype(np.int8)
        return Stored("q8", values.reshape(outs, ins), scales.view(np.uint16))
    low, high = groups.min(-1), groups.max(-1)
    scales, minima = ((high - low) / 15).astype(np.float16), low.astype(np.float16)
    values = _divided(groups - minima.astype(np.float32)[..., None], scales.astype(np.float32)).clip(0, 15)
    parts = scales.view(np.uint16), minima.view(np.uint16)
    return Stored("q4", values.astype(np.uint8).reshape(outs, ins), *parts)


def rounded(weights: NDArray[np.float32]) -> Stored:
    """Weights in bfloat16, to nearest even."""
    bits = torch.from_numpy(np.ascontiguousarray(weights)).to(torch.bfloat16).view(torch.uint16)
    return Stored("bf16", bits.numpy())


def _divided(groups: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    return np.rint(groups * inverse[..., None])


def _halves(stored: NDArray[np.uint16]) -> NDArray[np.float32]:
    return stored.view(np.float16).astype(np.float32)


def _label(kinds: Sequence[str]) -> str:
    counts = sorted({kind: kinds.count(kind) for kind in kinds}.items(), key=lambda pair: -pair[1])
    if len(counts) < 2:
        return "".join(kind for kind, _ in counts)
    return f"{counts[0][0]} (some {', '.join(kind for kind, _ in counts[1:])})"


# ---- GGUF's blocks: how ggml lays a group out, see the package gguf's quants.py.


def _blocks(raw: NDArray[np.uint8], shape: Sequence[int], size: int) -> NDArray[np.uint8]:
    return raw.reshape(shape[0], -1, size)


def _nibbles(packed: NDArray[np.uint8], shape: Sequence[int]) -> NDArray[np.uint8]:
    return np.concatenate([packed & 15, packed >> 4], -1).reshape(shape)


def _half(part: NDArray[np.uint8]) -> NDArray[np.uint16]:
    return np.ascontiguousarray(part).view(np.uint16)[..., 0]


def _q4_0(raw: NDArray[np.uint8], shape: Sequence[int]) -> Stored:
    blocks = _blocks(raw, shape, 18)
    scales = _half(blocks[..., :2])
    minima = (scales.view(np.float16) * np.float16(-8)).view(np.uint16)
    return Stored("q4", _nibbles(blocks[..., 2:], shape), scales, minima)


def _q4_1(raw: NDArray[np.uint8], shape: Sequence[int]) -> Stored:
    blocks = _blocks(raw, shape, 20)
    return Stored("q4", _nibbles(blocks[..., 4:], shape), _half(blocks[..., :2]), _half(blocks[..., 2:4]))


def _q8_0(raw: NDArray[np.uint8], shape: Sequence[int]) -> Stored:
    blocks = _blocks(raw, shape, 34)
    return Stored("q8", blocks[..., 2:].view(np.int8).reshape(shape), _half(blocks[..., :2]))


def _q5_0(raw: NDArray[np.uint8], shape: Sequence[int]) -> Stored:
    blocks = _blocks(raw, shape, 22)
    fifth = np.unpackbits(np.ascontiguousarray(blocks[..., 2:6]), axis=-1, bitorder="little")
    low = np.concatenate([blocks[..., 6:] & 15, blocks[..., 6:] >> 4], -1)
    values = ((fifth << 4) | low).astype(np.int8) - 16
    return Stored("q8", values.reshape(shape), _half(blocks[..., :2]))


def _q4_k(raw: NDArray[np.uint8], shape: Sequence[int]) -> Stored:
    """Blocks of 256: eight groups with 6-bit scales and minima of two halves. Their products are rounded to
    half precision, an error of at most 0.05 % of a group's scale."""
    blocks = _blocks(raw, shape, 144)
    scale, least = (_half(blocks[..., i : i + 2]).view(np.float16).astype(np.float32) for i in (0, 2))
    six = blocks[..., 4:16]
    first, second, third = six[..., :4], six[..., 4:8], six[..., 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], -1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], -1)
    packed = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)
    values = np.stack([packed & 15, packed >> 4], -2).reshape(shape)
    groups = (shape[0], shape[1] // GROUP)
    return Stored(
        "q4",
        values,
        (scale[..., None] * scales).astype(np.float16).view(np.uint16).reshape(groups),
        (-least[..., None] * minima).astype(np.float16).view(np.uint16).reshape(groups),
    )


def _q6_k(raw: NDArray[np.uint8], shape: Sequence[int]) -> Stored:
    """Blocks of 256: four low bits, two high bits, and a scale for each 16 of them, times one half. Held in 8
    bits each; the products of scales are rounded to half precision."""
    blocks = _blocks(raw, shape, 210)
    low, high = blocks[..., :128].reshape(-1, 2, 64), blocks[..., 128:192].reshape(-1, 2, 32)
    nibbles = np.stack([low & 15, low >> 4], 2).reshape(-1, 2, 4, 32)
    pairs = np.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], 2)
    values = (nibbles | pairs << 4).astype(np.int8) - 32
    scale = _half(blocks[..., 208:]).view(np.float16).astype(np.float32)[..., None]
    scales = (scale * blocks[..., 192:208].view(np.int8)).astype(np.float16).view(np.uint16)
    both = scales.reshape(shape[0], shape[1] // GROUP, 2)
    return Stored("q6", values.reshape(shape), both[..., 0], both[..., 1])


def _bf16(raw: NDArray[np.uint8], shape: Sequence[int]) -> Stored:
    return Stored("bf16", raw.view(np.uint16).reshape(shape))


def _f32(raw: NDArray[np.uint8], shape: Sequence[int]) -> Stored:
    return Stored("f32", raw.view(np.float32).reshape(shape))


def _f16(raw: NDArray[np.uint8], shape: Sequence[int]) -> Stored:
    return Stored("f32", raw.view(np.float16).astype(np.float32).reshape(shape))


READERS: Mapping[str, Callable[[NDArray[np.uint8], Sequence[int]], Stored]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "Q5_0": _q5_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
    "BF16": _bf16,
    "F32": _f32,
    "F16": _f16,
}
"""Types that are run as stored, or in a format that holds all their values. Others are requantised to 8
bits."""
