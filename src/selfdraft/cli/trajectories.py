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
    Raw,
    Seed,
    Shard,
    Split,
    Temperature,
    work,
)


def trajectories(
    prompts: Prompts,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the answers. If it holds an unfinished run of this command, that run continues."
        ),
    ],
    model: flags.Model = "smollm2",
    adapter: Annotated[
        str | None,
        typer.Option(help="Adapter that tunes the model: record the trajectories of the tuned model."),
    ] = None,
    block: Annotated[int, typer.Option(min=2, help="Tokens in a block.")] = 16,
    augment: Annotated[
        bool,
        typer.Option("--augment", help="Correct some wrong tokens of the recorded states, as published."),
    ] = False,
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
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    numerics: Numerics = "fast",
    as_json: flags.Json = False,
) -> None:
    """Record how Jacobi decoding converges to the model's answers. `selfdraft train cllm` learns from this.

    The output is that of `selfdraft distill`, with one more key, `states`: for each block of an answer the
    lists of token ids that it went through. The first state of a block is drawn from the text so far. Answers
    that repeat themselves are cut where they begin to; an answer that is one token repeated, or repeats
    itself within its first block, has no states and is counted as degenerate.

    An answer takes about as many forward passes as it has tokens. You can stop the command at any time:
    finished answers are kept, and the same command continues. The paper is arXiv 2403.00835.

    Examples:

      selfdraft trajectories --prompts prompts.jsonl --out paths

      selfdraft trajectories -p openai/gsm8k:main --column question --out paths --block 32 -n 160 --limit 2000
    """
    from ..llm import LLM
    from ..train.distill import Recipe, asked
    from ..train.prompts import Prompts as Read
    from ..train.shards import Shards
    from ..train.trajectories import Recorded, Recording

    recipe = Recipe(max_new_tokens, temperature, greedy_share, seed, cut_loops, raw)
    rows = Read(prompts, column, split)
    method = Recorded(block)
    llm = LLM(
        model,
        method,
        adapter=adapter,
        dtype=dtype,
        device=device,
        numerics=numerics,  # type: ignore[arg-type]
    )
    if block >= llm.model.context:
        raise InvalidOption(
            f"--block {block}: the model's context is {llm.model.context} tokens; "
            "give a smaller block, such as 16"
        )
    about = {"block": block, "augment": augment}
    shards = Shards(out, {**asked(llm, rows, recipe), **about}, shard)
    try:
        summary = work(Recording(llm, rows, recipe, shards, batch, limit, augment))
    finally:
        shards.close()
    if as_json:
        print(json.dumps({**summary, "out": str(out)}))
        return
    print(
        f"{summary['rows']:,} rows, {summary['tokens']:,} tokens in {out}; {summary['loops_cut']:,} cut "
        f"for repetition, {summary['degenerate']:,} degenerate"
        + (f", {summary['too_long']:,} prompts skipped as too long" if summary["too_long"] else "")
    )
    print(
        f"in this run {summary['new_rows']:,} rows, {summary['tokens_per_second']:,.0f} tokens/s, "
        f"{summary['tokens_per_forward']:.2f} tokens per pass"
    )
