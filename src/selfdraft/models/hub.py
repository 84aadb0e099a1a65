"""The Hugging Face hub, asked without long waits: one short try, then what is already on the disk."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)

from ..errors import ModelNotFound

TIMEOUT = 3.0  # seconds for the hub's first answer


def locate(repository: str, filename: str) -> bool:
    """Must the hub be asked for the repository's files (True), or are they on this disk alone (False)?

    Raises ModelNotFound where neither has it.
    """
    try:
        on_disk = isinstance(huggingface_hub.try_to_load_from_cache(repository, filename), str)
    except HFValidationError as error:
        raise ModelNotFound(f"{repository}: not a hub id (owner/name)") from error
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    else:
        try:
            url = huggingface_hub.hf_hub_url(repository, filename)
            huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT)
            return True
        except GatedRepoError as error:
            reason = "access must be asked for on its page, then `hf auth login`"
            if not on_disk:
                raise ModelNotFound(f"{repository}: {reason}") from error
        except RepositoryNotFoundError as error:
            if not on_disk:
                raise ModelNotFound(f"{repository}: the hub has no such model, or it is private") from error
        except EntryNotFoundError as error:
            if not on_disk:
                raise ModelNotFound(f"{repository}: the hub's model has no file {filename}") from error
        except HfHubHTTPError as error:
            reason = f"the hub answered {error.response.status_code}"
        except Exception as error:  # whatever the network's layers can raise
            reason = (
                f"the hub cannot be reached ({' '.join(str(error).split())[:120] or type(error).__name__})"
            )
    if on_disk:
        return False
    raise ModelNotFound(f"{repository}: not on this disk, and {reason}")


def file(repository: str, filename: str) -> Path:
    """A file of the hub on this disk, downloaded where needed. Raises ModelNotFound."""
    download = locate(repository, filename)
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                repository, filename, local_files_only=not download, etag_timeout=TIMEOUT
            )
        )
    except Exception as error:  # a lost connection, a full disk
        reason = " ".join(str(error).split())[:200]
        raise ModelNotFound(f"{repository}:{filename} could not be downloaded ({reason})") from error


def snapshot(repository: str, download: bool) -> Path:
    """The folder of a transformers model of the hub on this disk, downloaded where needed. Raises
    ModelNotFound."""
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt"],
                local_files_only=not download,
                etag_timeout=TIMEOUT,
            )
        )
    except Exception as error:  # a lost connection, a full disk
        reason = " ".join(str(error).split())[:200]
        raise ModelNotFound(f"{repository} could not be downloaded ({reason})") from error


def models_on_disk() -> list[str]:
    """Ids of the models in the hub's cache folder."""
    folders = Path(constants.HF_HUB_CACHE).glob("models--*--*")
    return sorted(folder.name.removeprefix("models--").replace("--", "/", 1) for folder in folders)


def near(name: str, known: Iterable[str]) -> str:
    """A sentence with names like that one, the models on the disk among them; empty where there is none."""
    found = difflib.get_close_matches(name, sorted({*known, *models_on_disk()}), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(found)}?" if found else ""
