"""The rows of a suite: from a folder of files, or from where they are published, through `datasets`.

Either way they come with a fingerprint, so that a report says which data it was measured on. For files it is
the SHA-256 of each file's contents, for a published set that of its rows.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InvalidSuite
from .suite import Home, Item, Row, Suite, items


@dataclass(frozen=True)
class Source:
    """Items of a suite and the data they were made from."""

    suite: Suite
    items: list[Item]
    fingerprints: dict[str, str]
    """Name of each file or published set -> SHA-256."""


def from_folder(suite: Suite, data: Path) -> Source:
    """The suite from the files of a folder, or of its folder `eval`. Raises InvalidSuite."""
    if not data.is_dir():
        raise InvalidSuite(f"--data {data} is not a folder; give the one that holds {suite.files[0]}")
    return from_files(suite, [_find(suite, data, name) for name in suite.files])


def from_files(suite: Suite, paths: list[Path]) -> Source:
    """The suite from these files of JSON lines. Raises InvalidSuite."""
    rows: list[tuple[str, Row]] = []
    fingerprints = {}
    for path, name in zip(paths, suite.files, strict=True):
        raw = _bytes(path)
        fingerprints[name] = hashlib.sha256(raw).hexdigest()
        rows += _lines(path, raw)
    return Source(suite, _some(suite, items(suite, rows)), fingerprints)


def from_home(suite: Suite) -> Source:
    """The suite from where it is published, through `datasets`. Raises InvalidSuite."""
    if not suite.home:
        raise InvalidSuite(
            f"suite {suite.name!r} has no public home; give --data, a folder that holds {suite.files[0]}"
        )
    made: list[Item] = []
    fingerprints = {}
    for home in suite.home:
        rows = _published(suite, home)
        text = json.dumps(rows, sort_keys=True, ensure_ascii=False, default=str)
        fingerprints[home.name] = hashlib.sha256(text.encode()).hexdigest()
        numbered = ((f"{home.name}, row {i}", row) for i, row in enumerate(rows, start=1))
        made += items(suite, numbered, home.prompt)
    return Source(suite, _some(suite, made), fingerprints)


def _some(suite: Suite, made: list[Item]) -> list[Item]:
    if not made:
        raise InvalidSuite(f"suite {suite.name!r}: its data holds no rows")
    return made


def _find(suite: Suite, data: Path, name: str) -> Path:
    for path in (data / name, data / "eval" / name):
        if path.is_file():
            return path
    home = ", ".join(home.name for home in suite.home)
    hint = f"; without --data it is read from {home}" if home else ""
    raise InvalidSuite(f"suite {suite.name!r}: neither {data} nor its folder eval holds {name}{hint}")


def _bytes(path: Path) -> bytes:
    """The contents of a file, unpacked if it ends in .gz."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidSuite(f"{path} cannot be read: {error}") from error


def _lines(path: Path, raw: bytes) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidSuite(
                f"{where}: not JSON ({error}); the file must hold one object a line"
            ) from error
        if not isinstance(row, dict):
            raise InvalidSuite(f"{where}: must be an object; got {line[:60].decode(errors='replace')}")
        yield where, row


def _published(suite: Suite, home: Home) -> list[dict[str, Any]]:
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise InvalidSuite(
            f"suite {suite.name!r}: reading {home.name} needs the package datasets; "
            "pip install 'selfdraft[bench]', or give --data"
        ) from error
    try:
        if home.files:
            rows = datasets.load_dataset("json", data_files=home.files, split=home.split)
        else:
            rows = datasets.load_dataset(home.dataset, home.config, split=home.split)
        return [dict(row) for row in rows]
    except Exception as error:  # an unreachable set raises errors of four libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InvalidSuite(
            f"suite {suite.name!r}: {home.name} cannot be read ({reason}); "
            "look at the network, or give --data, a folder that has it"
        ) from error
