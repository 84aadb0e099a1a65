"""The folder where converted models are kept between runs: $SELFDRAFT_CACHE, or the platform's cache folder.

    <cache>/gguf/<SHA-256 of the file>-v<version of the conversion>/   config.json, tokenizer.json, ...; and
                                                                      model.safetensors once it was needed
    <cache>/digests/<name>.json                                       SHA-256 of a file seen before

A folder or a file appears under its name once it is whole, by one rename, so processes may race for it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CONVERSION_VERSION = 2
ABANDONED_AFTER = 24 * 3600.0  # seconds; an unfinished folder as old as that has no process any more
LOG = logging.getLogger("selfdraft")


def cache_folder() -> Path:
    given = os.environ.get("SELFDRAFT_CACHE")
    if given:
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "selfdraft"
    if sys.platform == "win32":
        return (
            Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "selfdraft" / "Cache"
        )
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "selfdraft"


def converted_folder(digest: str) -> Path:
    """Where the conversion of a file with that SHA-256 is kept, whether or not it is there."""
    return cache_folder() / "gguf" / f"{digest}-v{CONVERSION_VERSION}"


def is_converted(digest: str) -> bool:
    return (converted_folder(digest) / "config.json").is_file()


def build(digest: str, fill: Callable[[Path], None]) -> Path:
    """The folder of that name in the cache, filled first where it is not there yet. Raises OSError."""
    target = converted_folder(digest)
    if is_converted(digest):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target.parent)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix="part-"))
    try:
        fill(part)
        part.chmod(0o755)  # mkdtemp's own keeps other users of a shared cache out
        try:
            part.rename(target)
        except OSError:
            if not is_converted(digest):  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def add(folder: Path, name: str, write: Callable[[Path], None]) -> None:
    """Writes a file into a folder where it is not there yet. Raises OSError."""
    if (folder / name).is_file():
        return
    part = Path(tempfile.mkdtemp(dir=folder, prefix="part-"))
    try:
        write(part / name)
        os.replace(part / name, folder / name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sha256(path: Path) -> str:
    """A file's SHA-256, computed once for as long as its size and time of change stay. Raises OSError."""
    path = path.resolve()
    stat = path.stat()
    seen = [str(path), stat.st_size, stat.st_mtime_ns]
    note = cache_folder() / "digests" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["file"] == seen:
            return str(known["sha256"])
    except (OSError, ValueError, LookupError, TypeError):
        pass  # not seen before, or the note is damaged
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False, encoding="utf-8") as part:
            json.dump({"file": seen, "sha256": digest}, part)
        os.replace(part.name, note)
    except OSError:
        LOG.debug("the SHA-256 of %s could not be noted", path)
    return digest


def _remove_abandoned(folder: Path) -> None:
    """Deletes what killed processes have left."""
    for part in (*folder.glob("part-*"), *folder.glob("*/part-*")):
        try:
            if time.time() - part.stat().st_mtime > ABANDONED_AFTER:
                shutil.rmtree(part, ignore_errors=True)
        except OSError:
            continue  # another process deleted it
