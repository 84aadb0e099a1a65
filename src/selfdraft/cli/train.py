"""`selfdraft train`: adapters with which a model drafts for itself, and looped models."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..errors import InvalidOption, TrainingDataError
from . import flags

if TYPE_CHECKING:
    from ..train.run import Plan
    from ..train.tuning import TunedPlan

app = typer.Typer(
    no_args_is_help=True,
    help="Train a model to draft for itself. bita and space do not change its text; cllm and space-tuned "
    "change the weights and measure what that costs; speed makes a looped model.",
)


class AdapterDefaults(NamedTuple):
    """Defaults that differ between methods."""

    masks: int
    prefix: int
    rank: int


Data = Annotated[Path, typer.Option(help="Folder of the model's answers, written by `selfdraft distill`.")]
Out = Annotated[
    Path,
    typer.Option(
        help="Folder for the result. If it holds an unfinished run of this command, that run continues."
    ),
]
Masks = Annotated[int, typer.Option(min=1, help="Number of mask tokens, which limits the length of a draft.")]
Shared = Annotated[
    bool, typer.Option("--shared-mask", help="Use one embedding for all mask tokens instead of one each.")
]
Prefix = Annotated[int, typer.Option(min=0, help="Length of the soft prefix in every layer; 0: no prefix.")]
Rank = Annotated[
    int, typer.Option(min=0, help="Rank of the LoRA that works on mask tokens alone; 0: no LoRA.")
]
Target = Annotated[
    list[str] | None,
    typer.Option("--target", help="Linear layer to add LoRA to, such as q_proj; repeatable. Default: all."),
]
Sampler = Annotated[
    int,
    typer.Option(
        "--sampler-head",
        min=0,
        help="Width of the sampler head, which conditions a mask on the token before it; 0: none.",
    ),
]
MaskVocabulary = Annotated[
    int,
    typer.Option(
        "--mask-vocabulary",
        min=0,
        help="How many ids masks may predict, the most frequent of the data: fewer take less time to read; "
        "0: all.",
    ),
]
Kind = Annotated[
    str,
    typer.Option(
        "--loss", help="distill: learn the model's distribution; tokens: learn the next token, as published."
    ),
]
Dropout = Annotated[
    float, typer.Option("--prefix-dropout", help="Share of the prefix that is left out at random.")
]
Decay = Annotated[float, typer.Option(help="Weight of each mask's loss relative to the one before.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences per step.")]
Length = Annotated[int, typer.Option(min=8, help="Maximum length of a sequence in tokens.")]
Anchors = Annotated[int, typer.Option(min=1, help="Groups of masks per sequence.")]
Rate = Annotated[float, typer.Option(help="Learning rate of mask embeddings and prefix.")]
LoraRate = Annotated[float, typer.Option(help="Learning rate of LoRA.")]
Every = Annotated[int, typer.Option(min=1, help="Steps between evaluations, each with a checkpoint.")]
Seed = Annotated[int, typer.Option(help="Random seed of the initial weights and of all draws.")]


Full = Annotated[
    bool, typer.Option("--full", help="Train all weights instead of LoRA; the result is a model folder.")
]
Draft = Annotated[
    str,
    typer.Option(help="distill: masks learn the tuned model's own distribution; tokens: the next token."),
]
Keep = Annotated[
    str,
    typer.Option(
        help="base: keep the base model's distribution on the text; tokens: learn the next token, "
        "as published."
    ),
]
KeepWeight = Annotated[
    float, typer.Option(help="Weight of --keep in the loss; a higher weight lowers the tuning cost.")
]
Smoothing = Annotated[float, typer.Option(help="Label smoothing of --keep tokens.")]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        "--labels",
        help="The file of prompts that the data answer, with texts of somebody else in a column `answer`: "
        "what --keep tokens learns instead of the model's own answers; repeatable.",
    ),
]
Joint = Annotated[
    bool,
    typer.Option(
        "--joint-mean", help="One mean over the text's tokens and masks, as published, instead of one each."
    ),
]
TUNED_RATE = "Learning rate of LoRA or of all weights. Default: 2e-3, with --full 2e-5."
TunedRate = Annotated[float | None, typer.Option("--rate", help=TUNED_RATE)]
TunedRank = Annotated[int | None, typer.Option(min=1, help="Rank of the LoRA. Default: 32.")]
Share = Annotated[float, typer.Option("--data-share", help="Share of the answers to train on.")]
Start = Annotated[
    str | None,
    typer.Option(help="Adapter of the same kind to train further, of this model or an earlier state of it."),
]


STOPS = """
You can stop it at any time: the same command continues from the last checkpoint. The log has the accuracy of
each mask (right_1, ...: how often its first candidate is the model's pick) and the tokens per forward of a
chain of such candidates.
"""

LEARNS = """
You can stop it at any time: the same command continues from the last checkpoint. The log has the accuracy of
draft positions (right_1, ...: how often the first candidate is the model's pick), the tokens per forward of a
chain of such candidates, and the loss of --keep (kept, in nats).
"""

BITA = f"""Train mask tokens and a soft prefix that only they see: BiTA (arXiv 2401.12522).

The adapter has some hundredths of a percent of the model's parameters, and more with a sampler head. The
published training is `--sampler-head 0 --mask-vocabulary 0 --loss tokens --decay 1 --rate 0.03
--prefix-dropout 0.1`, on greedy answers (`distill --greedy-share 1`). The card says in what a training
differs from it.
{STOPS}
Examples:

  selfdraft distill --prompts prompts.jsonl --out answers

  selfdraft train bita --data answers --out my-bita

  selfdraft generate "def mean(" --method bita --adapter my-bita
"""

SPACE = f"""Train mask tokens and a LoRA that works on them alone: SPACE (arXiv 2402.11809), no tuning.

The adapter has some percent of the model's parameters and is more accurate than a prefix alone. The published
method also tunes the weights, which changes the text; this one does not (see `space-tuned`).
{STOPS}
Examples:

  selfdraft distill --prompts prompts.jsonl --out answers

  selfdraft train space --data answers --out my-space --rank 32 --target q_proj --target down_proj

  selfdraft verify --method space --adapter my-space
"""


CLLM = f"""Train the model to map any state of a Jacobi trajectory to its final text: CLLM (arXiv 2403.00835).

This changes the weights and thereby the text: drafting is lossless to the tuned weights only. The tuning
cost is measured at the end. Decode with `--method jacobi --adapter`. `--window 8 --noise progressive`
trains on several blocks in a row with increasing noise (Jacobi Forcing). The published training is
`--full --unknown random --copies 1 --on-policy 0 --decay 1 --keep tokens --smoothing 0.1`, on greedy
trajectories (`--greedy-share 1`). `--keep tokens --labels prompts.jsonl` learns the texts of a data set (its
column `answer`) instead of the model's own.
{LEARNS}
Examples:

  selfdraft trajectories --prompts prompts.jsonl --out paths

  selfdraft train cllm --data paths --out my-cllm

  selfdraft bench --file my.jsonl --method jacobi:adapter=my-cllm

To train on policy, record the tuned model's own trajectories and continue:

  selfdraft trajectories --prompts prompts.jsonl --adapter my-cllm --out paths-2

  selfdraft train cllm --data paths-2 --start my-cllm --out my-cllm-2
"""

SPACE_TUNED = f"""Train mask tokens and the weights together: SPACE as published (SAR-SFT, arXiv 2402.11809).

This changes the weights and thereby the text: drafting is lossless to the tuned weights only. The tuning
cost is measured at the end. The published training is `--full --masks 5 --shared-mask --sampler-head 0
--mask-vocabulary 0 --anchors 1 --draft tokens --keep tokens --keep-weight 1 --decay 1 --joint-mean`.
{LEARNS}
Examples:

  selfdraft distill --prompts prompts.jsonl --out answers

  selfdraft train space-tuned --data answers --out my-space-tuned

  selfdraft verify --method space-tuned --adapter my-space-tuned
"""


@app.command("cllm", help=CLLM)
def cllm(
    data: Annotated[Path, typer.Option(help="Folder written by `selfdraft trajectories`.")],
    out: Out,
    model: flags.Model = "smollm2",
    full: Full = False,
    rank: TunedRank = None,
    target: Target = None,
    window: Annotated[int, typer.Option(min=1, help="Noisy blocks in a row.")] = 1,
    noise: Annotated[
        str, typer.Option(help="State of a noisy block: random, or progressive or reverse over the window.")
    ] = "random",
    consistency: Annotated[
        str,
        typer.Option(
            help="Target of a state: global (the text) or local (the next state; needs a window of 1)."
        ),
    ] = "global",
    copies: Annotated[int, typer.Option(min=1, help="Noisy copies of each answer.")] = 3,
    unknown: Annotated[
        str,
        typer.Option(
            help="What stands for unknown tokens: filler (a token that the model learns to read as unknown) "
            "or random (as published)."
        ),
    ] = "filler",
    reach: Annotated[
        int, typer.Option(min=1, help="Length of the blocks of filler that all copies but the first have.")
    ] = 8,
    on_policy: Annotated[
        float, typer.Option(help="Share of the steps in which states first pass through the student itself.")
    ] = 0.35,
    keep: Keep = "base",
    keep_weight: KeepWeight = 10.0,
    smoothing: Smoothing = 0.0,
    labels: Labels = None,
    decay: Annotated[
        float, typer.Option(help="Weight of each row after the first wrong one, relative to the one before.")
    ] = 0.85,
    steps: Steps = 2000,
    batch: Batch = 4,
    length: Length = 512,
    lora_rate: TunedRate = None,
    every: Every = 200,
    share: Share = 1.0,
    start: Start = None,
    seed: Seed = 0,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    as_json: flags.Json = False,
) -> None:
    from .._common import options

    need_trainer()
    from ..train.packed import NoiseConfig

    what = "train cllm"
    noisy = {"window": window, "noise": noise, "consistency": consistency, "copies": copies, "reach": reach}
    if unknown not in ("filler", "random"):
        raise InvalidOption(f"--unknown takes filler or random; got {unknown!r}")
    plan = _tuned(
        what,
        {"method": "cllm", "model": model, "data": data, "out": out, "full": full, "share": share},
        {"masks": 0} | _lora(full, rank, target),
        {
            "keep": keep,
            "weight": keep_weight,
            "decay": decay,
            "refresh": on_policy,
            "smoothing": smoothing,
        },
        {
            "steps": steps,
            "batch": batch,
            "length": length,
            "lora_rate": _rate(full, lora_rate),
            "every": every,
            "seed": seed,
        },
        {
            "noise": options.read(NoiseConfig, noisy, what),
            "start": start,
            "unknown": unknown,
            "labels": tuple(labels or ()),
            "dtype": dtype,
            "device": device,
        },
    )
    _run_tuned(plan, as_json)


@app.command("space-tuned", help=SPACE_TUNED)
def space_tuned(
    data: Data,
    out: Out,
    model: flags.Model = "smollm2",
    full: Full = False,
    masks: Masks = 4,
    shared_mask: Shared = False,
    rank: TunedRank = None,
    target: Target = None,
    sampler: Sampler = 256,
    mask_vocabulary: MaskVocabulary = 8192,
    draft: Draft = "distill",
    keep: Keep = "base",
    keep_weight: KeepWeight = 10.0,
    joint_mean: Joint = False,
    decay: Decay = 0.9,
    steps: Steps = 2000,
    batch: Batch = 4,
    length: Length = 512,
    anchors: Anchors = 64,
    rate: Rate = 1e-2,
    lora_rate: Annotated[float | None, typer.Option(help=TUNED_RATE)] = None,
    every: Every = 200,
    share: Share = 1.0,
    start: Start = None,
    seed: Seed = 0,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    as_json: flags.Json = False,
) -> None:
    need_trainer()
    shape = {"masks": masks, "distinct": not shared_mask, "sampler": sampler}
    times = {
        "steps": steps,
        "batch": batch,
        "length": length,
        "anchors": anchors,
        "every": every,
        "seed": seed,
    }
    plan = _tuned(
        "train space-tuned",
        {"method": "space-tuned", "model": model, "data": data, "out": out, "full": full, "share": share},
        shape | _lora(full, rank, target),
        {"draft": draft, "keep": keep, "weight": keep_weight, "decay": decay, "joint": joint_mean},
        times | {"rate": rate, "lora_rate": _rate(full, lora_rate)},
        {"start": start, "dtype": dtype, "device": device, "vocabulary": mask_vocabulary},
    )
    _run_tuned(plan, as_json)


def _lora(full: bool, rank: int | None, target: list[str] | None) -> dict[str, Any]:
    """The fields of LoRA. Raises InvalidOption if they are given with --full."""
    if full and (rank or target):
        raise InvalidOption("--rank and --target go with LoRA; --full trains all weights without it")
    return {"rank": 0 if full else rank or 32, "targets": tuple(target or ())}


def _rate(full: bool, given: float | None) -> float:
    """The learning rate given, or the published one for all weights, or one for LoRA."""
    return given or (2e-5 if full else 2e-3)


def _tuned(
    what: str,
    given: dict[str, Any],
    shape: dict[str, Any],
    loss: dict[str, Any],
    times: dict[str, Any],
    others: dict[str, Any],
) -> TunedPlan:
    from .._common import options
    from ..models.adapters.adapter import AdapterConfig
    from ..train.trainer import Schedule
    from ..train.tuned import TunedLoss
    from ..train.tuning import TunedPlan

    if not 0 < given["share"] <= 1:
        raise InvalidOption(f"--data-share must be above 0, and 1 at most; got {given['share']}")
    return TunedPlan(
        **given,
        **others,
        config=options.read(AdapterConfig, shape | {"gated": False}, what),
        loss=options.read(TunedLoss, loss, what),
        schedule=options.read(Schedule, times, what),
    )


def _run_tuned(plan: TunedPlan, as_json: bool) -> None:
    from ..train.tuning import tune

    about = watched(lambda report: tune(plan, report), plan.out)
    if as_json:
        print(json.dumps({**about, "out": str(plan.out)}))
        return
    loss, repeated = about["tuning_cost"]["loss"], about["tuning_cost"]["repeated"]
    print(
        f"{plan.out}: tuned in {about['seconds'] / 60:.0f} minutes. Tuning cost: loss on held-out prompts "
        f"{loss[0]:.4f} -> {loss[1]:.4f}, same most likely token {about['tuning_cost']['agreement']:.1%}, "
        f"repeated {repeated[0]:.1%} -> {repeated[1]:.1%}"
    )
    if "convergence" in about:
        found = about["convergence"]
        print(f"forward passes per block {found['base']['passes']:.2f} -> {found['tuned']['passes']:.2f}")
    if "accuracy" in about:
        print(f"accuracy by mask {', '.join(f'{row[0]:.2f}' for row in about['accuracy'])}")


def _command(method: str, config: AdapterDefaults) -> Callable[..., None]:
    """The command that trains adapters of a method, with the method's own defaults."""

    def train(
        data: Data,
        out: Out,
        model: flags.Model = "smollm2",
        masks: Masks = config.masks,
        shared_mask: Shared = False,
        prefix: Prefix = config.prefix,
        rank: Rank = config.rank,
        target: Target = None,
        sampler: Sampler = 256,
        mask_vocabulary: MaskVocabulary = 8192,
        loss: Kind = "distill",
        decay: Decay = 0.9,
        dropout: Dropout = 0.0,
        steps: Steps = 2000,
        batch: Batch = 4,
        length: Length = 512,
        anchors: Anchors = 64,
        rate: Rate = 1e-2,
        lora_rate: LoraRate = 5e-3,
        every: Every = 200,
        start: Start = None,
        seed: Seed = 0,
        dtype: flags.Dtype = None,
        device: flags.Device = None,
        as_json: flags.Json = False,
    ) -> None:
        from .._common import options
        from ..models.adapters.adapter import AdapterConfig

        need_trainer()
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
            options.read(Loss, {"kind": loss, "decay": decay, "dropout": dropout}, what),
            options.read(Schedule, times | {"rate": rate, "lora_rate": lora_rate, "seed": seed}, what),
            mask_vocabulary,
            start,
            dtype,
            device,
        )
        _run(plan, as_json)

    return train


app.command("bita", help=BITA)(_command("bita", AdapterDefaults(masks=3, prefix=16, rank=0)))
app.command("space", help=SPACE)(_command("space", AdapterDefaults(masks=4, prefix=0, rank=16)))


def need_trainer() -> None:
    """Check that the packages for training are installed. Raises TrainingDataError."""
    missing = [name for name in ("accelerate", "datasets", "matplotlib") if find_spec(name) is None]
    if missing:
        raise TrainingDataError(f"this needs the package {missing[0]}: pip install 'selfdraft[train]'")


def _run(plan: Plan, as_json: bool) -> None:
    from ..train.run import run

    about = watched(lambda report: run(plan, report), plan.out)
    if as_json:
        print(json.dumps({**about, "out": str(plan.out)}))
    else:
        first = ", ".join(f"{row[0]:.2f}" for row in about["accuracy"])
        print(f"{plan.out}: accuracy by mask {first}; {about['seconds'] / 60:.0f} minutes")


def watched(work: Callable[[Callable[[str], None]], dict[str, Any]], out: Path) -> dict[str, Any]:
    """Run a training, print its progress, and say how to continue if it is stopped."""
    from rich.console import Console

    console = Console(stderr=True)
    try:
        return work(lambda line: console.print(f"selfdraft: {line}", highlight=False))
    except KeyboardInterrupt:
        console.print(f"selfdraft: stopped; the same command continues from the last checkpoint in {out}")
        raise
