"""`selfdraft trajectories`: answers by Jacobi decoding with their states, for consistency training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InvalidOption
from . import flags
from .distill import (
    Batch,
    Column,
    CutLoops,
    GreedyShare,
    Limit,
    MaxNewTokens,
    Numerics,
    Prompts,
    Seed,
    Shard,
    Split,
    Temperature,
    work,
)


def trajectories(
    prompts: Prompts,
    out: Annotated[Path, typer.Option(help="Folder for the rows; one that holds this run is continued.")],
    model: flags.Model = "pico",
    adapter: Annotated[
        str | None, typer.Option(help="Adapter that tunes the model, to record its own trajectories.")
    ] = None,
    block: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 16,
    augment: Annotated[
        bool, typer.Option("--augment", help="Put some wrong tokens of the states right, as published.")
    ] = False,
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
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    numerics: Numerics = "fast",
    as_json: flags.Json = False,
) -> None:
    """Record how Jacobi decoding comes to the model's answers, for `selfdraft train cllm` (arXiv 2403.00835).

    Rows are those of `selfdraft distill`, with a column `states`: of each block of the answer the states that
    it went through, a list of token ids each, from the first one, which is drawn from the text so far. A
    trajectory ends where the text does. Answers that loop are cut there; one that is the same token again and
    again, or loops within its first block, keeps no states and is counted as degenerate.

    Each answer takes about as many passes as it has tokens, of up to a block of rows each. Rows are kept as
    they come. Stop it at any time: the same command goes on where it stopped.

    Examples:

      selfdraft trajectories --prompts prompts.jsonl --out paths

      selfdraft trajectories -p openai/gsm8k:main --column question --out paths --block 32 -n 160 --limit 2000
    """
    from ..llm import load
    from ..train.distill import Recipe, asked
    from ..train.prompts import Prompts as Read
    from ..train.shards import Shards
    from ..train.trajectories import Recorded, Recording

    recipe = Recipe(max_new_tokens, temperature, greedy_share, seed, cut_loops)
    rows = Read(prompts, column, split)
    method = Recorded(block)
    generator = load(
        model,
        method,
        adapter=adapter,
        dtype=dtype,
        device=device,
        numerics=numerics,  # type: ignore[arg-type]
    )
    if block >= generator.model.context:
        raise InvalidOption(
            f"--block {block}: the model's context is {generator.model.context} tokens; give less, such as 16"
        )
    about = {"block": block, "augment": augment}
    shards = Shards(out, {**asked(generator, rows, recipe), **about}, shard)
    try:
        summary = work(Recording(generator, rows, recipe, shards, batch, limit, augment))
    finally:
        shards.close()
    if as_json:
        print(json.dumps({**summary, "out": str(out)}))
        return
    print(
        f"{summary['rows']:,} rows, {summary['tokens']:,} tokens in {out}; {summary['loops_cut']:,} cut "
        f"where they loop, {summary['degenerate']:,} degenerate"
        + (f", {summary['too_long']:,} prompts left out as too long" if summary["too_long"] else "")
    )
    print(
        f"this time {summary['new_rows']:,} rows, {summary['tokens_per_second']:,.0f} tokens/s, "
        f"{summary['tokens_per_forward']:.2f} tokens per pass"
    )
