"""Make a model folder of a checkpoint: `export.py --out DIR --data DIR`.

bfloat16 weights, configuration, tokenizer and model card, loadable with plain `from_pretrained`.
The card has what was measured, the loss curve of the run with a law of it, and samples.
`progress.json` and `evaluation.json` go along: the first lets `pretrain.py --from-weights` go on in
the stream of tokens where this state left it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import GenerationConfig, LlamaForCausalLM

import selfdraft

import card
import curve
import tokenizer as tokens
from evaluate import evaluate, show
from logs import LogError, Run, open_run
from pretrain import CheckpointError
from samples import Sample, draw
from settings import HERE, WORK, Settings, load
from watch import newest, progress_of, step_of

console = Console()


def latest(work: Path) -> Path:
    """The checkpoint that has seen most, of the stable run and its decays."""
    found = [path for folder in work.glob("*/") if (path := newest(folder))]
    if not found:
        raise CheckpointError(f"no checkpoint under {work}; pretrain first, or give --checkpoint")
    return max(found, key=lambda path: progress_of(path).tokens)


def export(
    settings: Settings, checkpoint: Path, shards: Path, out: Path, data: Path | None
) -> None:
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.config.use_cache = True  # the trainer turns it off
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model.save_pretrained(out)
    tokens.read(shards / "tokenizer").save_pretrained(out)
    shutil.copy(checkpoint / "progress.json", out)
    (out / "model.safetensors").chmod(0o644)
    figures = evaluate(out, data, settings, tasks=settings.evaluation.tasks) if data else {}
    (out / "evaluation.json").write_text(json.dumps(figures, indent=1) + "\n")
    progress = progress_of(out)  # not of the checkpoint, which a run that goes on may have removed
    run = logged(settings, checkpoint.parent, progress.tokens)
    state = card.State(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        progress=progress,
        decay=decayed(checkpoint),
        start=run.start if run else None,
        figures=figures,
        law=lawful(settings, run, out) if run else None,
        samples=samples(settings, out, data) if data else {},
    )
    index = json.loads((shards / "index.json").read_text())
    (out / "README.md").write_text(card.write(settings, index, state), encoding="utf-8")
    if figures:
        show(figures)


def decayed(checkpoint: Path) -> tuple[int, int] | None:
    """A checkpoint's steps in its decay, and all of that decay; None where it is of none."""
    note = checkpoint.parent / "decay.json"
    if not note.is_file():
        return None
    return step_of(checkpoint) - step_of(checkpoint.parent), json.loads(note.read_text())


def logged(settings: Settings, folder: Path, tokens: int) -> Run | None:
    """The run of a folder of checkpoints up to one of them, as far as there are logs of it."""
    decay = folder if (folder / "decay.json").is_file() else None
    try:
        return open_run(folder.parent, decay, settings, tokens)
    except LogError as error:
        console.print(f"no loss curve: {error}")
        return None


def lawful(settings: Settings, run: Run, out: Path) -> dict[str, Any] | None:
    """What the law of a run's loss curve came to, if the run is long enough for one."""
    try:
        return curve.write(curve.trace(run, settings), out)
    except LogError as error:
        console.print(f"no loss curve: {error}")
        return None


def samples(settings: Settings, folder: Path, data: Path) -> dict[str, list[Sample]]:
    how = settings.evaluation
    return draw(selfdraft.load(str(folder)), data, how.samples, how.sample_tokens)


def main(
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    work: Annotated[Path, typer.Option(help="Work folder of the recipe.")] = WORK,
    shards: Annotated[Path | None, typer.Option(help="Shards; default WORK/shards.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Default: the one that saw most.")] = None,
    data: Annotated[Path | None, typer.Option(help="Evaluate on this data folder.")] = None,
    tasks: Annotated[
        int | None,
        typer.Option(help="Of HumanEval and of MBPP, at most. Default: the settings'.", min=0),
    ] = None,
    settings: Annotated[Path, typer.Option(help="Another settings file.")] = HERE / "settings.toml",
) -> None:
    """Write a model folder that plain from_pretrained loads."""
    chosen, how = checkpoint or latest(work), load(settings)
    if tasks is not None:
        how = replace(how, evaluation=replace(how.evaluation, tasks=tasks))
    export(how, chosen, shards or work / "shards", out, data)
    print(f"{chosen.name} of {chosen.parent.name} is in {out}")


if __name__ == "__main__":
    typer.run(main)
