"""`selfdraft train`: adapters with which a model drafts for itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from ..errors import TrainingDataError
from . import flags

if TYPE_CHECKING:
    from ..train.run import Plan

app = typer.Typer(
    no_args_is_help=True,
    help="Train an adapter with which a model drafts for itself; the model stays as it is.",
)


class AdapterDefaults(NamedTuple):
    """What differs between the methods."""

    masks: int
    prefix: int
    rank: int


Data = Annotated[Path, typer.Option(help="Folder of answers by the model, written by `selfdraft distill`.")]
Out = Annotated[Path, typer.Option(help="Folder for the adapter; one that holds this run is continued.")]
Masks = Annotated[int, typer.Option(min=1, help="Mask tokens: how far ahead drafts reach.")]
Shared = Annotated[
    bool, typer.Option("--shared-mask", help="One embedding for all mask tokens, not one for each.")
]
Prefix = Annotated[int, typer.Option(min=0, help="Slots of the soft prefix in every layer; 0 is none.")]
Rank = Annotated[int, typer.Option(min=0, help="Rank of the LoRA that is gated to mask rows; 0 is none.")]
Target = Annotated[
    list[str] | None,
    typer.Option("--target", help="Linear layer with LoRA, as q_proj; repeatable. Default: all."),
]
Sampler = Annotated[
    int,
    typer.Option(
        "--sampler-head", min=0, help="Width of the layers that bring the token just picked in; 0 is none."
    ),
]
Kind = Annotated[
    str, typer.Option("--loss", help="distill: from the model's distribution; tokens: as published.")
]
Decay = Annotated[float, typer.Option(help="Weight of each mask's loss, in that of the one before.")]
Steps = Annotated[int, typer.Option(min=1, help="Steps of the optimizer.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences a step.")]
Length = Annotated[int, typer.Option(min=8, help="Tokens of a sequence, at most.")]
Anchors = Annotated[int, typer.Option(min=1, help="Groups of masks a sequence.")]
Rate = Annotated[float, typer.Option(help="Learning rate of mask embeddings and prefix.")]
LoraRate = Annotated[float, typer.Option(help="Learning rate of LoRA.")]
Every = Annotated[int, typer.Option(min=1, help="Steps between evaluations, each with a checkpoint.")]
Seed = Annotated[int, typer.Option(help="Of the first weights, the order and the anchors.")]


STOPS = """
Stop it at any time: the same command goes on from the last checkpoint. It prints how often the guess of each
mask is the model's pick (right_1, ...), and the tokens per forward of a chain of such guesses.
"""

BITA = f"""Mask tokens and a soft prefix that they alone see (arXiv 2401.12522).

Some hundredths of a percent of a model's parameters. `--sampler-head 0 --loss tokens --decay 1
--rate 0.03` is the published training.
{STOPS}
Examples:

  selfdraft distill --prompts prompts.jsonl --out answers

  selfdraft train bita --data answers --out my-bita

  selfdraft generate "def mean(" --method bita --adapter my-bita
"""

SPACE = f"""Mask tokens and a LoRA gated to their rows: SPACE (arXiv 2402.11809), the model as it is.

Some percent of a model's parameters, which guess better than a prefix alone. The published method tunes all
weights and with them the text; this one does not.
{STOPS}
Examples:

  selfdraft distill --prompts prompts.jsonl --out answers

  selfdraft train space --data answers --out my-space --rank 32 --target q_proj --target down_proj

  selfdraft verify --method space --adapter my-space
"""


def _command(method: str, config: AdapterDefaults) -> Callable[..., None]:
    """The command that trains adapters of a method. One list of options, with the method's own defaults."""

    def train(
        data: Data,
        out: Out,
        model: flags.Model = "pico",
        masks: Masks = config.masks,
        shared_mask: Shared = False,
        prefix: Prefix = config.prefix,
        rank: Rank = config.rank,
        target: Target = None,
        sampler: Sampler = 256,
        loss: Kind = "distill",
        decay: Decay = 0.9,
        steps: Steps = 2000,
        batch: Batch = 4,
        length: Length = 512,
        anchors: Anchors = 64,
        rate: Rate = 1e-2,
        lora_rate: LoraRate = 5e-3,
        every: Every = 200,
        seed: Seed = 0,
        dtype: flags.Dtype = None,
        device: flags.Device = None,
        as_json: flags.Json = False,
    ) -> None:
        from .. import options
        from ..models.adapter import AdapterConfig

        _need_trainer()
        from ..train.run import Plan
        from ..train.student import Loss
        from ..train.trainer import Schedule

        what = f"train {method}"
        shape = {
            "masks": masks,
            "distinct": not shared_mask,
            "prefix": prefix,
            "rank": rank,
            "sampler": sampler,
        }
        times = {"steps": steps, "batch": batch, "length": length, "anchors": anchors, "every": every}
        plan = Plan(
            method,
            model,
            data,
            out,
            options.read(AdapterConfig, shape | {"targets": tuple(target or ())}, what),
            options.read(Loss, {"kind": loss, "decay": decay}, what),
            options.read(Schedule, times | {"rate": rate, "lora_rate": lora_rate, "seed": seed}, what),
            dtype,
            device,
        )
        _run(plan, as_json)

    return train


app.command("bita", help=BITA)(_command("bita", AdapterDefaults(masks=3, prefix=16, rank=0)))
app.command("space", help=SPACE)(_command("space", AdapterDefaults(masks=4, prefix=0, rank=16)))


def _need_trainer() -> None:
    """See that what training needs is installed. Raises TrainingDataError."""
    missing = [name for name in ("accelerate", "datasets", "matplotlib") if find_spec(name) is None]
    if missing:
        raise TrainingDataError(f"this needs the package {missing[0]}: pip install 'selfdraft[train]'")


def _run(plan: Plan, as_json: bool) -> None:
    from rich.console import Console

    from ..train.run import run

    console = Console(stderr=True)
    try:
        about = run(plan, lambda line: console.print(f"selfdraft: {line}", highlight=False))
    except KeyboardInterrupt:
        console.print(f"selfdraft: stopped; the same command goes on from the last checkpoint in {plan.out}")
        raise
    if as_json:
        print(json.dumps({**about, "out": str(plan.out)}))
    else:
        first = ", ".join(f"{row[0]:.2f}" for row in about["accuracy"])
        print(f"{plan.out}: first guesses right {first}, by mask; {about['seconds'] / 60:.0f} minutes")
