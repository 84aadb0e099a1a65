"""Windows of the recipe's tokens as a `datasets` folder, for `selfdraft train speed`.

The windows follow the recipe's mixture with the weights of its last stage (`stream.py`), from a
position in its stream on; by default from where pico stands, so that the same order does not begin
again. The order depends on the length: at another one than the stage's the windows are cut and
dealt anew, and some of their tokens have been seen. Held-out windows are of documents that no run
trains on, spread evenly through their source, in turns of one window of each source.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from datasets import Dataset, DatasetDict, Features, List, Value

from bits import spread
from settings import HERE, WORK, RecipeError, Settings, load
from stream import Ids, Mixture, open_shards

HELD = ("code", "edits", "functions")
PROGRESS = HERE.parents[1] / "src" / "selfdraft" / "pico" / "progress.json"


class WindowsError(RecipeError):
    """There is no such stage, or no room for a window."""


def train_windows(
    settings: Settings, shards: Path, tokens: int, length: int, start: int, stage: str | None
) -> list[Ids]:
    """Windows of `length` tokens from position `start` of the stage's stream, `tokens` in all."""
    stages = {found.name: found for found in settings.stages}
    name = settings.stages[-1].name if stage is None else stage
    if name not in stages:
        raise WindowsError(f"no stage {name!r} in the settings; there are {', '.join(stages)}")
    if min(length, tokens // max(1, length)) < 1:
        raise WindowsError(f"{tokens} tokens in windows of {length} are no window; give more")
    chosen = replace(stages[name], until_tokens=0, length=length)
    mixture = Mixture(open_shards(shards), settings, [chosen])
    first = start // length
    return [mixture.window(0, row) for row in range(first, first + tokens // length)]


def held_windows(shards: Path, length: int, count: int) -> list[Ids]:
    """`count` windows of each source of HELD that the shards have, or as many as there are."""
    opened = open_shards(shards, "held")
    found = [spread(opened[name], length, count) for name in HELD if name in opened]
    most = max(map(len, found))
    return [windows[i] for i in range(most) for windows in found if i < len(windows)]


def dataset(windows: list[Ids]) -> Dataset:
    kept = Features({"input_ids": List(Value("uint16"))})  # as the shards: 8,192 entries
    rows = [window.astype(np.uint16) for window in windows]
    return Dataset.from_dict({"input_ids": rows}, features=kept)


def position() -> int:
    """Tokens that the embedded pico has seen."""
    return int(json.loads(PROGRESS.read_text())["tokens"]) if PROGRESS.is_file() else 0


def main(
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    work: Annotated[Path, typer.Option(help="Work folder of the recipe.")] = WORK,
    shards: Annotated[Path | None, typer.Option(help="Shards; default WORK/shards.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = 6_000_000,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    held: Annotated[int, typer.Option(help="Held-out windows of each source.")] = 48,
    start: Annotated[
        int | None, typer.Option(help="Position in the stream; default: pico's.")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Whose weights; default: the last's.")] = None,
    settings: Annotated[Path, typer.Option(help="Another settings file.")] = HERE / "settings.toml",
) -> None:
    """Write windows to train on, and held-out ones."""
    folder = shards or work / "shards"
    begin = position() if start is None else start
    trained = train_windows(load(settings), folder, tokens, length, begin, stage)
    judged = held_windows(folder, length, held)
    DatasetDict({"train": dataset(trained), "held_out": dataset(judged)}).save_to_disk(out)
    print(f"{len(trained):,} windows of {length} tokens and {len(judged)} held out are in {out}")


if __name__ == "__main__":
    typer.run(main)
