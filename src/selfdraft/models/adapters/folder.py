"""Adapters on disk: a folder with `adapter_config.json`, `adapter_model.safetensors` and a card.

LoRA parts are named and laid out as peft does, so peft reads them; mask embeddings and prefix stand beside
them, and what only this package knows stands under "selfdraft" in the config. A folder names its base by the
fingerprint of the base's config and weights. Other weights of the same shape (another quantisation, the
checkpoint before it was quantised) take it with a warning, since drafts cannot change a text; a model of
another shape or vocabulary is refused. The package ships some: each folder in `shipped` is found by its name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from ..._common import options
from ...drafting.method import Lookahead, Method
from ...errors import AdapterError, InvalidOption
from ..kv_cache import Pair
from .adapter import Adapter, AdapterConfig, LowRank

LOG = logging.getLogger("selfdraft")
SHIPPED = Path(__file__).parent / "shipped"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
VOCABULARY = "mask_vocabulary"  # the ids that masks predict, where these are not all
PEFT = "base_model.model."  # before the names of layers, in peft's layout


class Base(Protocol):
    """A model that takes adapters: the decoder, or transformers' forward."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> PretrainedConfig: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def fingerprint(self) -> str:
        """See `fingerprint`."""

    def adapter_shape(
        self, targets: Sequence[str]
    ) -> tuple[int, Sequence[Pair | None], Mapping[str, tuple[int, int]]]:
        """What `Adapter` is made for, with LoRA on such linear layers. Raises AdapterError for a target that
        the model has not."""

    def adapted(self, adapter: Adapter) -> Self:
        """The model with an adapter at work. Raises AdapterError where a part has no place in it."""


AnyBase = TypeVar("AnyBase", bound=Base)


def chosen(method: Method, label: str, name: str, given: str | None) -> str | None:
    """The adapter given. label, name: of the method and of the model.

    Raises AdapterError where the method needs one and none was given.
    """
    if given is None and getattr(method, "adapted", False):
        raise AdapterError(
            f"method {label!r} drafts with an adapter of {name}: give a folder, a hub id or one that is "
            f"shipped ({', '.join(shipped())}) as adapter=... or --adapter, or train one with "
            f"`selfdraft train {label}`"
        )
    return given


def fit(model: AnyBase, method: Method, label: str, source: str | None) -> AnyBase:
    """A model with that adapter. Raises AdapterError where it lacks what the method needs, or would do
    nothing."""
    if source is None:
        return model
    adapter = load(source, model)
    if getattr(method, "adapted", False) and not adapter.config.masks:
        raise AdapterError(
            f"adapter {source!r} has no mask tokens, with which method {label!r} drafts; it tunes the model "
            "for others, as jacobi"
        )
    if adapter.config.gated and not drafts_with(method):
        raise AdapterError(f"adapter {source!r}: method {label!r} drafts without one")
    return model.adapted(adapter)


def drafts_with(method: Method) -> bool:
    """Does the method draft with the mask tokens of an adapter, where there is one?"""
    return getattr(method, "adapted", False) or getattr(method, "adaptable", False)


def shipped(model: Base | None = None) -> dict[str, Path]:
    """Folders of the adapters in the package, by name; of a model, those that fit it."""
    folders = {path.parent.name: path.parent for path in sorted(SHIPPED.glob(f"*/{CONFIG}"))}
    if model is None:
        return folders
    own = shape(model)
    return {name: path for name, path in folders.items() if _config(path, name)[1].get("shape") == own}


def shape(model: Base) -> dict[str, int]:
    """What must be equal in a model for an adapter of another to fit it."""
    hidden, pairs, _ = model.adapter_shape(())
    return {"vocabulary": model.vocab_size, "hidden": hidden, "layers": len(pairs)}


def load(source: str, model: Base, bound: bool = True) -> Adapter:
    """The adapter of a folder, a hub id or a shipped name, for a model, in its dtype. A folder here goes
    before a shipped adapter of the same name.

    bound: look at what it was trained for, warn about other weights of the same shape, and refuse another
    shape. False where its training is only continued.

    Raises AdapterError where files are missing or damaged, or where it was trained for another shape.
    """
    folder = _folder(source)
    config, about = _config(folder, source)
    if bound:
        _check_base(about, config, model, source)
    weights = _weights(folder, source)
    adapter = Adapter(config, *model.adapter_shape(config.targets if config.rank else ()))
    adapter.vocabulary = _vocabulary(weights.pop(VOCABULARY, None), model, source)
    _fill(adapter, weights, source)
    adapter.odds, adapter.tuning_cost = about["odds"], about.get("tuning_cost")
    few = torch.float32 if model.device.type == "cpu" and model.dtype != torch.float64 else model.dtype
    return adapter.to(model.device, few).requires_grad_(False)


def _check_base(about: Mapping[str, Any], config: AdapterConfig, model: Base, source: str) -> None:
    """Warn if a model is not the base of an adapter. Raises AdapterError if it is of another shape."""
    if about.get("base") == model.fingerprint():
        return
    base, own = about.get("base_name"), shape(model)
    if about.get("shape") != own:
        raise AdapterError(
            f"adapter {source} was trained for {base!r}, a model of another shape "
            f"({_words(about.get('shape'))}) than this {model.name} ({_words(own)}): load the base it names, "
            "or train an adapter for this one"
        )
    follows = (
        "fewer of its draft tokens may be accepted; the text is the model's own"
        if config.gated
        else "the text is that of these weights tuned with it, and its tuning cost was measured on others"
    )
    _warn(f"adapter {source} was trained for other weights ({base!r}) than those of this model: {follows}")


@cache  # once, however many engines share a model
def _warn(text: str) -> None:
    LOG.warning("%s", text)


def _words(sizes: Mapping[str, int] | None) -> str:
    return ", ".join(f"{name} {size}" for name, size in (sizes or {}).items()) or "which it does not say"


def save(
    folder: Path,
    adapter: Adapter,
    model: Base,
    method: str,
    base_name: str,
    about: Mapping[str, Any],
) -> None:
    """Write an adapter of a model, in bfloat16. about: what else the config shall say under "selfdraft"."""
    config = adapter.config
    record: dict[str, Any] = {"base_model_name_or_path": base_name}
    if config.rank:
        record |= {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": config.rank,
            "lora_alpha": config.rank * config.scale,
            "target_modules": list(config.targets),
            "bias": "none",
        }
    record["selfdraft"] = {
        "method": method,
        "masks": config.masks,
        "distinct": config.distinct,
        "prefix": config.prefix,
        "sampler": config.sampler,
        "gated": config.gated,
        "filler": config.filler,
        "base": model.fingerprint(),
        "base_name": base_name,
        "shape": shape(model),
        "odds": adapter.odds,
        **about,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: part.detach().bfloat16().cpu().contiguous() for name, part in _parts(adapter).items()}
    if adapter.vocabulary is not None:
        tensors[VOCABULARY] = adapter.vocabulary
    part = folder / (WEIGHTS + ".part")
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _parts(adapter: Adapter) -> dict[str, Tensor]:
    """The trained parts by their names in a file."""
    parts: dict[str, Tensor] = {"mask_tokens": adapter.masks} if adapter.config.masks else {}
    for layer in adapter.kept.values():
        parts[f"prefix.{layer}.keys"] = adapter.keys[layer]
        parts[f"prefix.{layer}.values"] = adapter.values[layer]
    if adapter.sampler is not None:
        parts["sampler_head.inner"] = adapter.sampler.inner
        parts["sampler_head.outer"] = adapter.sampler.outer
    for name, low in zip(adapter.names, adapter.lora, strict=True):
        assert isinstance(low, LowRank)
        parts[f"{PEFT}{name}.lora_A.weight"] = low.a
        parts[f"{PEFT}{name}.lora_B.weight"] = low.b
    return parts


def _vocabulary(ids: Tensor | None, model: Base, source: str) -> Tensor | None:
    """Raises AdapterError for what are no ids of the model."""
    if ids is None:
        return None
    if ids.dtype != torch.int32 or ids.dim() != 1 or len(ids) < 2:
        raise AdapterError(f"adapter {source}: {VOCABULARY} is no list of ids")
    if ids.min() < 0 or ids.max() >= model.vocab_size or len(ids.unique()) < len(ids):
        raise AdapterError(f"adapter {source}: {VOCABULARY} holds ids twice, or beyond {model.vocab_size}")
    return ids


@torch.no_grad()
def _fill(adapter: Adapter, weights: Mapping[str, Tensor], source: str) -> None:
    parts = _parts(adapter)
    if parts.keys() != weights.keys():
        odd = sorted(parts.keys() ^ weights.keys())
        raise AdapterError(f"adapter {source}: config and weights disagree about {odd[0]}")
    for name, part in parts.items():
        if part.shape != weights[name].shape:
            raise AdapterError(
                f"adapter {source}: {name} has shape {tuple(weights[name].shape)}, the model takes "
                f"{tuple(part.shape)}"
            )
        if not weights[name].isfinite().all():
            raise AdapterError(f"adapter {source}: {name} holds numbers that are not finite")
        part.copy_(weights[name])


def _config(folder: Path, source: str) -> tuple[AdapterConfig, dict[str, Any]]:
    try:
        record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        about = record["selfdraft"]
        config = _read(record, about)
        look = {"ids": range(config.masks), "odds": about.get("odds", {})}
        return config, {**about, "odds": options.read(Lookahead, look, "adapter").odds}
    except FileNotFoundError as error:
        hidden = " (the folder here goes before the shipped adapter of that name)" * (source in shipped())
        raise AdapterError(f"adapter {source}: no {CONFIG} there{hidden}") from error
    except (OSError, ValueError, KeyError, TypeError, InvalidOption) as error:
        raise AdapterError(f"adapter {source}: {CONFIG} is not one of this package ({error})") from error


def _read(record: Mapping[str, Any], about: Mapping[str, Any]) -> AdapterConfig:
    targets: Sequence[str] = record.get("target_modules", ())
    given = {name: about[name] for name in ("masks", "distinct", "prefix", "sampler")}
    given |= {"gated": about.get("gated", True), "filler": about.get("filler")}
    lora = {"rank": record.get("r", 0), "alpha": record.get("lora_alpha"), "targets": tuple(targets)}
    return options.read(AdapterConfig, given | lora, "adapter")


def _weights(folder: Path, source: str) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise AdapterError(f"adapter {source}: no {WEIGHTS} there") from error
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"adapter {source}: {WEIGHTS} cannot be read ({error})") from error
    return weights


def _folder(source: str) -> Path:
    """Where an adapter's files are; those of a hub id are fetched. Raises AdapterError."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if source in shipped():
        return shipped()[source]
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise AdapterError(
            f"no adapter folder {source}; give a folder, a hub id (owner/name) or one that is shipped: "
            f"{', '.join(shipped())}"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # whatever a hub or a network can answer
        reason = " ".join(str(error).split())[:300]
        raise AdapterError(
            f"{source}: neither a folder here nor an adapter the hub gives out ({reason})"
        ) from error
