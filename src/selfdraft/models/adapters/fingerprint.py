"""Which model this is: a hash of its configuration and weights.

Adapters and training data are bound by it. The same checkpoint gives the same fingerprint in whatever
dtype it is loaded: weights are hashed rounded to bfloat16. What a config says about the loading (dtype,
version, path) does not count, nor do its defaults, which change with transformers. A peft adapter that is at
work in the model is part of it: it changes what the model says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

LOADING = (
    *("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache", "architectures"),
    "selfdraft_tuned",  # what we note in a model that was tuned
)
CHUNK = 1 << 24  # weights hashed at a time


def fingerprint(model: PreTrainedModel) -> str:
    """64 hexadecimal digits."""
    return _hash(model.config, sorted(model.named_parameters()))


def stored_fingerprint(config: PretrainedConfig, vector: Callable[[str], NDArray[np.float32]]) -> str:
    """The same of a checkpoint that transformers has not loaded. vector: its weights by name, in float32."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = sorted((name, part.shape) for name, part in model.named_parameters())
    return _hash(config, ((name, torch.tensor(vector(name)).view(shape)) for name, shape in shapes))


def _hash(config: PretrainedConfig, weights: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256(json.dumps(_settings(config.to_diff_dict()), sort_keys=True).encode())
    for name, weight in weights:
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        for part in weight.detach().reshape(-1).split(CHUNK):
            kept = part.bfloat16() if part.is_floating_point() else part
            digest.update(kept.contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def _settings(config: object) -> object:
    """A config, and those inside it, without what depends on how it was loaded."""
    if isinstance(config, dict):
        items = {str(key): _settings(value) for key, value in config.items()}
        return {key: value for key, value in items.items() if key not in LOADING}
    if isinstance(config, list | tuple):
        return [_settings(value) for value in config]
    return config if isinstance(config, str | int | float | bool | None) else str(config)
