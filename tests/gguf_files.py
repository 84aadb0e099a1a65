"""Tiny GGUF files, written by the gguf package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, HEAD, WIDE, LAYERS = 64, 4, 2, 16, 96, 2
BYTE_LETTERS = [
    chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]
]  # what byte-level BPE writes for the 256 bytes
SPECIAL = ["<|bos|>", "<|im_end|>", "<|eot|>"]
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "a"), ("1", "2")]
TOKENS = [*SPECIAL, *BYTE_LETTERS, *("".join(pair) for pair in MERGES)]


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    metadata: dict[str, Any] | None = None,
    tokenizer: str | None = "gpt2",
    pre: str = "smollm",
    merges: Sequence[tuple[str, str]] = MERGES,
    eot: int | None = None,
    add_bos: bool | None = None,
    bias: bool = False,
    without: str | None = None,
    add: str | None = None,
    quantise: gguf.GGMLQuantizationType | None = None,
    head: int = HEAD,
) -> Path:
    """A random model of LAYERS layers. `without` names a tensor to leave out, `add` one too many."""
    writer = gguf.GGUFWriter(path, architecture)
    numbers = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": WIDE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": head,
    }
    for key, value in (numbers | (metadata or {})).items():
        if isinstance(value, int):
            writer.add_uint32(f"{architecture}.{key}", value)
        else:
            writer.add_float32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    if tokenizer is not None:
        _write_tokenizer(writer, tokenizer, pre, merges, eot, add_bos)
    random = np.random.default_rng(0)
    for name, shape in shapes(bias, head).items():
        if name == without:
            continue
        array = random.normal(0, 0.1, shape).astype(np.float32)
        if quantise is not None and len(shape) == 2:
            writer.add_tensor(name, gguf.quants.quantize(array, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(name, array)
    if add is not None:
        writer.add_tensor(add, np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shapes(bias: bool = False, head: int = HEAD) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(TOKENS), HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        part = {
            "attn_norm.weight": (HIDDEN,),
            "attn_q.weight": (HEADS * head, HIDDEN),
            "attn_k.weight": (KV_HEADS * head, HIDDEN),
            "attn_v.weight": (KV_HEADS * head, HIDDEN),
            "attn_output.weight": (HIDDEN, HEADS * head),
            "ffn_norm.weight": (HIDDEN,),
            "ffn_gate.weight": (WIDE, HIDDEN),
            "ffn_up.weight": (WIDE, HIDDEN),
            "ffn_down.weight": (HIDDEN, WIDE),
        }
        if bias:
            part |= {
                "attn_q.bias": (HEADS * head,),
                "attn_k.bias": (KV_HEADS * head,),
                "attn_v.bias": (KV_HEADS * head,),
            }
        found |= {f"blk.{layer}.{name}": shape for name, shape in part.items()}
    return found


def _write_tokenizer(
    writer: gguf.GGUFWriter,
    kind: str,
    pre: str,
    merges: Sequence[tuple[str, str]],
    eot: int | None,
    add_bos: bool | None,
) -> None:
    control = [gguf.TokenType.CONTROL] * len(SPECIAL)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([*control, *[gguf.TokenType.NORMAL] * (len(TOKENS) - len(SPECIAL))])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if eot is not None:
        writer.add_eot_token_id(eot)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
