"""Converts a GGUF file into a folder that transformers loads: configuration and tokenizer, and for
transformers' forward the weights in bfloat16.

Weights are dequantised to float32 and rounded once, one tensor at a time, so that memory holds no more than
the largest tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import ModelCorrupt
from .architectures import read_config, weight, weight_name
from .reader import GgufFile
from .tokenizer import GgufTokenizer

BYTES = 2  # of a weight in bfloat16


def convert(file: GgufFile, folder: Path) -> None:
    """Fills an empty folder with all but the weights. Raises ModelCorrupt or ModelUnsupported, and OSError as
    it comes."""
    config = read_config(file)
    for name in file.tensors:
        weight_name(file, name)  # raises for one that has no place in the model
    tokenizer = GgufTokenizer(file)
    if len(tokenizer.tokens) > config["vocab_size"]:
        raise ModelCorrupt(
            f"{file.name}: {len(tokenizer.tokens)} tokens, but embeddings of {config['vocab_size']} only"
        )
    ends = tokenizer.end_ids()
    special = {"bos_token_id": tokenizer.special("bos"), "pad_token_id": tokenizer.special("padding")}
    # An id that the file leaves out is null: config classes have defaults of their own.
    _write(folder / "config.json", config | special | {"eos_token_id": ends or None})
    _write(folder / "generation_config.json", special | {"eos_token_id": ends or None})
    _write(folder / "tokenizer.json", tokenizer.tokenizer_json())
    _write(folder / "tokenizer_config.json", tokenizer.tokenizer_config())
    template = tokenizer.chat_template()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def convert_weights(file: GgufFile, path: Path) -> None:
    """Writes a safetensors file: the length of a header, the header, then the tensors one after another.
    Raises as `convert`."""
    config = read_config(file)
    names = {name: found for name in file.tensors if (found := weight_name(file, name)) is not None}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, found in names.items():
        shape = file.tensors[name].shape
        start, end = end, end + BYTES * math.prod(shape)
        header[found] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for name in names:
            rounded = torch.from_numpy(weight(file, name, config).copy()).to(torch.bfloat16)
            out.write(rounded.view(torch.int16).numpy().data)


def _write(path: Path, contents: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(contents, ensure_ascii=False), encoding="utf-8")
