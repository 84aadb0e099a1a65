"""Finished answers, one JSON line each, written as they come, so that a stopped run can be continued.

A folder holds one run. `run.json` has everything that its figures depend on. If the settings of the command
differ, the journal refuses to continue and says how. A line that was cut off (the machine died) is dropped; a
write that fails (the disk is full) removes what it has written of its line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .._common.run_folder import changes, write_all
from ..drafting.acceptance import DraftCount
from ..errors import BenchError


class Key(NamedTuple):
    """Which answer: arms and repeats of the same suite, item and turn answer the same prompt."""

    suite: str
    item: str
    turn: int
    arm: str
    repeat: int


@dataclass(frozen=True)
class Record:
    """One answer as it was measured. The fields that `Answer` has too are documented there."""

    suite: str
    item: str
    turn: int
    arm: str
    repeat: int
    prompt_tokens: int
    ids: tuple[int, ...]
    runs: tuple[int, ...]
    rows: tuple[int, ...]
    times: tuple[float, ...]
    peak: int | None
    """Peak memory of the process (on CUDA: of torch) in bytes while it answered."""
    others: float | None
    """Processor seconds that other processes used meanwhile. None where the system does not report it."""
    part: float = 1.0
    sources: Mapping[str, DraftCount] = field(default_factory=dict)
    readouts: Mapping[str, DraftCount] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return Key(self.suite, self.item, self.turn, self.arm, self.repeat)


class Journal:
    """The answers of one run, in memory and on disk."""

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder = folder
        self.run: Mapping[str, Any] = json.loads(json.dumps(run))
        self.path = folder / "answers.jsonl"
        self.records: dict[Key, Record] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._claim(self.run)
            self._read()
        except OSError as error:
            raise BenchError(f"--out {folder} cannot be used: {error.strerror or error}") from error
        self.found = len(self.records)

    def add(self, record: Record) -> None:
        """Keep an answer. Raises BenchError if it cannot be written; the others stay."""
        line = json.dumps(asdict(record), separators=(",", ":")).encode() + b"\n"
        size = self.path.stat().st_size
        try:
            with self.path.open("ab", buffering=0) as file:
                write_all(file, line)
        except OSError as error:
            os.truncate(self.path, size)
            raise BenchError(
                f"{self.path}: {error.strerror or error}; the {len(self.records)} finished answers are kept, "
                "and the same command goes on from there once there is room"
            ) from error
        self.records[record.key] = record

    def save(self, name: str, value: object) -> Path:
        """Write a JSON file into the folder, completely or not at all. Raises BenchError."""
        return self.write(name, json.dumps(value, indent=1) + "\n")

    def write(self, name: str, text: str) -> Path:
        """Write a file into the folder, completely or not at all. Raises BenchError."""
        path = self.folder / name
        part = path.with_suffix(".part")
        try:
            with part.open("wb", buffering=0) as file:
                write_all(file, text.encode())
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise BenchError(
                f"{path}: {error.strerror or error}; the {len(self.records)} finished answers are kept"
            ) from error
        return path

    def _claim(self, run: Mapping[str, Any]) -> None:
        """Raises BenchError if the folder belongs to another run."""
        mark = self.folder / "run.json"
        if not mark.exists():
            if self.path.exists():
                raise BenchError(f"--out {self.folder} holds answers without run.json; give another folder")
            self.save("run.json", run)
            return
        try:
            held = json.loads(mark.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BenchError(f"{mark} is not JSON ({error}); give another folder to --out") from error
        changed = list(changes(held, run))
        if changed:
            raise BenchError(
                f"--out {self.folder} holds another run ({'; '.join(changed)}); give another folder"
            )

    def _read(self) -> None:
        """Read the answers; drop a last line that was cut off."""
        self.path.touch()
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            record = _record(line, f"{self.path}, line {number}")
            self.records[record.key] = record
        if len(whole) < len(raw):
            os.truncate(self.path, len(whole))


def _record(line: bytes, where: str) -> Record:
    try:
        given = json.loads(line)
        lists = {name: tuple(given[name]) for name in ("ids", "runs", "rows", "times")}
        counts = {
            kind: {name: DraftCount(**count) for name, count in given.pop(kind, {}).items()}
            for kind in ("sources", "readouts")
        }
        return Record(**{**given, **lists, **counts})
    except (ValueError, TypeError, KeyError) as error:
        raise BenchError(f"{where} is not an answer of this bench; give another folder to --out") from error
