"""Convert a model folder to the GGUF file that llama.cpp reads: `python gguf_folder.py FOLDER FILE DTYPE`.

Models of the types llama and qwen2 are converted. The weights are those that transformers loads in the dtype,
rounded in the same way if they are stored in a wider one. Vectors are written in float32, as llama.cpp
requires, with the values they have in the dtype. For a llama the rows of query and key projections are
permuted: llama.cpp rotates neighbouring numbers of a head together, transformers those that are half a head
apart. For a qwen2 both do the latter.

Tokens and merges of a byte-level BPE are written, but not how text is split before merging. The file is
therefore equivalent to the folder for token ids, but not for text. Needs numpy and gguf.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2"}
"""Types of models -> llama.cpp's name of their architecture."""
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
BIASED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""Layers that may have a bias: those of a qwen2."""
STORED = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
KINDS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
FILE_TYPES = {"bfloat16": "MOSTLY_BF16", "float16": "MOSTLY_F16", "float32": "ALL_F32"}


class Unfit(Exception):
    """The folder's model cannot be converted."""


def unfit(config: Mapping[str, Any]) -> str | None:
    """Why a model with this configuration (`config.json`) cannot be converted; None if it can."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        return f"it is a {kind} model, and only {', '.join(ARCHITECTURES)} are converted"
    for name in ("attention_bias", "mlp_bias", "quantization_config", "use_sliding_window"):
        if config.get(name):
            return f"it is a {kind} model with {name}, and only those without are converted"
    if config.get("hidden_act", "silu") != "silu":
        return f"its activation is {config['hidden_act']}, and only silu is converted"
    turned = rope(config)["rope_type"]
    if turned not in ("default", "llama3"):
        return f"its positions are scaled by {turned!r}, and only llama3's scaling is converted"
    return None


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the rotary positions, from either spelling of the configuration."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = given.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = given.get("rope_type") or given.get("type") or "default"
    return {**given, "rope_theta": float(theta), "rope_type": kind}


def convert(folder: Path, file: Path, dtype: str) -> None:
    """Write the file completely or not at all. Raises Unfit and OSError."""
    import gguf

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    reason = unfit(config)
    if reason:
        raise Unfit(reason)
    part = file.with_suffix(".part")
    writer = gguf.GGUFWriter(part, ARCHITECTURES[config["model_type"]])
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    _describe(writer, config)
    _vocabulary(writer, folder, config)
    stored = {_named(name): weight for name, weight in _weights(folder, config)}
    for name, weight in stored.items():
        kind, size = _kind(weight.shape, dtype)
        writer.add_tensor_info(
            name, weight.shape, np.dtype(STORED[kind]), weight.size * size, gguf.GGMLQuantizationType[kind]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, weight in stored.items():
        writer.write_tensor_data(_written(name, weight, config, dtype))
    writer.close()
    part.replace(file)


def _describe(writer: Any, config: Mapping[str, Any]) -> None:
    """Write shapes and constants."""
    heads = config["num_attention_heads"]
    width = head_size(config)
    writer.add_context_length(config.get("max_position_embeddings", 2048))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_vocab_size(config["vocab_size"])


def _vocabulary(writer: Any, folder: Path, config: Mapping[str, Any]) -> None:
    """Write tokens, merges, and the ids that begin and end a text. Raises Unfit for other tokenizers."""
    from gguf import TokenType

    path = folder / "tokenizer.json"
    spoken = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    model = spoken.get("model", {})
    if model.get("type") != "BPE" or "ByteLevel" not in json.dumps(spoken.get("pre_tokenizer")):
        raise Unfit("it has no tokenizer.json with a byte-level BPE, and only such tokens are converted")
    known = {id: (token, TokenType.NORMAL) for token, id in model["vocab"].items()}
    for one in spoken.get("added_tokens", ()):
        known[one["id"]] = (one["content"], TokenType.CONTROL if one["special"] else TokenType.USER_DEFINED)
    every = [known.get(id, (f"[PAD{id}]", TokenType.UNUSED)) for id in range(config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _ in every])
    writer.add_token_types([kind for _, kind in every])
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in model["merges"]])
    for add, name in ((writer.add_bos_token_id, "bos_token_id"), (writer.add_eos_token_id, "eos_token_id")):
        ids = config.get(name)
        if ids is not None:
            add(ids[0] if isinstance(ids, list) else ids)


def _weights(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    """All weights with their names, as stored, mapped from disk. bfloat16 comes as its bits."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise Unfit("the folder has no weights as safetensors")
    tied = config.get("tie_word_embeddings", False)
    for file in files:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
        header.pop("__metadata__", None)
        for name, about in header.items():
            if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
                continue
            if about["dtype"] not in STORED:
                raise Unfit(f"{name} is stored as {about['dtype']}; only {', '.join(STORED)} are converted")
            start = 8 + size + about["data_offsets"][0]
            shape = tuple(about["shape"])
            yield name, np.memmap(file, STORED[about["dtype"]], "r", offset=start, shape=shape)
    if rope(config)["rope_type"] == "llama3":
        yield "rope_freqs.weight", rope_factors(config)


def _named(name: str) -> str:
    """The weight's name in llama.cpp. Raises Unfit for an unknown one."""
    whole, _, what = name.rpartition(".")
    parts = whole.split(".", 3)
    found = NAMES.get(whole)
    if whole == "rope_freqs":
        found = whole
    elif parts[:2] == ["model", "layers"] and parts[-1] in IN_LAYER:
        found = f"blk.{parts[2]}.{IN_LAYER[parts[-1]]}"
    if found is None or not (what == "weight" or (what == "bias" and parts[-1] in BIASED)):
        raise Unfit(f"{name} is not a weight of a plain llama or qwen2 model")
    return f"{found}.{what}"


def _kind(shape: tuple[int, ...], dtype: str) -> tuple[str, int]:
    """How a weight is written: the type of its numbers, and the bytes of each."""
    kind = KINDS[dtype] if len(shape) > 1 else "F32"
    return kind, np.dtype(STORED[kind]).itemsize


def _written(name: str, weight: NDArray[Any], config: Mapping[str, Any], dtype: str) -> NDArray[Any]:
    """A weight in the form in which it is written."""
    heads = config["num_attention_heads"]
    if config["model_type"] != "llama":
        pass
    elif name.endswith("attn_q.weight"):
        weight = weight[turned_together(len(weight), heads)]
    elif name.endswith("attn_k.weight"):
        weight = weight[turned_together(len(weight), config.get("num_key_value_heads") or heads)]
    if name == "rope_freqs.weight":
        return weight
    rounded = narrowed(widened(weight), dtype)
    return rounded if weight.ndim > 1 else widened(rounded)


def turned_together(rows: int, heads: int) -> NDArray[np.intp]:
    """The order of a llama's rows: in each head 0, h, 1, h + 1, ..., with h half the head's size. [rows]"""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


def widened(weight: NDArray[Any]) -> NDArray[np.float32]:
    """In float32; 16-bit integers are the bits of bfloat16."""
    if weight.dtype == np.uint16:
        return (weight.astype(np.uint32) << 16).view(np.float32)
    return weight.astype(np.float32)


def narrowed(weight: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """In the dtype, rounded to nearest, ties to even; bfloat16 as its bits."""
    if dtype == "bfloat16":
        bits = weight.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):  # to infinity, as in torch
        return weight.astype(dtype)


def rope_factors(config: Mapping[str, Any]) -> NDArray[np.float32]:
    """The divisors of the frequencies in llama3's scaling. [half a head]"""
    given = rope(config)
    width = head_size(config)
    frequencies = given["rope_theta"] ** (-np.arange(0, width, 2) / width)
    turns = given["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the first context
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / given["factor"] + smooth), np.float32)


def head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def main() -> None:
    folder, file, dtype = sys.argv[1:]
    try:
        convert(Path(folder), Path(file), dtype)
    except Unfit as error:
        sys.exit(f"{folder}: {error}")


if __name__ == "__main__":
    main()
