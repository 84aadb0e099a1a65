"""Prompts to answer, read by `datasets`: files of JSON lines or parquet, folders, ids on the hub.

Whatever they come as, they become rows of three columns: `prompt`, a text, or `messages`, a conversation
for the chat template; and `references`, texts that the answer may quote. Several sources stand one
behind the other, so that the index of a row says which prompt it is. All rows are looked at before the
first is answered: a bad one must not end a run that has worked for hours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TrainingDataError
from .shards import library

COLUMNS = ("prompt", "messages", "references")
FORMATS = {".jsonl": "json", ".json": "json", ".gz": "json", ".zst": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Prompt:
    """Text or messages, and what the answer may quote."""

    text: str | None
    messages: Sequence[Mapping[str, str]] | None
    references: Sequence[str]


class Prompts:
    """The rows of all sources. sha256: of all they hold. conversation: the messages of the first row that
    has some. Raises TrainingDataError for what is not there or no prompt."""

    def __init__(self, sources: Sequence[str], column: str | None = None, split: str = "train") -> None:
        parts = [_uniform(_read(name, split), column, name) for name in sources]
        try:
            self._rows = library().concatenate_datasets(parts)
        except (ValueError, TypeError) as error:
            raise TrainingDataError(f"--prompts: these sources do not go together: {error}") from error
        self.conversation: Sequence[Mapping[str, str]] | None = None
        digest = hashlib.sha256()
        for number, row in enumerate(self._rows, start=1):
            _check(row, f"--prompts, row {number}")
            self.conversation = self.conversation or row.get("messages")
            digest.update(json.dumps([row.get(name) for name in COLUMNS]).encode() + b"\n")
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Prompt:
        row = self._rows[index]
        quoted = row.get("references") or []
        texts = [quoted] if isinstance(quoted, str) else quoted
        return Prompt(row.get("prompt"), row.get("messages"), texts)


def _read(name: str, split: str) -> Any:
    """The rows of a file, of a folder of files, of one by `save_to_disk`, or of `owner/name:subset`.
    Raises TrainingDataError."""
    datasets, path = library(), Path(name).expanduser()
    local = path.exists() or name.startswith((".", "/", "~")) or name.endswith(tuple(FORMATS))
    if local and not path.exists():
        raise TrainingDataError(f"--prompts {name}: no such file or folder")
    if path.is_file() and path.suffix not in FORMATS:
        raise TrainingDataError(f"--prompts {name}: give a file of {', '.join(FORMATS)}")
    try:
        if path.is_file():
            return datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
        if (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        home, _, subset = (str(path), "", "") if local else name.partition(":")
        return datasets.load_dataset(home, subset or None, split=split)
    except Exception as error:  # what is damaged or out of reach shows as errors of five libraries
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        raise TrainingDataError(f"--prompts {name} cannot be read: {reason}") from error


def _uniform(rows: Any, column: str | None, name: str) -> Any:
    """The rows with our columns alone. Raises TrainingDataError."""
    known = list(rows.column_names)
    given = column or next((one for one in COLUMNS[:2] if one in known), "prompt")
    if given not in known:
        raise TrainingDataError(
            f"--prompts {name}: no column {given!r}; name one of {', '.join(known) or 'none'} with --column"
        )
    if not len(rows):
        raise TrainingDataError(f"--prompts {name} holds no rows")
    kept = rows.select_columns([given, *({"references"} & {*known})])
    ours = (
        "prompt" if getattr(rows.features[given], "dtype", None) in ("string", "large_string") else "messages"
    )
    return kept if given == ours else kept.rename_column(given, ours)


def _check(row: Mapping[str, Any], where: str) -> None:
    """See that a row has a prompt or messages, and texts to quote if any. Raises TrainingDataError."""
    messages, quoted = row.get("messages"), row.get("references") or []
    if not row.get("prompt") and not messages:
        raise TrainingDataError(f"{where}: the prompt is empty; every row needs one")
    if messages is not None and not (isinstance(messages, list) and all(map(_is_message, messages))):
        raise TrainingDataError(
            f"{where}: give a text, or messages, each with role and content; got {messages!s:.80}"
        )
    if not isinstance(quoted, str) and not all(isinstance(text, str) for text in quoted):
        raise TrainingDataError(f"{where}: references are a list of texts; got {quoted!s:.80}")


def _is_message(one: object) -> bool:
    return isinstance(one, dict) and all(isinstance(one.get(name), str) for name in ("role", "content"))
