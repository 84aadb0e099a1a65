"""Windows of text of equal length, to train a whole model on. Some are held out.

The data are either a `datasets` folder with a column input_ids, whose rows are the windows, or documents
(such a folder, or a .jsonl, .parquet or .txt file, with a column of text). Documents are tokenized and
joined, with an end of text after each, and cut into windows. The split "held_out" of a folder is for
evaluation; without one, a share of the windows is held out, evenly spread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import TrainingDataError

IDS = "input_ids"
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
HELD_OUT = 0.01  # share of the windows that is held out, if there is no such split
MIN_WINDOWS, MAX_HELD_OUT = 4, 256
BATCH = 1000  # documents tokenized at a time


@dataclass(frozen=True)
class Windows:
    """Training and held-out windows."""

    # `datasets` with a column input_ids.
    train: Any
    held_out: Any
    # Token ids of each window.
    length: int

    @property
    def sha256(self) -> str:
        """SHA-256 of all ids and of the split."""
        digest = hashlib.sha256()
        for rows in (self.train, self.held_out):
            digest.update(f"{len(rows)} x {self.length} ".encode())
            for part in rows.with_format("numpy").iter(BATCH):
                digest.update(np.stack(part[IDS]).astype(np.uint32).tobytes())
        return digest.hexdigest()


def read(
    path: Path, tokenizer: PreTrainedTokenizerBase, length: int, column: str, context: int, vocabulary: int
) -> Windows:
    """Read windows, or cut documents into windows of `length` ids. Raises TrainingDataError.

    column: of the documents' text. context, vocabulary: of the model, which the windows must fit.
    """
    found = _opened(path)
    rows = found.get("train") if isinstance(found, datasets.DatasetDict) else found
    if rows is None:
        raise TrainingDataError(f"{path} has no split 'train'; it has {', '.join(found)}")
    held = found.get("held_out") if isinstance(found, datasets.DatasetDict) else None
    if IDS not in rows.column_names:
        _check_length(length, path, context)
    cut = [_windows(path, part, tokenizer, length, column) for part in (rows, held) if part is not None]
    if len(cut) < 2:
        cut = _split(cut[0], path)
    for part in cut:
        _check(part, path, context, vocabulary)
    train, held_out = cut
    size = len(train[0][IDS])
    if len(held_out[0][IDS]) != size:
        raise TrainingDataError(f"{path}: held-out windows are not of {size} tokens, as the others are")
    return Windows(train, held_out.select(spread(len(held_out), MAX_HELD_OUT)), size)


def spread(rows: int, count: int) -> list[int]:
    """At most `count` indices of `rows`, evenly spread."""
    return [i * rows // count for i in range(count)] if count < rows else list(range(rows))


def _opened(path: Path) -> Any:
    if not path.exists():
        raise TrainingDataError(f"there is no {path}; give a `datasets` folder, or a file of documents")
    try:
        if path.is_dir():
            return datasets.load_from_disk(str(path))
        if path.suffix not in READERS:
            raise TrainingDataError(
                f"{path}: documents are read from {', '.join(READERS)}, or from a `datasets` folder"
            )
        whole = {"sample_by": "document"} if path.suffix == ".txt" else {}
        return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train", **whole)
    except TrainingDataError:
        raise
    except Exception as error:  # a damaged file raises errors of several libraries
        reason = " ".join(str(error).split())[:300]
        raise TrainingDataError(f"{path} cannot be read as data to train on ({reason})") from error


def _windows(path: Path, rows: Any, tokenizer: PreTrainedTokenizerBase, length: int, column: str) -> Any:
    if IDS in rows.column_names:
        return rows.select_columns([IDS])
    if column not in rows.column_names:
        raise TrainingDataError(
            f"{path} has no column {IDS!r} and no column {column!r} of text; it has "
            f"{', '.join(rows.column_names)}; name one with --column"
        )
    stream = np.fromiter(_stream(rows, tokenizer, column, path), dtype=np.uint32)
    count = len(stream) // length
    kept = datasets.Features({IDS: datasets.List(datasets.Value("uint32"))})
    return datasets.Dataset.from_dict(
        {IDS: list(stream[: count * length].reshape(count, length))}, features=kept
    )


def _stream(rows: Any, tokenizer: PreTrainedTokenizerBase, column: str, path: Path) -> Iterator[int]:
    end = tokenizer.eos_token_id
    if end is None:
        raise TrainingDataError(f"{path}: the model's tokenizer has no end of text to put between documents")
    for part in rows.iter(BATCH):
        texts = [text for text in part[column] if text]
        if not all(isinstance(text, str) for text in texts):
            raise TrainingDataError(f"{path}: column {column!r} does not hold text")
        for ids in _encoded(tokenizer, texts):
            yield from ids
            yield end


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterable[list[int]]:
    return tokenizer(texts, verbose=False)["input_ids"] if texts else []


def _split(rows: Any, path: Path) -> list[Any]:
    """Training windows and held-out windows, which are evenly spread."""
    if len(rows) < 2 * MIN_WINDOWS:
        raise TrainingDataError(
            f"{path} gives {len(rows)} windows; {2 * MIN_WINDOWS} are needed: give more text"
        )
    count = min(MAX_HELD_OUT, max(MIN_WINDOWS, round(HELD_OUT * len(rows))))
    held = spread(len(rows), count)
    kept = set(range(len(rows))) - set(held)
    return [rows.select(sorted(kept)), rows.select(held)]


def _check(rows: Any, path: Path, context: int, vocabulary: int) -> None:
    """Check that the windows have one length and fit the model."""
    if not len(rows):
        raise TrainingDataError(f"{path} has a split without windows")
    lengths, most = set(), 0
    for part in rows.with_format("numpy").iter(BATCH):
        for ids in part[IDS]:
            if not np.issubdtype(np.asarray(ids).dtype, np.integer) or ids.min(initial=0) < 0:
                raise TrainingDataError(f"{path}: column {IDS!r} does not hold ids of tokens")
            lengths.add(len(ids))
            most = max(most, int(ids.max(initial=0)))
    if len(lengths) > 1 or min(lengths) < 2:
        raise TrainingDataError(
            f"{path}: windows are of one length, 2 at least; found {min(lengths)} to {max(lengths)} tokens"
        )
    _check_length(min(lengths), path, context)
    if most >= vocabulary:
        raise TrainingDataError(
            f"{path} holds id {most}, and the model has {vocabulary}: another tokenizer's ids"
        )


def _check_length(length: int, path: Path, context: int) -> None:
    if length > context:
        raise TrainingDataError(
            f"{path}: windows of {length} tokens do not fit the model's context of {context}"
        )
