"""From a name to a model and its tokenizer. A name is one of

    smollm2, looped-tiny      a model known here
    path/to/folder            a transformers model, or a folder with one GGUF file
    path/to/file.gguf         a GGUF file
    owner/name                a transformers model on the Hugging Face hub
    owner/name:file.gguf      a GGUF file on the hub

Of a GGUF file the configuration and the tokenizer are converted once into a transformers folder in the cache
(`cache_folder`), and the weights where transformers' forward needs them.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from ..errors import InvalidOption, ModelCorrupt, ModelError, ModelNotFound, ModelUnsupported
from . import cache_folder, hub, smollm2
from .decoder import Decoder
from .decoder_config import unsupported
from .gguf.convert import convert, convert_weights
from .gguf.reader import GgufFile
from .kernels.library import library
from .looped.decoder import LoopedForCausalLM  # which also makes looped models known to transformers
from .looped.stages import StagedModel
from .transformers import Numerics, TransformersModel, transformers_model
from .weights import WEIGHTS, FolderWeights, GgufWeights, ModuleWeights, Weights

LOG = logging.getLogger("selfdraft")
AnyModel = Decoder | TransformersModel
DEFAULT_MODEL = smollm2.NAME
EMBEDDED = {"looped-tiny": Path(__file__).parent / "looped" / "looped-tiny"}
KNOWN = (DEFAULT_MODEL, *EMBEDDED)
WEIGHTS_FILE = "model.safetensors"
DTYPES = ("bfloat16", "float16", "float32", "float64")
HUB_FILE = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+):(?P<file>.+\.gguf)", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """What transformers is asked to load."""

    path: str
    """A folder here or a hub id."""
    is_folder: bool
    converted: bool = False
    """A folder that this package has written from a GGUF file."""
    gguf: Path | None = None
    """That file, if it is on this disk."""
    download: bool = False
    """A hub id whose files may have to be fetched."""


def load_pretrained(
    name: str = DEFAULT_MODEL, dtype: str | None = None, device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads weights in `dtype` (None: as stored, bfloat16 for GGUF) on `device` (None: CUDA if there is one,
    else the CPU).

    Raises ModelNotFound, ModelCorrupt or ModelUnsupported, and InvalidOption for a dtype or device that does
    not exist here.
    """
    where = torch_device(device)
    kind = "auto" if dtype is None else getattr(torch, _one_of("dtype", dtype, DTYPES))
    with _source(name) as source, _quiet():
        if source.gguf is not None:
            _write_weights(name, source.gguf, Path(source.path))
        try:
            model, report, tokenizer = _load(source, kind)
        except (InvalidOption, ModelUnsupported) as error:  # raised by the config of a looped model
            raise type(error)(f"{name}: {error}") from error
        except Exception as error:  # whatever a damaged file can raise in the libraries that read it
            raise _named(name, source, error) from error
    _check_weights(name, model, report)
    return cast(Any, model).to(where), tokenizer


def drive(model: torch.nn.Module, numerics: Numerics | None = None) -> TransformersModel:
    """A transformers model behind the engine's interface: in whole forwards, or a looped one in stages."""
    inside = transformers_model(model)
    looped = isinstance(inside, LoopedForCausalLM) and inside.config.loops > 1
    return StagedModel(model, numerics) if looped else TransformersModel(model, numerics)


def load_decoder(
    name: str = DEFAULT_MODEL,
    weights: str | None = None,
    activations: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> tuple[Decoder, PreTrainedTokenizerBase] | str:
    """The model on the CPU kernels with its tokenizer; or why it goes through transformers' forward, in
    words.

    weights: the format in which linear layers run, as-stored (None), bf16, q8 or q4. dtype: bfloat16 or
    float32 instead. activations: see `Decoder`. Raises as `load_pretrained`, and InvalidOption for
    activations where no weights are quantised.
    """
    kind = _weights_kind(weights, dtype)
    kernels = library()
    if kind is None:
        return f"dtype {dtype} is not one of the decoder's"
    if torch_device(device).type != "cpu":
        return "the decoder runs on the CPU"
    if kernels is None:
        return "there is no build of the kernels for this machine (pip install from a checkout builds one)"
    with _source(name) as source, _quiet():
        where: Any = {"local_files_only": not source.download}
        try:
            config = AutoConfig.from_pretrained(source.path, **where)
            reason = unsupported(config)
            if reason is not None:
                return reason
            folder = Path(source.path) if source.is_folder else hub.snapshot(source.path, source.download)
            tokenizer = _tokenizer(source, where)
            stored: Weights = (
                FolderWeights(folder)
                if source.gguf is None
                else GgufWeights(GgufFile(source.gguf, name), config.to_dict())
            )
            decoder = Decoder(
                config,
                stored,
                kernels,
                kind=kind,
                activations=activations or 8,
                generation_config=_generation_config(source.path, where),
            )
        except (InvalidOption, ModelUnsupported) as error:
            return str(error)
        except ModelError:
            raise
        except Exception as error:  # whatever a damaged file can raise in the libraries that read it
            raise _named(name, source, error) from error
    if activations is not None and not decoder.quantised:
        raise InvalidOption(
            f"activations={activations} goes with quantised weights; {name} runs in {decoder.weights_label}",
            option="activations",
        )
    return decoder, tokenizer


def load_tokenizer(name: str = DEFAULT_MODEL) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without its weights. Raises as `load_pretrained`."""
    with _source(name) as source, _quiet():
        try:
            return _tokenizer(source, {"local_files_only": not source.download})
        except ModelError:
            raise
        except Exception as error:  # as in `load_decoder`
            raise _named(name, source, error) from error


def float32_pair(name: str = DEFAULT_MODEL) -> tuple[Decoder, TransformersModel]:
    """The decoder and transformers' forward on the same weights in float32, to compare them. The decoder
    packs those that transformers has loaded. Raises as `load_pretrained`, and ModelUnsupported without the
    decoder."""
    kernels = library()
    if kernels is None:
        raise ModelUnsupported(f"{name}: there is no build of the kernels for this machine")
    loaded, _ = load_pretrained(name, "float32", "cpu")
    return Decoder(loaded.config, ModuleWeights(loaded), kernels), TransformersModel(loaded, "fast")


def _weights_kind(weights: str | None, dtype: str | None) -> str | None:
    """The decoder's format for linear layers; None where it has none. Raises InvalidOption."""
    if weights is not None and dtype is not None:
        raise InvalidOption("weights and dtype both say how weights are held; give one", option="weights")
    if dtype is not None:
        _one_of("dtype", dtype, DTYPES)
        return {"bfloat16": "bf16", "float32": "f32"}.get(dtype)
    return _one_of("weights", weights or "as-stored", WEIGHTS)


def _generation_config(path: str, where: dict[str, Any]) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(path, **where)
    except OSError:
        return None


def end_ids(
    config: PretrainedConfig, generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Token ids that end a text: all that generation_config.json, the tokenizer and config.json declare.

    A config class has a default of its own for what config.json leaves out (2 for a Llama). It counts only
    where that token is special to the tokenizer.
    """
    ids: set[int] = set()
    ids.update(_ids(getattr(generation, "eos_token_id", None)))
    ids.update(_ids(tokenizer.eos_token_id))
    config = config.get_text_config()
    declared = _ids(getattr(config, "eos_token_id", None))
    if declared == _ids(getattr(type(config)(), "eos_token_id", None)):
        declared &= {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    return frozenset(ids | declared)


def torch_device(device: str | None) -> torch.device:
    """The device of that name. Raises InvalidOption where it is not available."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidOption(f"device {device!r} cannot be used here: {reason}") from error
    return where


@contextmanager
def _source(name: str) -> Iterator[Source]:
    """Finds what the name means. Raises ModelNotFound, ModelCorrupt or ModelUnsupported."""
    path = Path(EMBEDDED.get(name) or Path(name).expanduser())
    on_hub = HUB_FILE.fullmatch(name)
    converted = cache_folder.converted_folder(smollm2.SHA256)
    if name == DEFAULT_MODEL and smollm2.file_in_package() is None and (converted / WEIGHTS_FILE).is_file():
        yield Source(str(converted), is_folder=True, converted=True)
    elif name == DEFAULT_MODEL:
        with _converted(name, smollm2.gguf_file()) as source:
            yield source
    elif path.is_dir() and (path / "config.json").is_file():
        yield Source(str(path), is_folder=True)
    elif path.is_dir():
        with _converted(name, _only_gguf(name, path)) as source:
            yield source
    elif path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelNotFound(f"{name} is not a GGUF file; give one, or the folder that holds config.json")
        with _converted(name, path) as source:
            yield source
    elif on_hub:
        with _converted(name, hub.file(on_hub["repository"], on_hub["file"])) as source:
            yield source
    else:
        yield _hub_model(name)


def _only_gguf(name: str, folder: Path) -> Path:
    """The GGUF file in a folder. Raises ModelCorrupt for none and for several."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf")
    if not files:
        raise ModelCorrupt(
            f"{name}: the folder has neither config.json nor a GGUF file, so it is not a model"
        )
    if len(files) > 1:
        listed = ", ".join(file.name for file in files)
        raise ModelNotFound(f"{name}: the folder has {len(files)} GGUF files; give one of them: {listed}")
    return files[0]


def _hub_model(name: str) -> Source:
    """A hub id. Raises ModelNotFound, with names like that one."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.lower().endswith(".gguf"):
        raise ModelNotFound(
            f"{name}: there is no such file or folder; give a folder, a GGUF file, a hub id (owner/name or "
            f"owner/name:file.gguf) or one of {', '.join(KNOWN)}"
        )
    try:
        return Source(name, is_folder=False, download=hub.locate(name, "config.json"))
    except ModelNotFound as error:
        raise ModelNotFound(f"{error}{hub.near(name, KNOWN)}") from error


@contextmanager
def _converted(name: str, path: Path) -> Iterator[Source]:
    """A GGUF file as a transformers folder: in the cache, or a temporary one where the cache cannot be
    written."""
    try:
        digest = cache_folder.sha256(path)
    except OSError as error:
        raise ModelNotFound(f"{name} cannot be read: {error.strerror or error}") from error
    try:
        folder = cache_folder.build(digest, lambda empty: convert(GgufFile(path, name), empty))
    except OSError as error:
        LOG.warning(
            "the cache folder %s cannot be written (%s), so %s is converted anew each time; "
            "set SELFDRAFT_CACHE to another folder",
            cache_folder.cache_folder(),
            error.strerror or error,
            name,
        )
    else:
        yield Source(str(folder), is_folder=True, converted=True, gguf=path)
        return
    with tempfile.TemporaryDirectory(prefix="selfdraft-", ignore_cleanup_errors=True) as temporary:
        try:
            convert(GgufFile(path, name), Path(temporary))
        except OSError as error:
            reason = error.strerror or error
            raise ModelError(f"{name}: the conversion to {temporary} cannot be written: {reason}") from error
        yield Source(temporary, is_folder=True, converted=True, gguf=path)


def _write_weights(name: str, file: Path, folder: Path) -> None:
    """Adds the weights to the folder that was converted from a GGUF file. Raises ModelError where it
    cannot be written, and as `convert_weights`."""
    try:
        cache_folder.add(folder, WEIGHTS_FILE, lambda path: convert_weights(GgufFile(file, name), path))
    except OSError as error:
        reason = error.strerror or error
        raise ModelError(
            f"{name}: its weights cannot be written into {folder}: {reason}; "
            "set SELFDRAFT_CACHE to another folder"
        ) from error


def _load(source: Source, dtype: Any) -> tuple[PreTrainedModel, dict[str, Any], PreTrainedTokenizerBase]:
    where: Any = {"local_files_only": not source.download}
    config = AutoConfig.from_pretrained(source.path, **where)
    loaded = AutoModelForCausalLM.from_pretrained(
        source.path, config=config, dtype=dtype, output_loading_info=True, **where
    )
    model, report = cast(Any, loaded)
    return model, report, _tokenizer(source, where)


def _tokenizer(source: Source, where: dict[str, Any]) -> PreTrainedTokenizerBase:
    kind = PreTrainedTokenizerFast if source.converted else AutoTokenizer
    return cast(PreTrainedTokenizerBase, cast(Any, kind).from_pretrained(source.path, **where))


def _check_weights(name: str, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Raises ModelCorrupt where the weights and the config are of different shapes."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelCorrupt(f"{name}: {len(missing)} weights are missing, {missing[0]} among them")
    left = sorted(report["unexpected_keys"])
    if left and isinstance(model, LoopedForCausalLM):  # others may hold heads for other tasks
        raise ModelCorrupt(
            f"{name}: {len(left)} weights have no place in the model, {left[0]} among them; its config is of "
            "another shape"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _named(name: str, source: Source, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:300]
    if isinstance(error, ValueError) and ("model type" in reason or "Unrecognized" in reason):
        return ModelUnsupported(f"{name}: not a causal language model that transformers knows ({reason})")
    if not source.is_folder:
        return ModelNotFound(f"{name}: the hub's model cannot be loaded ({reason})")
    return ModelCorrupt(f"{name}: the folder cannot be loaded whole ({reason})")


def _ids(value: int | list[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise InvalidOption(f"{option} must be one of {', '.join(allowed)}; got {value!r}")
    return value
