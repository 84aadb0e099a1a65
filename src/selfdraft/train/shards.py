"""Answers on disk: shards of JSON lines, one row per line, written as answers finish and read by trainers.

A folder holds one run, described by `distill.json`: `asked` has all settings that the rows depend on,
`starts` the command, versions and commit of each start, and `summary` the figures of a finished run. A folder
of another run is refused, with the settings that differ. A truncated last line (the machine stopped) is
dropped, and a failed write (the disk is full) removes what it has written of its line.

Trainers read finished and unfinished folders, but no damaged ones: every line must have all columns, and
every id must be in the vocabulary. Rows are in the order of the prompts.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .._common.run_folder import changes, lock, write_all
from ..errors import TrainingDataError

MANIFEST = "distill.json"
COLUMNS = ["prompt", "answer", "temperature"]  # what trainers need
DEGENERATE = "degenerate"  # the finish reason of a row that keeps no states


@dataclass(frozen=True)
class Row:
    """One answer."""

    # Which prompt it answers.
    index: int
    # Token ids.
    prompt: Sequence[int]
    answer: Sequence[int]
    temperature: float
    seed: int
    # That of the request; "loop" if the answer was cut because it repeats itself.
    finish_reason: str
    # Of each block the Jacobi states before the final text, if they were recorded; see `trajectories`.
    states: Sequence[Sequence[Sequence[int]]] | None = None


@dataclass(frozen=True)
class Distilled:
    """The contents of a folder."""

    # What `distill.json` holds.
    manifest: Mapping[str, Any]
    # A `datasets.Dataset` with the columns index (of the prompt), prompt, answer, temperature, and states if
    # they were recorded.
    rows: Any


class Shards:
    """The rows of one run while they are written. size: rows per shard."""

    def __init__(self, folder: Path, asked: Mapping[str, Any], size: int) -> None:
        self.folder = folder
        self.size = size
        self.done: set[int] = set()
        self.tokens = 0
        self.reasons: Counter[str] = Counter()
        self._number, self._filled = 0, 0  # the shard being written, and its rows
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder)
            try:
                self.manifest = self._claim(json.loads(json.dumps(asked)))
                self._resume()
            except BaseException:  # a folder that is refused must not stay locked
                self.close()
                raise
        except OSError as error:
            raise TrainingDataError(f"--out {folder} cannot be used: {error.strerror or error}") from error
        self.found = len(self.done)

    def add(self, row: Row) -> None:
        """Write a row. Raises TrainingDataError if that fails; earlier rows are kept."""
        if self._filled >= self.size:
            self._number, self._filled = self._number + 1, 0
        path = self.folder / f"shard-{self._number:05d}.jsonl"
        size = path.stat().st_size if path.exists() else 0
        given = {name: value for name, value in asdict(row).items() if value is not None}
        line = json.dumps(given, separators=(",", ":")).encode() + b"\n"
        try:
            with path.open("ab", buffering=0) as file:
                write_all(file, line)
        except OSError as error:
            if path.exists():
                os.truncate(path, size)
            raise self._lost(path, error) from error
        self._count(row)

    @property
    def kept(self) -> int:
        """Rows on the disk, including one that was written but not counted when the run stopped."""
        return sum(path.read_bytes().count(b"\n") for path in shards(self.folder))

    def note(self, **entries: object) -> None:
        """Add entries to the manifest, atomically. Raises TrainingDataError."""
        self.manifest |= entries
        path = self.folder / MANIFEST
        part = path.with_suffix(".part")
        try:
            with part.open("wb", buffering=0) as file:
                write_all(file, json.dumps(self.manifest, indent=1).encode() + b"\n")
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise self._lost(path, error) from error

    def close(self) -> None:
        """Release the lock on the folder."""
        os.close(self._lock)

    def _claim(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The manifest of the folder. Raises TrainingDataError if it belongs to another run."""
        if not (self.folder / MANIFEST).exists():
            if any(shards(self.folder)):
                raise TrainingDataError(
                    f"--out {self.folder} holds shards without {MANIFEST}; give another folder"
                )
            return {"asked": asked, "starts": [], "summary": None}
        held = manifest(self.folder)
        changed = list(changes(held["asked"], asked))
        if changed:
            raise TrainingDataError(
                f"--out {self.folder} holds another run ({'; '.join(changed)}); give another folder"
            )
        return held

    def _resume(self) -> None:
        """Count the rows that exist; drop a truncated last line."""
        asked = self.manifest["asked"]
        paths = shards(self.folder)
        for path in paths[-1:]:
            raw = path.read_bytes()
            os.truncate(path, raw.rfind(b"\n") + 1)
            self._number = int(path.stem.removeprefix("shard-"))
        for path in paths:
            self._filled = 0
            for row in _rows(path, asked["vocabulary"], asked.get("block")):
                self._count(row)

    def _count(self, row: Row) -> None:
        self.done.add(row.index)
        self.tokens += len(row.answer)
        self.reasons[row.finish_reason] += 1
        self._filled += 1

    def _lost(self, path: Path, error: OSError) -> TrainingDataError:
        return TrainingDataError(
            f"{path}: {error.strerror or error}; the {len(self.done)} finished rows are kept, and the same "
            "command continues from there once there is room"
        )


def read(folder: Path) -> Distilled:
    """The rows of a folder. Raises TrainingDataError for a damaged one."""
    datasets = library()
    held = manifest(folder)
    paths = shards(folder)
    if not paths:
        raise TrainingDataError(f"{folder} has no shards yet; run the command of its {MANIFEST} again")
    vocabulary, block = held["asked"]["vocabulary"], held["asked"].get("block")
    wanted = COLUMNS if block is None else [*COLUMNS, "states"]
    parts = []
    for path in paths:
        rows = list(_rows(path, vocabulary, block))
        if not rows:
            raise TrainingDataError(f"{path} is empty; run the command of {MANIFEST} again, or delete it")
        columns = {name: [getattr(row, name) for row in rows] for name in ("index", *wanted)}
        parts.append(datasets.Dataset.from_dict(columns, features=_features(wanted)))
    joined = datasets.concatenate_datasets(parts)
    index = joined["index"][:]
    twice = next((one for one, count in Counter(index).items() if count > 1), None)
    if twice is not None:
        raise TrainingDataError(f"{folder} holds two rows of index {twice}; keep one, or distill again")
    order = sorted(range(len(index)), key=index.__getitem__)
    return Distilled(held, joined.select(order).select_columns(["index", *wanted]))


def check_model(
    held: Mapping[str, Any], fingerprints: Sequence[str], vocabulary: int, tokenizer: str
) -> None:
    """Check that data are the answers of a model with one of these fingerprints, in the ids of its tokenizer.

    tokenizer: the hash of the model's tokenizer. Raises TrainingDataError.
    """
    asked = held["asked"]
    if asked["vocabulary"] != vocabulary:
        raise TrainingDataError(
            f"the data are ids of the tokenizer of {asked['model']}, with a vocabulary of "
            f"{asked['vocabulary']}; the model's has {vocabulary}: distill from the model itself"
        )
    if asked["fingerprint"] not in fingerprints:
        raise TrainingDataError(
            f"the data are answers of {asked['model']} with the fingerprint {asked['fingerprint'][:12]}; the "
            f"model's is {fingerprints[0][:12]}: distill from the model itself, or if they are a tuned "
            "model's own, give the adapter that tuned it (--start)"
        )
    if asked.get("tokenizer", tokenizer) != tokenizer:
        raise TrainingDataError(
            f"the data are ids of another tokenizer than the model's, which has {tokenizer[:12]}, not "
            f"{asked['tokenizer'][:12]}: distill from the model itself"
        )


def manifest(folder: Path) -> dict[str, Any]:
    """The contents of `distill.json`. Raises TrainingDataError if they are missing or invalid."""
    path = folder / MANIFEST
    try:
        held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingDataError(
            f"{path}: {error.strerror or error}; give a folder that `selfdraft distill` wrote"
        ) from error
    except ValueError as error:
        raise TrainingDataError(f"{path} is not JSON ({error}); give another folder") from error
    asked = held.get("asked") if isinstance(held, dict) else None
    if not isinstance(asked, dict) or not {"model", "fingerprint", "vocabulary", "eos"} <= set(asked):
        raise TrainingDataError(f"{path} does not say which model answered; give another folder")
    return held


def shards(folder: Path) -> list[Path]:
    """The files of rows, in order."""
    return sorted(folder.glob("shard-*.jsonl"))


def library() -> Any:
    """The package `datasets`. Raises TrainingDataError if it is not installed."""
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise TrainingDataError("this needs the package datasets: pip install 'selfdraft[train]'") from error
    return datasets


def _features(columns: Sequence[str]) -> Any:
    datasets = library()
    ids, value = datasets.List(datasets.Value("int32")), datasets.Value
    kinds = {"prompt": ids, "answer": ids, "temperature": value("float32")}
    kinds["states"] = datasets.List(datasets.List(ids))
    return datasets.Features({"index": value("int64"), **{name: kinds[name] for name in columns}})


def _rows(path: Path, vocabulary: int, block: int | None) -> Iterator[Row]:
    """The rows of a shard. block: tokens of a block of recorded trajectories, if the rows need them.

    Raises TrainingDataError, with the number of the damaged line.
    """
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line:
            continue
        where = f"{path}, line {number}"
        try:
            given = json.loads(line)
        except ValueError as error:
            raise TrainingDataError(f"{where}: not JSON ({error}); the file is damaged") from error
        row = _row(given, where, vocabulary)
        if block is not None and row.states is None and row.finish_reason != DEGENERATE:
            raise TrainingDataError(f"{where}: no column 'states'; `selfdraft trajectories` writes it")
        if block is not None and row.states is not None:
            _check_states(row, where, vocabulary, block)
        yield row


def _check_states(row: Row, where: str, vocabulary: int, block: int) -> None:
    """Check that each block of the answer has states of its own length. Raises TrainingDataError."""
    answer, found = row.answer, row.states
    sizes = [min(block, len(answer) - start) for start in range(0, len(answer), block)]
    try:
        assert found is not None
        right = [[len(state) for state in states] for states in found]
        ids = {token for states in found for state in states for token in state}
        fit = all(isinstance(states, list) for states in found)  # an empty text has no wrong length
        fit = fit and len(right) == len(sizes)
        fit = fit and all(set(r) <= {n} for r, n in zip(right, sizes, strict=True))
        fit = fit and all(type(token) is int and 0 <= token < vocabulary for token in ids)
    except TypeError:
        fit = False
    if not fit:
        raise TrainingDataError(
            f"{where}: 'states' must be those of {len(sizes)} blocks of {block} token ids, the last one cut "
            "where the answer ends; the file is damaged"
        )


def _row(given: object, where: str, vocabulary: int) -> Row:
    names = [field.name for field in fields(Row) if field.name != "states"]
    missing = [name for name in names if not isinstance(given, dict) or name not in given]
    if missing or not isinstance(given, dict):
        raise TrainingDataError(f"{where}: no column {missing[0]!r}; `selfdraft distill` writes {names}")
    for name in ("prompt", "answer"):
        ids = given[name]
        if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
            raise TrainingDataError(f"{where}: {name!r} must be token ids; got {ids!s:.60}")
        strange = [token for token in (min(ids), max(ids)) if not 0 <= token < vocabulary]
        if strange:
            raise TrainingDataError(
                f"{where}: {name!r} holds {strange[0]}, outside the vocabulary of {vocabulary}"
            )
    for name, kind in (("index", int), ("temperature", int | float)):
        if not isinstance(given[name], kind):
            raise TrainingDataError(f"{where}: {name!r} must be a number; got {given[name]!s:.60}")
    return Row(**{name: given[name] for name in names}, states=given.get("states"))


def _lock(folder: Path) -> int:
    """Lock the folder until this process ends or closes the descriptor. Raises TrainingDataError."""
    try:
        return lock(folder)
    except BlockingIOError as error:
        raise TrainingDataError(f"--out {folder}: another process is writing there; wait for it") from error
