"""`selfdraft train speed`: a looped model, which drafts with its early passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from . import flags
from .train import Steps, need_trainer, watched

HELP = """Train a looped model: a few layers that are used several times, read out after every pass (SPEED).

The layers are made from those of an ordinary model and learn its distribution again; an existing looped
model is trained further. The result has a text of its own, and drafting does not change that text. The
loss is the sum over all passes (arXiv 2310.12072). The published training is `--scratch --teacher none
--exit-share 1`. With `--loops 1` the result is an ordinary model of another depth.

The first and last layers of the model may stay as they are and run once: `--prelude 1 --coda 1`. Every
readout, early ones too, goes through the coda. With `--lora-rank 8` each pass adds a small matrix of its own
to every shared one (arXiv 2410.20672).

You can stop it at any time: the same command continues from the last checkpoint. The log has the held-out
loss after every pass (nats per token), and how often its pick is that of the full depth (agreement).

Examples:

  selfdraft train speed --data texts.jsonl --out my-looped --unique 3 --loops 4

  selfdraft train speed --data texts.jsonl --out my-looped --prelude 1 --unique 2 --loops 4 --coda 1

  selfdraft generate "def mean(" --model my-looped --method speed

  selfdraft verify --model my-looped --method speed
"""


def speed(
    data: Annotated[
        Path,
        typer.Option(help="A `datasets` folder with windows (input_ids), or .jsonl, .parquet or .txt text."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the model. If it holds an unfinished run of this command, that run continues."
        ),
    ],
    model: flags.Model = "smollm2",
    unique: Annotated[
        int | None,
        typer.Option(help="Layers with weights of their own. Default: 2, or those of a looped model."),
    ] = None,
    loops: Annotated[
        int | None, typer.Option(help="Passes through these layers. Default: 6, or those of a looped model.")
    ] = None,
    prelude: Annotated[
        int | None,
        typer.Option(
            help="Layers that run once, before the looped ones: the first of the model. "
            "Default: none, or those of a looped model."
        ),
    ] = None,
    coda: Annotated[
        int | None, typer.Option(help="Layers that run once, after the looped ones: the last of the model.")
    ] = None,
    lora_rank: Annotated[
        int | None,
        typer.Option(
            help="Rank of a LoRA for each pass, on all matrices of the looped layers. "
            "Default: no LoRA, or as a looped model has it."
        ),
    ] = None,
    scratch: Annotated[
        bool,
        typer.Option("--scratch", help="Start from random weights with the model's widths and tokenizer."),
    ] = False,
    share_rule: Annotated[
        str, typer.Option(help="How layers are made: step takes evenly spaced layers, average takes means.")
    ] = "step",
    intermediate: Annotated[
        int | None,
        typer.Option(help="Width of the MLPs: keep the neurons with the largest weights. Default: all."),
    ] = None,
    early: Annotated[
        str,
        typer.Option(
            help="Target of early passes: same as the last pass, or the last pass's own distribution (last)."
        ),
    ] = "same",
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Teacher to distill from; none: train on the reference tokens. "
            "Default: the ordinary model whose layers are used."
        ),
    ] = None,
    exit_share: Annotated[
        float, typer.Option(help="Share of the positions at which early passes have a loss.")
    ] = 0.25,
    steps: Steps = 1000,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of the windows that text is cut into.")] = 512,
    column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    rate: Annotated[float, typer.Option(help="Learning rate of the matrices in layers (Muon).")] = 4e-3,
    outer_rate: Annotated[
        float, typer.Option(help="Learning rate of embeddings, head and norms (AdamW).")
    ] = 2e-3,
    warmup: Annotated[int, typer.Option(help="Steps in which the learning rates rise.")] = 20,
    every: Annotated[int, typer.Option(help="Steps between evaluations, each with a checkpoint.")] = 200,
    seed: Annotated[int, typer.Option(help="Random seed of new weights and of all draws.")] = 0,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the loss with torch.compile.")] = False,
    device: flags.Device = None,
    as_json: flags.Json = False,
) -> None:
    from .._common import options

    need_trainer()
    from ..train.looped import LoopedPlan, loop
    from ..train.memory import keep_memory

    times = {"steps": steps, "batch": batch, "rate": rate, "outer_rate": outer_rate, "warmup": warmup}
    given = {"model": model, "data": data, "out": out, "scratch": scratch}
    shape = {"unique": unique, "loops": loops, "prelude": prelude, "coda": coda, "lora_rank": lora_rank}
    how = {
        "share_rule": share_rule,
        "intermediate": intermediate,
        "early": early,
        "exit_share": exit_share,
        "compile": compiled,
        "teacher": teacher,
    }
    cut = {"column": column, "length": length, "device": device}
    schedule = {"schedule": times | {"every": every, "seed": seed}}
    plan = options.read(LoopedPlan, given | shape | how | cut | schedule, "train speed")
    keep_memory()
    about = watched(lambda report: loop(plan, report), out)
    if as_json:
        print(json.dumps({**about, "out": str(out)}))
        return
    found = about["exits"]
    print(
        f"{out}: trained in {about['seconds'] / 60:.0f} minutes; held-out loss by pass "
        f"{', '.join(f'{loss:.3f}' for loss in found['loss'])}; agreement with the last pass "
        f"{', '.join(f'{share:.2f}' for share in found['agreement'])}"
    )
