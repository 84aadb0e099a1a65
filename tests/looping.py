"""Tiny looped models of random weights."""

from __future__ import annotations

from typing import Any

import torch

from selfdraft.models.looped.config import LoopedConfig, OuroConfig
from selfdraft.models.looped.decoder import LoopedForCausalLM, OuroForCausalLM
from selfdraft.models.looped.retrofit import recast

from conftest import VOCABULARY


def tiny_looped(
    dtype: torch.dtype = torch.float32, unique: int = 2, loops: int = 3, ouro: bool = False, **options: Any
) -> LoopedForCausalLM:
    """Its argmax moves about, and mostly from one pass to the next, too."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "unique_layers": unique,
        "loops": loops,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    kind, config = (OuroForCausalLM, OuroConfig) if ouro else (LoopedForCausalLM, LoopedConfig)
    return recast(kind(config(**shape | options)), dtype).eval()


def agreeing(dtype: torch.dtype = torch.bfloat16, loops: int = 3) -> LoopedForCausalLM:
    """One whose passes change nothing: every early pick is the final one. Its text goes round by itself,
    since a token's successor depends on the token alone."""
    model = tiny_looped(dtype, loops=loops)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model
