"""Weights as they are stored, by the names that transformers gives them: out of a GGUF file, or of a folder.

The rows of a linear layer or of a table stay as the checkpoint has them (`Stored`), most often a view of the
mapped file, from which `Library.pack` makes the kernels' panels; everything else is float32.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ..errors import ModelCorrupt, ModelUnsupported
from .gguf.architectures import halves_apart, read_architecture, weight, weight_name
from .gguf.reader import GgufFile
from .kernels.library import WEIGHT_TYPES
from .safetensors_file import BYTES, SafetensorsFile

LOG = logging.getLogger("selfdraft")
GROUP = 32
"""Weights that share a scale."""
WEIGHTS = ("as-stored", "bf16", "q8", "q4")
"""Formats in which a user may ask for linear layers."""


@dataclass(frozen=True)
class Stored:
    """A matrix as the checkpoint has it."""

    kind: str
    """ggml's name of the type, one of `kernels.library.WEIGHT_TYPES`."""
    rows: NDArray[np.uint8]
    """[outs, bytes of a row]"""
    ins: int
    format: str
    """The packed format in which it runs as stored, one of `kernels.library.FORMATS`."""

    def float32(self) -> NDArray[np.float32]:
        """[outs, ins]"""
        return np.asarray(dequantize(self.rows, GGMLQuantizationType[self.kind]), np.float32)


class Weights(Protocol):
    """A checkpoint's weights."""

    def __contains__(self, name: str) -> bool: ...

    def linear(self, name: str) -> Stored:
        """A matrix. Raises ModelCorrupt or ModelUnsupported."""

    def vector(self, name: str) -> NDArray[np.float32]:
        """Anything else, in float32."""

    def release(self) -> None:
        """Let go of the memory of what was read; rows of `Stored` are read again where they are used."""

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
        self._files = [SafetensorsFile(folder / name) for name in names]
        self._home = {name: file for file in self._files for name in file.tensors}
        self._kinds: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def linear(self, name: str) -> Stored:
        kind, shape, raw = self._tensor(name)
        self._kinds.append(kind)
        return _stored(name, kind, shape, raw)

    def vector(self, name: str) -> NDArray[np.float32]:
        kind, shape, raw = self._tensor(name)
        if kind == "BF16":
            return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
        return raw.view(np.float16 if kind == "F16" else np.float32).astype(np.float32).reshape(shape)

    def release(self) -> None:
        for file in self._files:
            file.release()

    @property
    def label(self) -> str:
        names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        return _label([names[kind] for kind in self._kinds])

    def _tensor(self, name: str) -> tuple[str, tuple[int, ...], NDArray[np.uint8]]:
        if name not in self._home:
            raise ModelCorrupt(f"the checkpoint lacks the weights {name}")
        file = self._home[name]
        tensor = file.tensors[name]
        if tensor.kind not in BYTES:
            raise ModelUnsupported(f"{name} is stored as {tensor.kind}")
        return tensor.kind, tensor.shape, file.raw(tensor)


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
        found = self.vector(name)
        return _stored(name, "F32", found.shape, found)

    def vector(self, name: str) -> NDArray[np.float32]:
        if name not in self._state:
            raise ModelCorrupt(f"the model lacks the weights {name}")
        return np.ascontiguousarray(self._state[name].detach().float().numpy())

    def release(self) -> None:
        """Nothing is mapped."""


class GgufWeights:
    """The tensors of a GGUF file, in the formats in which they are stored there."""

    def __init__(self, file: GgufFile, config: Mapping[str, Any]) -> None:
        self._file, self._config = file, dict(config)
        self._names = {found: name for name in file.tensors if (found := weight_name(file, name)) is not None}
        self._kinds: list[str] = []
        self._requantised = set[str]()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def linear(self, name: str) -> Stored:
        own = self._own(name)
        tensor = self._file.tensors[own]
        kind = GGMLQuantizationType(tensor.kind).name
        self._kinds.append(kind)
        if kind in WEIGHT_TYPES:
            stored = _stored(name, kind, tensor.shape, self._file.raw(tensor))
        else:
            floats = self._file.array(tensor)
            self._say_requantised(kind)
            stored = _stored(name, "F32", tensor.shape, floats, "q8")
        if read_architecture(self._file).rotates_pairs and (".attn_q." in own or ".attn_k." in own):
            heads = self._config["num_attention_heads" if ".attn_q." in own else "num_key_value_heads"]
            stored = replace(stored, rows=np.ascontiguousarray(halves_apart(stored.rows, heads)))
        return stored

    def vector(self, name: str) -> NDArray[np.float32]:
        return np.ascontiguousarray(weight(self._file, self._own(name), self._config), np.float32)

    def release(self) -> None:
        self._file.release()

    @property
    def label(self) -> str:
        return _label(self._kinds)

    def _say_requantised(self, kind: str) -> None:
        if kind not in self._requantised:
            LOG.warning("%s: weights of the type %s are requantised to 8 bits", self._file.name, kind)
        self._requantised.add(kind)

    def _own(self, name: str) -> str:
        if name not in self._names:
            raise ModelCorrupt(f"{self._file.name} lacks the weights {name}")
        return self._names[name]


def _stored(
    name: str, kind: str, shape: Sequence[int], values: NDArray[Any], format: str | None = None
) -> Stored:
    if len(shape) != 2 or shape[1] % GROUP:
        raise ModelCorrupt(f"{name} is of the shape {list(shape)}; rows of a multiple of {GROUP} are needed")
    rows = values.reshape(-1).view(np.uint8).reshape(shape[0], -1)
    return Stored(kind, rows, shape[1], format or WEIGHT_TYPES[kind].format)


def _label(kinds: Sequence[str]) -> str:
    counts = sorted({kind: kinds.count(kind) for kind in kinds}.items(), key=lambda pair: -pair[1])
    if len(counts) < 2:
        return "".join(kind for kind, _ in counts)
    return f"{counts[0][0]} (some {', '.join(kind for kind, _ in counts[1:])})"
