"""What the folders of all runs share: files written whole, a lock, and the comparison of a run's settings."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_all(file: Any, data: bytes) -> None:
    """Write all of the data or raise OSError: an unbuffered file may take a part of it without an error."""
    while data:
        data = data[file.write(data) :]


def lock(folder: Path) -> int:
    """Lock a folder against other processes until the returned descriptor is closed.

    Raises BlockingIOError where another process holds the lock. On POSIX the folder itself is locked; Windows
    cannot open a folder, so a file `.lock` in it is.
    """
    if sys.platform == "win32":
        import msvcrt

        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            os.close(handle)
            raise BlockingIOError(error.errno, "locked by another process") from error
        return handle
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    return handle


def changes(held: Any, asked: Any) -> Iterator[str]:
    """The settings in which a run on disk differs from the one asked for, in words."""
    for path, there, here in differences(held, asked):
        yield f"{path}: {short(there)} there, {short(here)} asked for"


def differences(one: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The paths at which two runs differ, with both values; None where a run has no value."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            yield from differences(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif one != other:
        yield name, one, other


def short(value: object) -> str:
    """A value as JSON, cut to 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
