"""`selfdraft train speed`: a looped model, which drafts by reading itself out early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from . import flags
from .train import Steps, need_trainer, watched

HELP = """A looped model: few layers, run through several times, read out after every pass (arXiv 2310.12072).

Its layers are made from those of an ordinary model, whose distribution they then learn again (a looped model
is trained on, on the text); so its text is its own, and drafting is lossless to it. The loss sums those after
every pass, through one head. The published training is `--scratch --teacher none --exit-share 1`. With
`--loops 1` it makes an ordinary model of another depth.

Stop it at any time: the same command goes on from the last checkpoint. It prints the held-out loss after
every pass (nats per token), and how often the pick after it is that of the full depth (agreement).

Examples:

  selfdraft train speed --data texts.jsonl --out my-looped --unique 3 --loops 4

  selfdraft generate "def mean(" --model my-looped --method speed

  selfdraft verify --model my-looped --method speed
"""


def speed(
    data: Annotated[
        Path,
        typer.Option(help="A `datasets` folder with windows (input_ids), or .jsonl, .parquet or .txt text."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the model; one that holds this run is continued.")],
    model: flags.Model = "smollm2",
    unique: Annotated[
        int | None, typer.Option(help="Layers of a pass. Default: 2, or those of a looped model.")
    ] = None,
    loops: Annotated[int | None, typer.Option(help="Passes. Default: 6, or those of a looped model.")] = None,
    scratch: Annotated[
        bool, typer.Option("--scratch", help="Fresh weights of the model's widths, and its tokenizer.")
    ] = False,
    share_rule: Annotated[
        str, typer.Option(help="How layers are made: step, evenly spaced ones; average, means.")
    ] = "step",
    intermediate: Annotated[
        int | None, typer.Option(help="Width of the MLPs, the weightiest neurons. Default: all of them.")
    ] = None,
    early: Annotated[
        str,
        typer.Option(
            help="What early passes learn: same, what the last one learns; last, that one's own distribution."
        ),
    ] = "same",
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Whose distribution is learned instead of the tokens that came; none: no one's. "
            "Default: the ordinary model whose layers are taken."
        ),
    ] = None,
    exit_share: Annotated[
        float, typer.Option(help="Share of the positions at which early passes are read.")
    ] = 0.25,
    steps: Steps = 1000,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a window that is cut from text.")] = 512,
    column: Annotated[str, typer.Option(help="Where the text is.")] = "text",
    rate: Annotated[float, typer.Option(help="Learning rate of the matrices in layers (Muon).")] = 4e-3,
    outer_rate: Annotated[
        float, typer.Option(help="Learning rate of embeddings, head and norms (AdamW).")
    ] = 2e-3,
    warmup: Annotated[int, typer.Option(help="Steps in which the rates rise.")] = 20,
    every: Annotated[int, typer.Option(help="Steps between evaluations, each with a checkpoint.")] = 200,
    seed: Annotated[int, typer.Option(help="Of fresh weights, the order and the positions.")] = 0,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the loss with torch.")] = False,
    device: flags.Device = None,
    as_json: flags.Json = False,
) -> None:
    from .._common import options

    need_trainer()
    from ..train.looped import LoopedPlan, loop
    from ..train.memory import keep_memory

    times = {"steps": steps, "batch": batch, "rate": rate, "outer_rate": outer_rate, "warmup": warmup}
    given = {"model": model, "data": data, "out": out, "unique": unique, "loops": loops, "scratch": scratch}
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
    plan = options.read(LoopedPlan, given | how | cut | schedule, "train speed")
    keep_memory()
    about = watched(lambda report: loop(plan, report), out)
    if as_json:
        print(json.dumps({**about, "out": str(out)}))
        return
    found = about["exits"]
    print(
        f"{out}: trained in {about['seconds'] / 60:.0f} minutes; held-out loss by pass "
        f"{', '.join(f'{loss:.3f}' for loss in found['loss'])}; picks that are the last pass's "
        f"{', '.join(f'{share:.2f}' for share in found['agreement'])}"
    )
