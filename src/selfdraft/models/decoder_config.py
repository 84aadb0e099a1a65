"""What of a transformers configuration the decoder knows, and what it reads there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .weights import GROUP

FUNCTIONS = {"silu": 0, "gelu_pytorch_tanh": 1}
"""Activation functions, as `kernels/cpu/step.h` numbers them."""
ROTATIONS = ("default", "linear", "llama3", "yarn")
TYPES = ("llama", "mistral", "qwen2", "qwen3", "granite", "smollm3", "gemma2", "gemma3_text", "phi3", "olmo2")
"""Model types whose forward the tests have found equal to transformers'."""


def unsupported(config: PretrainedConfig) -> str | None:
    """What of a configuration the decoder does not know, in words; None if it knows all of it."""
    if config.model_type not in TYPES:
        return f"model type {config.model_type}"
    head = head_size(config)
    if config.hidden_size % GROUP or config.intermediate_size % GROUP or head % 32 or head > 512:
        return f"hidden size {config.hidden_size}, inner size {config.intermediate_size}, head size {head}"
    if config.num_attention_heads * 8 > 64 * config.num_key_value_heads:
        return f"{config.num_attention_heads // config.num_key_value_heads} heads share a key head"
    if activation(config) not in FUNCTIONS:
        return f"activation {activation(config)}"
    for name, parameters in rotations(config).items():
        kind = parameters.get("rope_type", "default")
        if kind not in ROTATIONS:
            return f"rotary positions of the type {kind}"
        if int(head * parameters.get("partial_rotary_factor", 1.0)) % 32:
            return f"rotation of a part of each head ({name})"
    if getattr(config, "quantization_config", None):
        return "quantised weights"
    return None


def head_size(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def activation(config: PretrainedConfig) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def attention_scale(config: PretrainedConfig, head_size: int) -> float:
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None:
        return math.sqrt(1.0 / float(scalar))
    return float(getattr(config, "attention_multiplier", head_size**-0.5))


def embedding_scale(config: PretrainedConfig, wide: int) -> float:
    if config.model_type.startswith("gemma"):  # which transformers rounds to the dtype of its weights
        scale = torch.tensor(config.hidden_size**0.5)
        return (scale if wide == 4 else scale.to(torch.bfloat16)).item()
    return float(getattr(config, "embedding_multiplier", 1.0))


def windows(config: PretrainedConfig) -> list[int]:
    """Keys that a row sees in each layer, itself included; 0 for all."""
    size = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        uses = getattr(config, "use_sliding_window", True)
        return [size if uses else 0] * config.num_hidden_layers
    return [size if kind == "sliding_attention" else 0 for kind in kinds]


def rotations(config: PretrainedConfig) -> Mapping[str, Mapping[str, Any]]:
    """Rotary parameters by layer type; of most models one set for all."""
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    if parameters and all(found is None or isinstance(found, Mapping) for found in parameters.values()):
        return {kind: found for kind, found in parameters.items() if found}
    return {"": parameters}


class Angles:
    """Cosines and sines of all positions by layer type, [context, rotated]: cosines, then sines."""

    def __init__(self, rotated: int, tables: Mapping[str, NDArray[np.float32]]) -> None:
        self.rotated, self._tables = rotated, tables

    def of(self, config: PretrainedConfig, layer: int) -> NDArray[np.float32] | None:
        rotates = getattr(config, "no_rope_layers", None)
        if rotates is not None and not rotates[layer]:
            return None
        return self._tables["" if "" in self._tables else config.layer_types[layer]]


def angles(config: PretrainedConfig, head_size: int) -> Angles:
    tables, rotated = {}, head_size
    for name, parameters in rotations(config).items():
        rotated = int(head_size * parameters.get("partial_rotary_factor", 1.0))
        kind, scaling = parameters.get("rope_type", "default"), 1.0
        frequencies = 1.0 / parameters["rope_theta"] ** (torch.arange(0, rotated, 2).float() / rotated)
        if kind != "default":
            frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        positions = torch.arange(config.max_position_embeddings).float()
        angles = torch.outer(positions, frequencies.float())
        both = torch.cat([angles.cos(), angles.sin()], 1) * scaling
        tables[name] = np.ascontiguousarray(both.numpy())
    return Angles(rotated, tables)
