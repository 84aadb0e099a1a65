"""From a name to a model and its tokenizer: an embedded model, a folder, or an id on the Hugging Face hub.
From an object that a user has loaded to the transformers model in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import InvalidOption, ModelCorrupt, ModelError, ModelNotFound, ModelUnsupported
from .looped.decoder import LoopedForCausalLM  # which also makes looped models known to transformers

EMBEDDED = {"looped-tiny": Path(__file__).parent / "looped" / "looped-tiny"}
DTYPES = ("bfloat16", "float16", "float32", "float64")


def load_pretrained(
    name: str, dtype: str | None = None, device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Weights in `dtype` (None: as stored) on `device` (None: CUDA if there is one, else the CPU).

    Raises ModelNotFound, ModelCorrupt or ModelUnsupported, and InvalidOption for a dtype or device
    that does not exist here.
    """
    where = torch_device(device)
    kind = "auto" if dtype is None else getattr(torch, _one_of("dtype", dtype, DTYPES))
    source = str(EMBEDDED.get(name) or (Path(name).expanduser() if name.startswith("~") else name))
    local = _is_folder(name, source)
    try:
        config = AutoConfig.from_pretrained(source)
        loaded = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=kind, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (InvalidOption, ModelUnsupported) as error:  # what the config of a looped model says of itself
        raise type(error)(f"{name}: {error}") from error
    except Exception as error:  # whatever a damaged file can raise in the libraries that read it
        raise _named(name, local, error) from error
    model, report = cast(Any, loaded)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelCorrupt(f"{name}: {len(missing)} weights are missing, {missing[0]} among them")
    left = sorted(report["unexpected_keys"])
    if left and isinstance(model, LoopedForCausalLM):  # others may leave heads of other tasks behind
        raise ModelCorrupt(
            f"{name}: {len(left)} weights have no place in the model, {left[0]} among them; its config is of "
            "another shape"
        )
    return model.to(where), tokenizer


def transformers_model(loaded: torch.nn.Module) -> PreTrainedModel:
    """The model itself, or the one that a peft wrapper holds, with the wrapper's adapter at work in it.

    Raises ModelUnsupported for any other object.
    """
    inside = cast(Any, loaded).get_base_model() if hasattr(loaded, "get_base_model") else loaded
    if not isinstance(inside, PreTrainedModel):
        raise ModelUnsupported(
            f"{type(loaded).__name__} is not a model; give a name, a transformers model, or a peft model "
            "around one"
        )
    return inside


def torch_device(device: str | None) -> torch.device:
    """The device of that name. Raises InvalidOption where it is not to be had."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidOption(f"device {device!r} cannot be used here: {reason}") from error
    return where


def _is_folder(name: str, source: str) -> bool:
    """Is the name a folder here (True) or a hub id (False)? Raises ModelNotFound for neither."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelCorrupt(f"{name}: the folder has no config.json, so it is not a model")
        return True
    if path.exists():
        raise ModelNotFound(f"{name} is a file; give the folder that holds config.json and the weights")
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local or name in EMBEDDED:
        raise ModelNotFound(
            f"no model folder {name}; give a folder, a hub id (owner/name) or one of {', '.join(EMBEDDED)}"
        )
    return False


def _named(name: str, local: bool, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:300]
    if not local:
        return ModelNotFound(f"{name}: neither a folder here nor a model the hub gives out ({reason})")
    if isinstance(error, ValueError) and ("model type" in reason or "Unrecognized" in reason):
        return ModelUnsupported(f"{name}: not a causal language model that transformers knows ({reason})")
    return ModelCorrupt(f"{name}: the folder cannot be loaded whole ({reason})")


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise InvalidOption(f"{option} must be one of {', '.join(allowed)}; got {value!r}")
    return value
