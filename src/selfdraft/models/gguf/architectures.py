"""What a GGUF file's metadata and tensors are called in transformers, by architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ModelCorrupt, ModelUnsupported
from .reader import GgufFile

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS_ON_BOTH_SIDES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
IGNORED = {"rope_freqs.weight"}  # read where the configuration is made
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

Config = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures, as a model type of transformers."""

    model_type: str
    class_name: str
    rotates_pairs: bool = False
    """Rows of q and k are stored in llama.cpp's order, where neighbouring rows are rotated together."""
    norm_offset: float = 0.0
    """What the file's norm weights have more than transformers'."""
    layer_names: Mapping[str, str] = field(default_factory=dict)
    """Names of a layer's parts that differ from IN_LAYER."""
    extra: Callable[[GgufFile, Config], Config] = lambda file, config: {}
    """More of the configuration, from the file and the configuration so far."""


def read_architecture(file: GgufFile) -> Architecture:
    """Raises ModelUnsupported for one that is not in the table below."""
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ModelUnsupported(
            f"{file.name}: GGUF architecture {name!r} cannot be read; these can: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def read_config(file: GgufFile) -> Config:
    """The model's config.json without the tokenizer's part. Raises ModelCorrupt or ModelUnsupported."""
    architecture = read_architecture(file)
    heads = setting(file, "attention.head_count")
    hidden = setting(file, "embedding_length")
    vocabulary = file.tensors.get("token_embd.weight")
    if vocabulary is None:
        raise ModelCorrupt(f"{file.name}: tensor token_embd.weight is missing")
    for key, value in (("attention.head_count", heads), ("feed_forward_length", feed_forward(file))):
        if not isinstance(value, int) or value < 1:
            raise ModelUnsupported(f"{file.name}: {key} differs from layer to layer, which is not supported")
    config: Config = {
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        "dtype": "bfloat16",
        "vocab_size": vocabulary.shape[0],
        "hidden_size": hidden,
        "intermediate_size": feed_forward(file),
        "num_hidden_layers": setting(file, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": setting(file, "attention.head_count_kv", heads),
        "head_dim": setting(file, "attention.key_length", hidden // heads),
        "max_position_embeddings": setting(file, "context_length"),
        "rms_norm_eps": setting(file, "attention.layer_norm_rms_epsilon", 1e-6),
        "rope_parameters": _rope(file, hidden // heads),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
    }
    return config | architecture.extra(file, config)


def feed_forward(file: GgufFile) -> Any:
    return setting(file, "feed_forward_length")


def setting(file: GgufFile, key: str, default: Any = None) -> Any:
    """A number under the architecture's prefix. Raises ModelCorrupt where it is missing without a default."""
    whole = f"{file.metadata['general.architecture']}.{key}"
    value = file.metadata.get(whole, default)
    if value is None:
        raise ModelCorrupt(f"{file.name}: {whole} is missing from the metadata")
    return value


def weight_name(file: GgufFile, name: str) -> str | None:
    """The tensor's name in transformers; None for one that is no weight there. Raises ModelUnsupported."""
    if name in IGNORED:
        return None
    names = IN_LAYER | dict(read_architecture(file).layer_names)
    part, _, what = name.rpartition(".")
    pieces = part.split(".", 2)
    if part in OUTSIDE and what == "weight":
        return f"{OUTSIDE[part]}.weight"
    if pieces[0] == "blk" and len(pieces) == 3 and pieces[2] in names and what in ("weight", "bias"):
        return f"model.layers.{pieces[1]}.{names[pieces[2]]}.{what}"
    raise ModelUnsupported(
        f"{file.name}: tensor {name} has no place in a {read_architecture(file).model_type} model"
    )


def weight(file: GgufFile, name: str, config: Config) -> NDArray[np.float32]:
    """The tensor as transformers stores it, in float32."""
    architecture = read_architecture(file)
    array = file.array(file.tensors[name])
    if architecture.rotates_pairs and (".attn_q." in name or ".attn_k." in name):
        heads = config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
        return halves_apart(array, heads)
    if architecture.norm_offset and name.endswith("norm.weight"):
        return array - np.float32(architecture.norm_offset)
    return array


def halves_apart(array: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of each head from llama.cpp's order 0, h, 1, h + 1, ... back to 0, 1, ..., h half a head."""
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _rope(file: GgufFile, head_size: int) -> Config:
    """Rotary positions. Raises ModelUnsupported for a scaling that is not known here."""
    theta = setting(file, "rope.freq_base", 10000.0)
    rope: Config = {"rope_type": "default", "rope_theta": theta}
    dimensions = setting(file, "attention.key_length", head_size)
    rotated = setting(file, "rope.dimension_count", dimensions)
    if rotated != dimensions:
        rope["partial_rotary_factor"] = rotated / dimensions
    if "rope_freqs.weight" in file.tensors:
        return rope | _llama3_scaling(file, theta)
    kind = setting(file, "rope.scaling.type", "none")
    if kind == "none":
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": setting(file, "rope.scaling.factor")}
    if kind == "yarn":
        return rope | {
            "rope_type": "yarn",
            "factor": setting(file, "rope.scaling.factor"),
            "original_max_position_embeddings": setting(file, "rope.scaling.original_context_length"),
        }
    raise ModelUnsupported(f"{file.name}: rope scaling of the type {kind!r} cannot be read")


def _llama3_scaling(file: GgufFile, theta: float) -> Config:
    """The file holds what each frequency is divided by; of the rule behind it only Llama 3's is known."""
    factors = file.array(file.tensors["rope_freqs.weight"]).ravel()
    rope: Config = {"rope_type": "llama3", "factor": float(factors.max()), **LLAMA3_SCALING}
    frequencies = theta ** (-np.arange(len(factors)) / len(factors))
    turns = LLAMA3_SCALING["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / rope["factor"] + smooth), rtol=1e-3):
        raise ModelUnsupported(f"{file.name}: the factors in rope_freqs.weight are not Llama 3's")
    return rope


def _windows(file: GgufFile, every: int) -> Config:
    """Sliding windows in all layers but each `every`-th one."""
    layers = setting(file, "block_count")
    return {
        "sliding_window": setting(file, "attention.sliding_window"),
        "layer_types": [
            "full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(layers)
        ],
    }


def _gemma(file: GgufFile, config: Config, largest: int) -> Config:
    """Common to Gemma 2 and 3; the attention of the largest model is scaled by its hidden size."""
    is_largest = config["num_hidden_layers"] == largest
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
        if is_largest
        else config["head_dim"],
    }


def _gemma2(file: GgufFile, config: Config) -> Config:
    return {
        **_gemma(file, config, largest=46),
        **_windows(file, every=2),
        "attn_logit_softcapping": setting(file, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": setting(file, "final_logit_softcapping", 30.0),
    }


def _gemma3(file: GgufFile, config: Config) -> Config:
    return {
        **_gemma(file, config, largest=62),
        **_windows(file, every=6),
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": setting(file, "rope.freq_base_swa", 10000.0),
            },
        },
    }


def _granite(file: GgufFile, config: Config) -> Config:
    return {
        "attention_multiplier": setting(file, "attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": setting(file, "embedding_scale", 1.0),
        "residual_multiplier": setting(file, "residual_scale", 1.0),
        "logits_scaling": setting(file, "logit_scale", 1.0),
    }


def _smollm3(file: GgufFile, config: Config) -> Config:
    """Every fourth layer has no positions: the file does not say so, llama.cpp knows it."""
    layers = config["num_hidden_layers"]
    return {
        "no_rope_layer_interval": 4,
        "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(layers)],
        "use_sliding_window": False,
        "layer_types": ["full_attention"] * layers,
    }


def _phi3(file: GgufFile, config: Config) -> Config:
    if any(name.startswith("rope_factors") for name in file.tensors):
        raise ModelUnsupported(f"{file.name}: Phi 3's long positions (rope_factors) cannot be read")
    window = setting(file, "attention.sliding_window", 0)
    return {
        "sliding_window": window or None,
        "original_max_position_embeddings": config["max_position_embeddings"],
    }


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", rotates_pairs=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", norm_offset=1.0, layer_names=NORMS_ON_BOTH_SIDES, extra=_gemma2
    ),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", norm_offset=1.0, layer_names=NORMS_ON_BOTH_SIDES, extra=_gemma3
    ),
    "granite": Architecture("granite", "GraniteForCausalLM", rotates_pairs=True, extra=_granite),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", layer_names=NORMS_ON_BOTH_SIDES),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", layer_names={"ffn_up": "mlp.gate_up_proj"}, extra=_phi3),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", rotates_pairs=True, extra=_smollm3),
}
