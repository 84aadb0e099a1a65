"""From rows of the data sets to documents: one text each, with its licence and its split.

The forms are the prompts that pico is asked with later: a file is continued, a function's body
follows its signature and docstring, an edit answers "Edit this function: ..." with the new code.
Two forms are made here: "rename" is a function, and the same function with one name replaced,
inside the edit form; "repeat" says a few words again and again. They have no other content than
copying, which a drafter needs first and a small model does not soon find by itself in edits.
Everything is decided by hashes of the row, so a second run gives the same documents.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import keyword
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from settings import Data, RecipeError, Source

Row = dict[str, Any]
NAME = re.compile(r"\b[A-Za-z_][A-Za-z0-9_]{2,}\b")
WORD = re.compile(r"\s*\S+")
REPEAT_WORDS = 200
RENAME_BYTES = 1600  # longer functions would not fit a window twice


class DataError(RecipeError):
    """The data folder lacks a set or holds a row of an unknown form."""


@dataclass(frozen=True)
class Document:
    text: str
    licence: str
    home: str  # the repository or set it comes from
    held_out: bool


def draw(*parts: str) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def pair(row: Row) -> str:
    return f"{row['prompt']}\n\n{row['response']}"


def rename(row: Row) -> str | None:
    """The row's function and its copy under a changed name, or None where nothing can change."""
    old = (row["prompt"] + row["response"]).rstrip()
    counts = Counter(name for name in NAME.findall(old) if not keyword.iskeyword(name))
    names = sorted(name for name, count in counts.items() if count > 1 and name != "self")
    if len(old.encode()) > RENAME_BYTES or not names:
        return None
    chance = random.Random(hashlib.sha256(old.encode()).hexdigest())
    name = chance.choice(names)
    new = invent(name, chance)
    text = re.sub(rf"\b{name}\b", new, old)
    ask = chance.choice(["rename {} to {}", "Rename {} to {}", "rename `{}` to `{}`"])
    return (
        f"Edit this function: {ask.format(name, new)}\n\n"
        f"```python\n{old}\n```\n\n```python\n{text}\n```"
    )


def invent(name: str, chance: random.Random) -> str:
    """A new name near the old one: a part added, dropped or shortened."""
    parts = name.split("_")
    ways = [
        f"{chance.choice(['new', 'my', 'old', 'base', 'raw', 'next'])}_{name}",
        f"{name}_value",
        f"{name}_{chance.choice('abcxyz')}",
        f"_{name}",
        "".join(p.title() for p in parts),
    ]
    if len(parts) > 1 and parts[0]:
        ways += ["_".join(parts[1:]) or name + "_", "_".join(parts[::-1])]
    new = chance.choice([way for way in ways if way.isidentifier() and not keyword.iskeyword(way)])
    return new if new != name else f"{name}_2"


def repeat(row: Row) -> str:
    """A few words of the row's function again and again; half of the time in a random order, so
    that nothing but looking back can tell the next one."""
    chance = random.Random(hashlib.sha256(row["response"].encode()).hexdigest())
    words = WORD.findall(row["prompt"] + row["response"])
    if chance.random() < 0.5:
        chance.shuffle(words)
    size = min(len(words), chance.choice([4, 8, 16, 32, 64]))
    start = chance.randrange(len(words) - size + 1)
    return "\n".join(["".join(words[start : start + size]).strip()] * (REPEAT_WORDS // size))


FORMS: dict[str, Callable[[Row], str | None]] = {
    "file": lambda row: row["text"],
    "function": lambda row: row["prompt"] + row["response"],
    "pair": pair,
    "rename": rename,
    "repeat": repeat,
    "dialogue": lambda row: "\n".join(row["turns"]),
}


def rows(path: Path) -> Iterator[Row]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def paths(source: Source, folder: Path) -> Iterator[tuple[str, Path]]:
    """Each set of the source as (name, file), in a fixed order."""
    for pattern in source.files:
        found = sorted(folder.glob(f"{pattern}.jsonl.gz"))
        if not found:
            raise DataError(f"no file {pattern}.jsonl.gz in {folder}; give --data its folder")
        for path in found:
            yield str(path.relative_to(folder)).removesuffix(".jsonl.gz"), path


def documents(source: Source, folder: Path, data: Data) -> Iterator[Document]:
    """The source's documents with the overlaps dropped and the caps kept."""
    drop, used = re.compile(data.drop, re.IGNORECASE), Counter[str]()
    for name, path in paths(source, folder):
        for row in rows(path):
            text = FORMS[source.form](row)
            if not text or drop.search(text):
                continue
            home = row.get("repo") or row.get("source") or name
            size = len(text.encode())
            keys = [key for key in (name, f"{name}:{home}") if key in data.caps_mb]
            if any(used[key] + size > data.caps_mb[key] * 1e6 for key in keys):
                continue
            used.update(dict.fromkeys(keys, size))
            place = (home, row["path"]) if "path" in row else (home, row.get("prompt", text))
            yield Document(text, row["licence"], home, draw(*place) < data.held_out)
