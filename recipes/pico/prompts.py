"""Prompts for pico's adapters, from what pico was trained on: `prompts.py --data DIR --out FILE`.

An adapter learns from pico's own answers (`selfdraft distill`); these are the prompts to answer, as
JSON lines with `prompt` and `form`, in the forms that pico is used with. An edit is asked for with
the old function, a function by its signature and docstring; files and pages are begun and break
off after a line; a pair's question stands alone, a dialogue stops after some of its turns.

Only documents of the training split are taken; one that is also held out is left out. Which, in
what order, and where they break off is decided by hashes of the seed and the text: a second run
gives the same file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from transformers import PreTrainedTokenizerFast

import tokenizer as tokens
from documents import FORMS, DataError, Row, documents, draw, paths, rows
from settings import HERE, Settings, load

console = Console()
PICO = HERE.parents[1] / "src" / "selfdraft" / "pico"
LONGEST = 1024  # tokens of a prompt; the context leaves room for as many more
HEAD = 4096  # characters looked at of a text that breaks off


@dataclass(frozen=True)
class Kind:
    """A form of prompts. share: percent of them. source: the settings' name for its documents.
    opening: what of a row is the prompt, or is to break off. tokens: where it does, from, to."""

    form: str
    share: int
    source: str
    opening: Callable[[Row], str]
    tokens: tuple[int, int] | None = None


def question(row: Row) -> str:
    return f"{row['prompt']}\n\n"


KINDS = (
    Kind("edit", 40, "edits", question),
    Kind("function", 25, "functions", lambda row: row["prompt"]),
    Kind("code", 25, "code", lambda row: row["text"][:HEAD], (64, 512)),
    Kind("english", 4, "english", lambda row: row["text"][:HEAD], (64, 256)),
    Kind("pair", 4, "pairs", question),
    Kind("dialogue", 2, "dialogues", lambda row: "\n".join(row["turns"]), (16, 256)),
)


def digest(text: str) -> bytes:
    return sha256(text.encode()).digest()


def openings(kind: Kind, settings: Settings, folder: Path) -> set[str]:
    """What the documents begin with that were trained on and nowhere held out."""
    source, split = settings.sources[kind.source], {True: set[bytes](), False: set[bytes]()}
    for document in documents(source, folder, settings.data):
        split[document.held_out].add(digest(document.text))
    trained, form, found = split[False] - split[True], FORMS[source.form], set()
    for _, path in paths(source, folder):
        for row in rows(path):
            text = form(row)
            if text and digest(text) in trained:
                found.add(kind.opening(row))
    return found


def broken_off(
    text: str, least: int, most: int, encoder: PreTrainedTokenizerFast, seed: str
) -> str | None:
    """The text up to a line break before a token drawn from `least` to `most`; None if that leaves
    less than the least."""
    ids = encoder(text, add_special_tokens=False)["input_ids"]
    end = least + int(draw(seed, "length", text) * (most + 1 - least))
    lines = str(encoder.decode(ids[:end])).rpartition("\n")[0]
    kept = len(encoder(lines, add_special_tokens=False)["input_ids"])
    return f"{lines}\n" if least <= kept and len(ids) > end else None


def prompts(
    kind: Kind, found: set[str], encoder: PreTrainedTokenizerFast, seed: str
) -> Iterator[str]:
    """Those that fit, in an order of chance."""
    for text in sorted(found, key=lambda text: draw(seed, "order", text)):
        prompt = broken_off(text, *kind.tokens, encoder, seed) if kind.tokens else text
        if prompt and len(encoder(prompt)["input_ids"]) <= LONGEST:
            yield prompt


def make(
    settings: Settings, data: Path, encoder: PreTrainedTokenizerFast, count: int, seed: int
) -> list[Row]:
    """All of them, the forms mixed. Raises DataError where a form has too few."""
    folder = data / "train" if (data / "train").is_dir() else data
    made: list[Row] = []
    for kind in KINDS:
        wanted = count * kind.share // 100
        found = openings(kind, settings, folder)
        taken = list(islice(prompts(kind, found, encoder, str(seed)), wanted))
        if len(taken) < wanted:
            raise DataError(f"only {len(taken)} prompts of form {kind.form!r}; lower --count")
        console.print(f"{kind.form}: {len(taken):,} of {len(found):,}")
        made += [{"prompt": prompt, "form": kind.form} for prompt in taken]
    return sorted(made, key=lambda row: draw(str(seed), "mix", row["prompt"]))


def main(
    data: Annotated[Path, typer.Option(help="Folder that holds the training sets.")],
    out: Annotated[Path, typer.Option(help="The file to write, JSON lines.")],
    count: Annotated[int, typer.Option(help="How many prompts, about.", min=1)] = 6000,
    seed: Annotated[int, typer.Option(help="Another one takes others.")] = 0,
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer.")] = PICO,
) -> None:
    """Write the prompts that pico answers for its adapters."""
    made = make(load(), data, tokens.read(tokenizer), count, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    console.print(f"{len(made):,} prompts in {out}")


if __name__ == "__main__":
    typer.run(main)
