"""The evaluation sets: rows of repositories that are held out, and of public benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import numpy as np

from documents import Row, rows
from settings import RecipeError

T = TypeVar("T")


class EvaluationError(RecipeError):
    """The data folder lacks an evaluation set, or holds a row that cannot be used."""


def read(data: Path, name: str) -> list[Row]:
    """A set by its path without ending, as "py_edits" or "mbpp/mbpp". Raises EvaluationError."""
    folder = data / "eval" if (data / "eval").is_dir() else data
    for path in (folder / f"{name}.jsonl.gz", folder / f"{name}.jsonl"):
        if path.is_file():
            return list(rows(path))
    raise EvaluationError(f"no {name}.jsonl.gz in {folder}; give --data the folder above eval/")


def spaced(items: list[T], count: int) -> list[T]:
    """At most `count` items, evenly spaced."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]
