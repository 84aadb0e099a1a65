"""`selfdraft distill`: answers by the model itself, to train draft adapters on."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import flags

if TYPE_CHECKING:
    from ..train.distill import Distillation, Progress


Prompts = Annotated[
    list[str],
    typer.Option("--prompts", "-p", help="File, folder or hub id, see `selfdraft distill`; repeatable."),
]
Column = Annotated[str | None, typer.Option(help="Column of the prompts. Default: prompt, or messages.")]
Split = Annotated[str, typer.Option(help="Split of a data set.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Answer the first prompts only.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens an answer.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", help="Of the answers drawn.")]
GreedyShare = Annotated[float, typer.Option(help="Share of answers that are greedy.")]
Seed = Annotated[int, typer.Option(help="Keys which are greedy, and the noise of the others.")]
CutLoops = Annotated[
    bool, typer.Option("--cut-loops/--keep-loops", help="End an answer where it begins to loop.")
]
Batch = Annotated[int, typer.Option(min=1, help="Answers under way at a time.")]
Shard = Annotated[int, typer.Option(min=1, help="Rows a file.")]
Numerics = Annotated[
    str,
    typer.Option(help="fast; exact: the same bits whatever the batch and the method, but slower."),
]


def distill(
    prompts: Prompts,
    out: Annotated[Path, typer.Option(help="Folder for the answers; one that holds this run is continued.")],
    model: flags.Model = "pico",
    column: Column = None,
    split: Split = "train",
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.8,
    greedy_share: GreedyShare = 0.5,
    seed: Seed = 0,
    cut_loops: CutLoops = True,
    batch: Batch = 32,
    shard: Shard = 1000,
    method: flags.Method = "plain",
    option: flags.MethodOptions = None,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    numerics: Numerics = "fast",
    as_json: flags.Json = False,
) -> None:
    """Let the model answer prompts, for draft adapters to learn from: they guess what this model says.

    Prompts are JSON lines or parquet files, folders of them, or ids on the Hugging Face hub (owner/name, or
    owner/name:subset), with a column `prompt` (text) or `messages` (a conversation, put into the chat
    template), and if a method may copy from something, `references` (a list of texts).

    Rows come as JSON lines, shard-00000.jsonl and so on: {"index", "prompt", "answer", "temperature",
    "seed", "finish_reason"}, prompt and answer as token ids. distill.json says what they depend on.

    Rows are kept as they come. Stop it at any time: the same command goes on where it stopped.

    Examples:

      selfdraft distill --prompts prompts.jsonl --out answers

      selfdraft distill -p openai/gsm8k:main --column question --out answers --limit 2000 -n 160

      selfdraft distill -p chats.parquet --model ./my-model --out answers --method llma --batch 8
    """
    from ..llm import load
    from ..train.distill import Distillation, Recipe, asked
    from ..train.prompts import Prompts as Read
    from ..train.shards import Shards

    recipe = Recipe(max_new_tokens, temperature, greedy_share, seed, cut_loops)
    rows = Read(prompts, column, split)
    generator = load(
        model,
        method,
        options=flags.pairs("--option", option),
        dtype=dtype,
        device=device,
        numerics=numerics,  # type: ignore[arg-type]
    )
    shards = Shards(out, asked(generator, rows, recipe), shard)
    try:
        summary = work(Distillation(generator, rows, recipe, shards, batch, limit))
    finally:
        shards.close()
    if as_json:
        print(json.dumps({**summary, "out": str(out)}))
    else:
        _show(summary, out)


def work(running: Distillation) -> dict[str, Any]:
    """The run, with a bar that is drawn between steps only."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    console = Console(stderr=True)
    shards, quiet = running.shards, not console.is_terminal
    if shards.found:
        said = f"selfdraft: going on in {shards.folder}, {shards.found} rows are there"
        console.print(said, soft_wrap=True)
    try:
        with _terminated(), Bar(*columns, console=console, auto_refresh=False, disable=quiet) as bar:
            there = sum(index in shards.done for index in running.wanted)
            task = bar.add_task("", total=len(running.wanted), completed=there)

            def tell(progress: Progress) -> None:
                pace = f"{progress.tokens_per_second:,.0f} tokens/s"
                done = there + progress.rows + progress.too_long
                bar.update(task, completed=done, description=pace, refresh=True)

            return running.run(tell)
    except (KeyboardInterrupt, SystemExit):
        said = f"selfdraft: {shards.kept} rows are kept in {shards.folder}; the same command goes on"
        console.print(said, soft_wrap=True)
        raise


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does, with its own exit code."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show(summary: dict[str, Any], out: Path) -> None:
    print(
        f"{summary['rows']:,} rows, {summary['tokens']:,} tokens in {out}; "
        f"{summary['ended_by_itself']:.0%} ended by themselves, {summary['loops_cut']:,} cut where they loop"
        + (f", {summary['too_long']:,} prompts left out as too long" if summary["too_long"] else "")
    )
    print(
        f"this time {summary['new_rows']:,} rows, {summary['tokens_per_second']:,.0f} tokens/s, "
        f"{summary['tokens_per_forward']:.2f} tokens per forward"
    )
