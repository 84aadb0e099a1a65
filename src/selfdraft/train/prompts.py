"""Prompts to answer, from JSON lines, parquet files, folders and data sets of the Hugging Face hub.

Every source becomes rows of `prompt` (a text) or `messages` (a conversation for the chat template), and of
`references` (texts that the answer may quote). Sources follow one another, so the index of a row identifies
its prompt. JSON files are read by the standard library; the package `datasets` reads everything else. All
rows are checked before the first one is answered, because an invalid row must not end a run after hours of
work.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..errors import TrainingDataError
from .shards import library

COLUMNS = ("prompt", "messages", "references")
JSON = (".jsonl", ".json", ".gz")
FORMATS = {".zst": "json", ".parquet": "parquet"}  # what `datasets` reads, and as what
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """One prompt: a text or a conversation, never both."""

    text: str | None
    messages: Sequence[Mapping[str, str]] | None
    # Texts that the answer may quote.
    references: Sequence[str]
    # An answer by somebody else, from which a tuned model may learn; see `tuning.TunedPlan.labels`.
    answer: str | None = None


class Prompts:
    """The prompts of all sources, in order. Raises TrainingDataError for a source or a row that is not
    usable.
    """

    def __init__(self, sources: Sequence[str], column: str | None = None, split: str = "train") -> None:
        self._parts = [_source(name, split, column) for name in sources]
        self._ends = [*accumulate(len(rows) for rows, _ in self._parts)]
        # The messages of the first row that has some.
        self.conversation: Sequence[Mapping[str, str]] | None = None
        digest = hashlib.sha256()
        for index in range(len(self)):
            row = self._row(index)
            _check(row, f"--prompts, row {index + 1}")
            self.conversation = self.conversation or row["messages"]
            line = json.dumps([row[name] for name in COLUMNS], sort_keys=True)
            digest.update(line.encode() + b"\n")
        # SHA-256 of all prompts.
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Prompt:
        row = self._row(index)
        quoted = row["references"] or []
        references = [quoted] if isinstance(quoted, str) else quoted
        return Prompt(row["prompt"], row["messages"], references, row["answer"])

    def _row(self, index: int) -> dict[str, Any]:
        """A row in our columns."""
        part = bisect(self._ends, index)
        rows, column = self._parts[part]
        row = rows[index - (self._ends[part - 1] if part else 0)]
        given = row.get(column)
        text = given if isinstance(given, str) else None
        return {
            "prompt": text,
            "messages": given if text is None else None,
            "references": row.get("references"),
            "answer": row.get("answer"),
        }


def _source(name: str, split: str, column: str | None) -> tuple[Rows, str]:
    """The rows of a source, and the column that holds its prompts. Raises TrainingDataError."""
    rows = _read(name, split)
    if not len(rows):
        raise TrainingDataError(f"--prompts {name} holds no rows")
    names = getattr(rows, "column_names", None) or {name: None for row in rows for name in row}
    known = list(names)
    given = column or next((one for one in COLUMNS[:2] if one in known), "prompt")
    if given not in known:
        raise TrainingDataError(
            f"--prompts {name}: no column {given!r}; name one of {', '.join(known) or 'none'} with --column"
        )
    return rows, given


def _read(name: str, split: str) -> Rows:
    """The rows of a file, a folder of files, a folder by `save_to_disk`, or `owner/name:subset` on the hub.

    Raises TrainingDataError.
    """
    path = Path(name).expanduser()
    files = (*JSON, *FORMATS)
    local = path.exists() or name.startswith((".", "/", "~")) or name.endswith(files)
    if local and not path.exists():
        raise TrainingDataError(f"--prompts {name}: no such file or folder")
    if path.is_file() and path.suffix not in files:
        raise TrainingDataError(f"--prompts {name}: give a file of {', '.join(files)}")
    if path.is_file() and path.suffix in JSON:
        return _json(path, name)
    datasets = library()
    try:
        if path.is_file():
            found = datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
        elif (path / "state.json").is_file():
            found = datasets.load_from_disk(str(path))
        else:
            home, _, subset = (str(path), "", "") if local else name.partition(":")
            found = datasets.load_dataset(home, subset or None, split=split)
    except Exception as error:  # a damaged or unreachable source raises errors of five libraries
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        raise TrainingDataError(f"--prompts {name} cannot be read: {reason}") from error
    rows: Rows = found
    return rows


def _json(path: Path, name: str) -> Rows:
    """The objects of a file of JSON lines, or of one JSON array. Raises TrainingDataError."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TrainingDataError(f"--prompts {name} cannot be read: {error}") from error
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise TrainingDataError(f"--prompts {name} is not a JSON array: {error}") from error
        numbered = list(enumerate(rows, start=1))
    else:
        lines = enumerate(text.split("\n"), start=1)
        numbered = [(number, _object(line, name, number)) for number, line in lines if line.strip()]
    for number, row in numbered:
        if not isinstance(row, dict):
            raise TrainingDataError(f"--prompts {name}, entry {number}: not a JSON object, got {row!s:.60}")
    return [row for _, row in numbered]


def _object(line: str, name: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise TrainingDataError(f"--prompts {name} cannot be read: line {number}: {error}") from error


def _check(row: Mapping[str, Any], where: str) -> None:
    """Check a row: a prompt or messages, and references that are texts. Raises TrainingDataError."""
    messages, quoted = row["messages"], row["references"] or []
    if not row["prompt"] and not messages:
        raise TrainingDataError(f"{where}: the prompt is empty; every row needs one")
    if messages is not None and not (isinstance(messages, list) and all(map(_is_message, messages))):
        raise TrainingDataError(
            f"{where}: give a text, or messages, each with role and content; got {messages!s:.80}"
        )
    if not isinstance(quoted, str) and not (
        isinstance(quoted, list) and all(isinstance(text, str) for text in quoted)
    ):
        raise TrainingDataError(f"{where}: references are a list of texts; got {quoted!s:.80}")


def _is_message(one: object) -> bool:
    return isinstance(one, dict) and all(isinstance(one.get(name), str) for name in ("role", "content"))
