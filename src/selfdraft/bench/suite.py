"""Suites: which prompts, how they are made from rows, and where the rows are published.

A suite is one TOML file under `suites/`, found by its name, and holds the fields of `Suite`. Its data is
never shipped. The user's own JSON lines are a suite too (`own`): rows of `prompt` or `turns`, with `id`,
`reference` or `references` where there are any.

Each item has its turns in two forms: as raw text to continue (`turns`), and as messages of a user to a chat
model (`chat`). Which one is asked is decided by the model and `--raw`, see `measure`.
"""

from __future__ import annotations

import re
import string
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from .._common.options import read
from ..errors import InvalidSuite

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """Text out of a field of a row."""

    field: str
    match: str = ""
    """A regular expression whose first group is kept. Empty: the whole field."""
    optional: bool = False
    """Rows may lack the field."""


@dataclass(frozen=True)
class Range:
    """Rows that belong to the suite: those whose field lies between the two numbers, both included."""

    field: str
    least: int
    most: int


@dataclass(frozen=True)
class Home:
    """Where a set is published: a dataset on the Hugging Face hub, or files that `datasets` reads as JSON."""

    dataset: str = ""
    config: str | None = None
    split: str = "train"
    files: str = ""
    prompt: str = ""
    """The template for rows of this form, where it differs from the suite's."""

    @property
    def name(self) -> str:
        return self.files or self.dataset


@dataclass(frozen=True)
class Suite:
    """A set of prompts. Templates are filled with a row's fields; a list is joined by line ends."""

    name: str
    about: str
    licence: str
    files: tuple[str, ...]
    """Paths in the data folder."""
    id: str = ""
    """Template of an item's id. Without one the id is the row's `id`, else its number."""
    prompt: str = ""
    """Template of the raw prompt."""
    chat: str = ""
    """Template of the message to a chat model. Without one the message is the raw prompt."""
    turns: str = ""
    """Field with the turns of a dialogue, used where a row has it."""
    after: str = ""
    """Text that ends each raw turn: a blank line for sets that ask for something, nothing for code."""
    references: tuple[Part, ...] = ()
    """Texts that the answer may quote."""
    group: Part | None = None
    """The part of the set that a row belongs to."""
    groups: dict[str, str] = field(default_factory=dict)
    """New names of groups."""
    lines: int = 0
    """Keep the first half of the prompt's lines, at most so many. 0 keeps all."""
    range: Range | None = None
    max_new_tokens: int = 256
    """Length of answers unless the command line gives one."""
    home: tuple[Home, ...] = ()


@dataclass(frozen=True)
class Item:
    """One prompt, or the user's turns of one dialogue."""

    id: str
    turns: tuple[str, ...]
    """Raw text, to be continued."""
    chat: tuple[str, ...]
    """The same turns as messages of a user."""
    references: tuple[str, ...] = ()
    """Texts that the answers may quote."""
    group: str = ""


def available() -> list[str]:
    """Names of the suites, sorted."""
    return sorted(Path(str(entry)).stem for entry in (files(__package__) / "suites").iterdir())


def named(name: str) -> Suite:
    """The suite of that name. Raises InvalidSuite."""
    if name not in available():
        raise InvalidSuite(
            f"no suite {name!r}; there are {', '.join(available())}; JSON lines of your own go with --file"
        )
    text = (files(__package__) / "suites" / f"{name}.toml").read_text(encoding="utf-8")
    return read(Suite, {"name": name, **tomllib.loads(text)}, f"suite {name!r}")


def own(path: Path) -> Suite:
    """The user's JSON lines as a suite; prompts are used unchanged."""
    return Suite(
        name=path.name.split(".")[0] or path.name,
        about="JSON lines of the user's own",
        licence="the user's",
        files=(str(path),),
        prompt="{prompt}",
        turns="turns",
        references=(Part("reference", optional=True), Part("references", optional=True)),
    )


def items(suite: Suite, rows: Iterable[tuple[str, Row]], prompt: str = "") -> list[Item]:
    """The suite's items. Each row comes with its place, such as "data, line 7". Raises InvalidSuite."""
    made = [
        _item(suite, row, where, prompt or suite.prompt) for where, row in rows if _belongs(suite, row, where)
    ]
    return _distinct(made)


def _item(suite: Suite, row: Row, where: str, prompt: str) -> Item:
    number = where.rpartition(" ")[2]
    group = "".join(_texts(suite.group, row, where)) if suite.group else ""
    turns = _turns(suite, row, where, prompt)
    return Item(
        id=_fill(suite.id, row, where) or str(row.get("id", number)),
        turns=tuple(turn + suite.after for turn in turns),
        chat=(_chat(suite, row, where, turns[0]),) if suite.chat else tuple(turns),
        references=tuple(text for part in suite.references for text in _texts(part, row, where)),
        group=suite.groups.get(group, group),
    )


def _turns(suite: Suite, row: Row, where: str, prompt: str) -> Sequence[str]:
    if suite.turns and (suite.turns in row or not prompt):
        turns = _texts(Part(suite.turns), row, where)
    else:
        turns = [_head(_fill(prompt, row, where), suite.lines)]
    if not turns or not all(turns):
        raise InvalidSuite(f"{where}: the prompt is empty; every row needs a prompt")
    return turns


def _chat(suite: Suite, row: Row, where: str, prompt: str) -> str:
    """The message to a chat model: {prompt} in its template is the raw prompt, other names are fields."""
    return _fill(suite.chat, {**row, "prompt": prompt}, where)


def _head(text: str, most: int) -> str:
    """The first half of the lines, at most `most`; 0 keeps the text."""
    lines = text.splitlines(keepends=True)
    return "".join(lines[: max(1, min(most, len(lines) // 2))]) if most else text


def _texts(part: Part, row: Row, where: str) -> list[str]:
    """The texts of a field: one, or those of a list."""
    if part.optional and row.get(part.field) is None:
        return []
    value = _value(part.field, row, where)
    texts = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidSuite(
            f"{where}: field {part.field!r} must be text or a list of texts; got {value!r:.80}"
        )
    return [_matched(part, text, where) for text in texts]


def _matched(part: Part, text: str, where: str) -> str:
    if not part.match:
        return text
    found = re.search(part.match, text)
    if found is None:
        raise InvalidSuite(f"{where}: field {part.field!r} does not hold {part.match!r}")
    return found[1]


def _value(name: str, row: Row, where: str) -> Any:
    if row.get(name) is None:
        raise InvalidSuite(f"{where}: no field {name!r}; the row has {', '.join(row) or 'none'}")
    return row[name]


class _Template(string.Formatter):
    """`str.format` over a row. A missing field is an error that names the row's place."""

    def __init__(self, where: str) -> None:
        self.where = where

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        value = _value(str(key), kwargs, self.where)
        if isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
            return "\n".join(value)
        if not isinstance(value, str | int | float):
            raise InvalidSuite(f"{self.where}: field {key!r} must be text; got {value!r:.80}")
        return value


def _fill(template: str, row: Row, where: str) -> str:
    return _Template(where).vformat(template, (), row)


def _belongs(suite: Suite, row: Row, where: str) -> bool:
    if suite.range is None:
        return True
    return bool(suite.range.least <= _value(suite.range.field, row, where) <= suite.range.most)


def _distinct(made: Sequence[Item]) -> list[Item]:
    """The items with unique ids: a repeated id gets a number."""
    seen: dict[str, int] = {}
    out = []
    for item in made:
        seen[item.id] = seen.get(item.id, 0) + 1
        label = item.id if seen[item.id] == 1 else f"{item.id}#{seen[item.id]}"
        out.append(replace(item, id=label))
    return out
