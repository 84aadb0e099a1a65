"""Tiny random models of many types, as transformers makes them from a config alone.

A type's config is SIZES, as far as its class has fields of those names, and what the table says. Every
weight is moved a little from what the architecture starts with, for zeros and ones hide what they touch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

import selfdraft.models.looped.decoder  # noqa: F401  which makes looped models known to transformers

WINDOW = 8
SIZES = {
    "vocab_size": 320,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 256),
    "head_dim": 32,
    "rotary_dim": 16,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    # Mixtures of experts.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "intermediate_size_mlp"), 32),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1),
    "num_experts_per_tok": 2,
    # Latent attention: keys and values of different sizes.
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"), 32),
    "v_head_dim": 32,
    # Embeddings by layer.
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 320,
    "num_kv_shared_layers": 1,
}
LATENT = {"num_key_value_heads": 4}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}

# Types that work, with what their configs need beyond SIZES.
WORKING: Mapping[str, Mapping[str, Any]] = {
    "looped_llama": {"unique_layers": 2, "loops": 2},
    "ouro": {"unique_layers": 2, "loops": 2},
    "afmoe": MIXED,
    "apertus": {},
    "arcee": {},
    "axk1": LATENT,
    "beam": MIXED,
    "bert": {},
    "bert-generation": {},
    "big_bird": {"attention_type": "original_full"},
    "biogpt": {},
    "bitnet": {},
    "codegen": {},
    "cohere": {},
    "cohere2": MIXED,
    "cohere2_moe": MIXED,
    "ctrl": {"dff": 64},
    "cwm": MIXED,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "diffllama": {},
    "dots1": MIXED,
    "electra": {},
    "ernie": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": MIXED,
    "exaone_moe": MIXED,
    "falcon": {"new_decoder_architecture": True},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": MIXED,
    "gemma3_text": MIXED,
    "gemma3n_text": MIXED,
    "gemma4_text": MIXED,
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": LATENT,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_oss": MIXED,
    "gptj": {},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "granite_swa": MIXED,
    "granitemoe": {"logits_scaling": 4.0},
    "granitemoe_swa": MIXED,
    "granitemoeshared": {},
    "helium": {"num_key_value_heads": 4, "head_dim": 16},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hyperclovax": {"logits_scaling": 4.0},
    "jais2": {},
    "jetmoe": {},
    "llama": {},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"] * 2},
    "longcat_flash": {**LATENT, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "moe_topk": 2},
    "mellum": MIXED,
    "mimo_v2_flash": MIXED,
    "minicpm3": LATENT,
    "minimax_m2": {},
    "ministral": MIXED,
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": {"local_attention": WINDOW},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": MIXED,
    "olmoe": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {**MIXED, "use_sliding_window": True},
    "qwen2_moe": {**MIXED, "use_sliding_window": True},
    "qwen3": {**MIXED, "use_sliding_window": True},
    "qwen3_moe": {"use_sliding_window": True},
    "seed_oss": {},
    "smollm3": {**MIXED, "use_sliding_window": True},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": MIXED,
    "xglm": {},
    "youtu": LATENT,
}

STATE = "keep a state"
OTHER = "does not verify a tree"  # silently other logits than its own forward
RAISES = "does not take a tree"  # its forward raises

# Types that are refused, by the probe's reason.
REFUSED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "bamba": (STATE, {}),
    "bart": (OTHER, {}),
    "bloom": (RAISES, {}),
    "camembert": (OTHER, {}),
    "cpmant": (RAISES, {}),
    "deepseek_v32": (RAISES, LATENT),
    "doge": (RAISES, {}),
    "falcon": (RAISES, {"alibi": True}),
    "falcon_h1": (STATE, {}),
    "falcon_mamba": (STATE, {}),
    "gpt_neo": (OTHER, {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW}),
    "jamba": (STATE, {}),
    "kimi_linear": (STATE, {}),
    "lfm2": (STATE, {"layer_types": ["conv", "full_attention"] * 2}),
    "mamba": (STATE, {}),
    "mbart": (OTHER, {}),
    "minimax": (STATE, {}),
    "mpt": (OTHER, {}),
    "nemotron_h": (STATE, {}),
    "openai-gpt": (RAISES, {}),
    "qwen3_next": (STATE, {}),
    "recurrent_gemma": (STATE, {}),
    "roberta": (OTHER, {}),
    "rwkv": (OTHER, {}),
    "xlnet": (RAISES, {}),
    "xlstm": (RAISES, {}),
}


# Their own forward does not run in float64.
FLOAT32 = {"xglm"}
# Other code, or a fault that was mended, in transformers before 5.23.
NEW = {"big_bird", "gpt_bigcode", "llama4_text", "recurrent_gemma"}


def known(kind: str) -> bool:
    """Does the transformers at hand have this type, as the tables mean it?"""
    old = Version(transformers.__version__) < Version("5.23")
    return kind in CONFIG_MAPPING and not (old and kind in NEW)


def build(
    kind: str, extra: Mapping[str, Any], dtype: torch.dtype | None = None, attention: str | None = "eager"
) -> PreTrainedModel:
    """A random model of a type, the same at every call; in float64 if it can, with its own attention code."""
    cls = CONFIG_MAPPING[kind]
    fields = set(inspect.signature(cls.__init__).parameters)
    for base in cls.__mro__:
        fields |= set(vars(base).get("__annotations__", ()))
    given = {name: size for name, size in SIZES.items() if name in fields} | dict(extra)
    config = cls(**given)
    config._experts_implementation = "eager"  # the others lack float64
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = model.to(dtype or (torch.float32 if kind in FLOAT32 else torch.float64)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return model
