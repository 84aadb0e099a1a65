"""Packs a configuration and a checkpoint's weights into the structures of the kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig

from ..errors import ModelCorrupt
from .adapters.packed import Place, Sizes
from .decoder_config import (
    FUNCTIONS,
    Angles,
    activation,
    angles,
    attention_scale,
    embedding_scale,
    head_size,
    windows,
)
from .kernels import structures
from .kernels.library import FORMATS, WEIGHT_TYPES, Library
from .kernels.weight_memory import WeightMemory
from .weights import Stored, Weights

Packed = dict[tuple[str, ...], NDArray[np.uint8]]
"""Packed matrices, by the names of the layers that each holds side by side."""


@dataclass(frozen=True)
class OutputPart:
    """A model with an output layer for some ids alone: one that is read for drafts, where rare ids cost more
    than they gain (Zhao et al., "FR-Spec", arXiv 2502.14856)."""

    model: structures.Model
    arrays: Sequence[NDArray[Any]]
    """What its structure points to, beside the whole model's arrays."""


class Build:
    """A model's structures for the kernels, and the arrays that they point to."""

    def __init__(
        self,
        config: PretrainedConfig,
        weights: Weights,
        library: Library,
        kind: str,
        threads: int,
        packed: Packed | None = None,
    ) -> None:
        """packed: matrices that are there already, from the same weights."""
        self.packed = dict(packed or {})
        self._library, self._weights, self._kind, self._threads = library, weights, kind, threads
        self._memory = WeightMemory()
        self.quantised = False
        self.places: dict[str, Place] = {}
        """Linear layers by name."""
        self.arrays: dict[int, NDArray[Any]] = {}
        self.read_bytes = self.parameters = 0
        self.layers = int(config.num_hidden_layers)
        self.hidden, self.inner = int(config.hidden_size), int(config.intermediate_size)
        self.heads, self.key_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.head_size, self.vocabulary = head_size(config), int(config.vocab_size)
        self.widest = max(self.hidden, self.inner, self.heads * self.head_size)
        offset = 1.0 if config.model_type.startswith("gemma") else 0.0
        self._offset = np.float32(offset)
        rotations = angles(config, self.head_size)
        table = self._linear("model.embed_tokens.weight", self.vocabulary, self.hidden)
        tied = "lm_head.weight" not in weights
        self._head = "model.embed_tokens" if tied else "lm_head"
        head = table if tied else self._linear("lm_head.weight", self.vocabulary, self.hidden)
        self.wide = 4 if self._format(head) in ("f16", "f32") else 2
        # First: nothing else is held while the largest matrix is read.
        packed_head = self._matrix([self._head], [head])
        weights.release()
        layers = (structures.Layer * self.layers)()
        for i in range(self.layers):
            layers[i] = self._layer(config, i, rotations)
            weights.release()
        self.model = structures.Model(
            layers,
            packed_head,
            self._norm("model.norm.weight", self.hidden),
            self._pointer(table.rows),
            WEIGHT_TYPES[table.kind].number,
            self.layers,
            self.hidden,
            self.heads,
            self.key_heads,
            self.head_size,
            rotations.rotated,
            self.inner,
            self.vocabulary,
            FUNCTIONS[activation(config)],
            config.rms_norm_eps,
            attention_scale(config, self.head_size),
            getattr(config, "attn_logit_softcapping", None) or 0.0,
            embedding_scale(config, self.wide),
            getattr(config, "residual_multiplier", 1.0),
            1.0 / getattr(config, "logits_scaling", 1.0),
            getattr(config, "final_logit_softcapping", None) or 0.0,
            self.wide,
            config.model_type == "olmo2",
        )

    def sizes(self, config: PretrainedConfig) -> Sizes:
        """What an adapter has to fit. Gemma scales embeddings within the table, Granite what comes out of
        it."""
        scale = self.model.embedding_scale
        inside = config.model_type.startswith("gemma")
        shape = self.hidden, self.layers, self.key_heads, self.head_size, self.wide
        return Sizes(*shape, 1.0 if inside else scale, scale if inside else 1.0)

    def output_of(self, ids: NDArray[np.int32]) -> OutputPart:
        """The model with an output layer of these ids alone, in this order."""
        head = self._linear(f"{self._head}.weight", self.vocabulary, self.hidden)
        part = replace(head, rows=np.ascontiguousarray(head.rows[ids]))
        packed, bias = self._pack(self._format(part), [part], len(ids)), None
        arrays: list[NDArray[Any]] = [packed]
        if f"{self._head}.bias" in self._weights:
            arrays.append(self._padded(self._weights.vector(f"{self._head}.bias")[ids]))
            bias = arrays[-1].ctypes.data
        model = structures.Model.from_buffer_copy(self.model)
        model.head = structures.Matrix(
            packed.ctypes.data, bias, FORMATS[self._format(part)], len(ids), self.hidden
        )
        model.vocabulary = len(ids)
        self._weights.release()
        return OutputPart(model, arrays)

    def _layer(self, config: PretrainedConfig, i: int, rotations: Angles) -> structures.Layer:
        at = f"model.layers.{i}."
        own, mlp, hidden, inner = at + "self_attn.", at + "mlp.", self.hidden, self.inner
        heads, key_heads = self.heads * self.head_size, self.key_heads * self.head_size
        if config.model_type == "phi3":
            qkv = {own + "qkv_proj": heads + 2 * key_heads}
            gate_up = {mlp + "gate_up_proj": 2 * inner}
        else:
            qkv = {own + "q_proj": heads, own + "k_proj": key_heads, own + "v_proj": key_heads}
            gate_up = {mlp + "gate_proj": inner, mlp + "up_proj": inner}
        before_mlp, after = {
            "gemma": ("pre_feedforward_layernorm", True),
            "olmo2": ("none", True),
        }.get(config.model_type[:5], ("post_attention_layernorm", False))
        joint = config.model_type == "olmo2"
        return structures.Layer(
            self._parts(i, 0, qkv, hidden, 3),
            self._parts(i, 3, {own + "o_proj": hidden}, heads, 1)[0],
            self._parts(i, 4, gate_up, hidden, 2),
            self._parts(i, 6, {mlp + "down_proj": hidden}, inner, 1)[0],
            self._norm(at + "input_layernorm.weight", hidden),
            self._norm(f"{at}{before_mlp}.weight", hidden),
            self._norm(at + "post_attention_layernorm.weight", hidden) if after else None,
            self._norm(at + "post_feedforward_layernorm.weight", hidden) if after else None,
            self._norm(own + "q_norm.weight", heads if joint else self.head_size),
            self._norm(own + "k_norm.weight", key_heads if joint else self.head_size),
            self._pointer(rotations.of(config, i)),
            windows(config)[i],
        )

    def _parts(self, layer: int, product: int, sizes: Mapping[str, int], ins: int, most: int) -> Any:
        """Linear layers that take the same inputs, side by side: neighbours of one format are one matrix.
        product: the number of the first among those of the layer. sizes: of their outputs, by name."""
        names, at = list(sizes), 0
        parts = [self._linear(f"{name}.weight", outs, ins) for name, outs in sizes.items()]
        for i, (name, outs) in enumerate(sizes.items()):
            self.places[name] = Place(layer, product + i, ins, outs, at)
            at += outs
        made, at = (structures.Matrix * most)(), 0
        runs = [list(run) for _, run in groupby(range(len(parts)), lambda i: self._format(parts[i]))]
        for i, run in enumerate(runs):
            made[i] = self._matrix([names[k] for k in run], [parts[k] for k in run])
            made[i].at = at
            at += made[i].outs
        return made

    def _matrix(self, names: Sequence[str], parts: Sequence[Stored]) -> structures.Matrix:
        """One matrix of the outputs of several layers in one format."""
        format, ins = self._format(parts[0]), parts[0].ins
        self.quantised |= format not in ("bf16", "f16", "f32")
        outs = sum(len(part.rows) for part in parts)
        key = tuple(names)
        if key not in self.packed:
            self.packed[key] = self._pack(format, parts, outs)
        out = self.packed[key]
        self.read_bytes += out.nbytes
        self.parameters += outs * ins
        bias, biases = None, [f"{name}.bias" for name in names]
        if any(name in self._weights for name in biases):
            given = np.concatenate([self._weights.vector(name) for name in biases])
            if len(given) != outs:
                raise ModelCorrupt(f"{biases[0]}: {len(given)} biases for {outs} outputs")
            bias = self._pointer(self._padded(given))
        return structures.Matrix(self._pointer(out), bias, FORMATS[format], outs, ins)

    def _padded(self, biases: NDArray[np.float32]) -> NDArray[np.float32]:
        """Biases with room for whole panels of outputs."""
        padded = np.zeros(self._library.padded(len(biases)), np.float32)
        padded[: len(biases)] = biases
        return padded

    def _pack(self, format: str, parts: Sequence[Stored], outs: int) -> NDArray[np.uint8]:
        out, at = self._memory.zeros(self._library.packed_bytes(format, outs, parts[0].ins)), 0
        for part in parts:
            self._library.pack(part.kind, part.rows, part.ins, format, at, out, self._threads)
            at += len(part.rows)
        return out

    def _linear(self, name: str, outs: int, ins: int) -> Stored:
        """Raises ModelCorrupt for a matrix of another shape than the configuration's."""
        found = self._weights.linear(name)
        if (len(found.rows), found.ins) != (outs, ins):
            raise ModelCorrupt(
                f"{name} is of the shape {[len(found.rows), found.ins]}; the config wants {[outs, ins]}"
            )
        return found

    def _format(self, part: Stored) -> str:
        """The packed format in which a matrix runs."""
        return part.format if self._kind == "as-stored" else self._kind

    def _norm(self, name: str, size: int) -> int | None:
        if name not in self._weights:
            return None
        found = self._weights.vector(name)
        if found.shape != (size,):
            raise ModelCorrupt(f"{name} is of the shape {list(found.shape)}; the config wants [{size}]")
        return self._pointer(found + self._offset)

    def _pointer(self, array: NDArray[Any] | None) -> int | None:
        if array is None:
            return None
        address = int(array.ctypes.data)
        self.arrays[address] = array
        return address
