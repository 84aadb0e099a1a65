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
    typer.Option(
        "--prompts",
        "-p",
        help="File, folder or hub id of prompts; repeatable. See `selfdraft distill --help`.",
    ),
]
Column = Annotated[
    str | None, typer.Option(help="Column that holds the prompts. Default: prompt, else messages.")
]
Split = Annotated[str, typer.Option(help="Split of a data set on the hub.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Answer only the first N prompts.")]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", "-n", help="Maximum length of an answer in tokens.")
]
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", help="Temperature of the sampled answers.")
]
GreedyShare = Annotated[float, typer.Option(help="Share of the answers that are greedy instead of sampled.")]
Seed = Annotated[
    int, typer.Option(help="Random seed: chooses which answers are greedy and drives sampling of the rest.")
]
CutLoops = Annotated[
    bool, typer.Option("--cut-loops/--keep-loops", help="End an answer where it begins to repeat itself.")
]
Batch = Annotated[int, typer.Option(min=1, help="Answers generated at a time.")]
Shard = Annotated[int, typer.Option(min=1, help="Rows per file.")]
Raw = Annotated[
    bool, typer.Option("--raw", help="Take text prompts as they are, without the model's chat template.")
]
Numerics = Annotated[
    str,
    typer.Option(
        help="exact: identical rows whatever the batch and the method, but slower; fast: rounding may differ."
    ),
]


def distill(
    prompts: Prompts,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the answers. If it holds an unfinished run of this command, that run continues."
        ),
    ],
    model: flags.Model = "smollm2",
    column: Column = None,
    split: Split = "train",
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.8,
    greedy_share: GreedyShare = 0.5,
    seed: Seed = 0,
    cut_loops: CutLoops = True,
    raw: Raw = False,
    batch: Batch = 32,
    shard: Shard = 1000,
    method: flags.Method = "plain",
    option: flags.MethodOptions = None,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    numerics: Numerics = "fast",
    as_json: flags.Json = False,
) -> None:
    """Let the model answer prompts. Draft adapters are trained on its answers, to predict what it would
    write.

    Prompts are files of JSON lines or parquet, folders of them, or data sets on the Hugging Face hub
    (owner/name, or owner/name:subset). They have a column `prompt` (a text) or `messages` (a conversation),
    and optionally `references` (a list of texts that the answer may quote). JSON files need no further
    package; everything else needs `pip install 'selfdraft[train]'`. A text is asked through the model's chat
    template if it has one; `--raw` takes it as it is.

    Answers are written as JSON lines to shard-00000.jsonl and so on, with the keys index, prompt, answer,
    temperature, seed and finish_reason; prompt and answer are token ids. distill.json holds all settings that
    the answers depend on.

    You can stop the command at any time: finished answers are kept, and the same command continues.

    Examples:

      selfdraft distill --prompts prompts.jsonl --out answers

      selfdraft distill -p openai/gsm8k:main --column question --out answers --limit 2000 -n 160

      selfdraft distill -p chats.parquet --model ./my-model --out answers --method llma --batch 8
    """
    from ..llm import LLM
    from ..train.distill import Distillation, Recipe, asked
    from ..train.prompts import Prompts as Read
    from ..train.shards import Shards

    recipe = Recipe(max_new_tokens, temperature, greedy_share, seed, cut_loops, raw)
    rows = Read(prompts, column, split)
    llm = LLM(
        model,
        method,
        options=flags.pairs("--option", option),
        dtype=dtype,
        device=device,
        numerics=numerics,  # type: ignore[arg-type]
    )
    shards = Shards(out, asked(llm, rows, recipe), shard)
    try:
        summary = work(Distillation(llm, rows, recipe, shards, batch, limit))
    finally:
        shards.close()
    if as_json:
        print(json.dumps({**summary, "out": str(out)}))
    else:
        _show(summary, out)


def work(running: Distillation) -> dict[str, Any]:
    """Run the distillation with a progress bar, which is drawn between steps."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    console = Console(stderr=True)
    shards, quiet = running.shards, not console.is_terminal
    if shards.found:
        found = f"selfdraft: continuing in {shards.folder}, {shards.found} rows are there"
        console.print(found, soft_wrap=True)
    try:
        with _terminated(), Bar(*columns, console=console, auto_refresh=False, disable=quiet) as bar:
            there = sum(index in shards.done for index in running.wanted)
            task = bar.add_task("", total=len(running.wanted), completed=there)

            def report(progress: Progress) -> None:
                pace = f"{progress.tokens_per_second:,.0f} tokens/s"
                done = there + progress.rows + progress.too_long
                bar.update(task, completed=done, description=pace, refresh=True)

            return running.run(report)
    except (KeyboardInterrupt, SystemExit):
        said = f"selfdraft: {shards.kept} rows are kept in {shards.folder}; the same command continues"
        console.print(said, soft_wrap=True)
        raise


@contextmanager
def _terminated() -> Iterator[None]:
    """Let SIGTERM end the run like Ctrl-C, with its own exit code."""

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
        f"{summary['ended_by_itself']:.0%} ended by themselves, {summary['loops_cut']:,} cut for repetition"
        + (f", {summary['too_long']:,} prompts skipped as too long" if summary["too_long"] else "")
    )
    print(
        f"in this run {summary['new_rows']:,} rows, {summary['tokens_per_second']:,.0f} tokens/s, "
        f"{summary['tokens_per_forward']:.2f} tokens per forward"
    )
