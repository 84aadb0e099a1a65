"""The model card of a looped model: what it is, the quality of its readouts, and how it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..models.looped.config import Shape

TEMPLATE = """---
base_model: {base}
library_name: selfdraft
tags: [speculative-decoding, speed, looped]
---

# {name}: {unique} layers, used {loops} times

A decoder of depth {depth} with the weights of {layers} layers ({parameters:,} parameters). A token passes
through {unique} of them {loops} times, and the same norm and head can predict the next token after every
pass. {parts}{origin}

```bash
{command}
```

This is a transformers folder of model type `{kind}`; `import selfdraft.models.looped.decoder` registers it.

## Readouts

On {tokens:,} held-out tokens. Agreement: how often the most likely token is that of the last pass; a token
that starts after an earlier pass is revised in the other cases.

| after pass | loss, nats per token | agreement | revised |
|---|---|---|---|
{rows}
{decoded}{compared}
Trained for {steps:,} steps of {batch} windows of {length} tokens ({seen:,} tokens, of {windows:,} windows)
in {minutes:.0f} minutes on {processor}, {threads} threads, {device}; peak memory {peak}. The loss is the
weighted sum of the losses after every pass (arXiv 2310.12072). The last pass learns {aim};
earlier passes learn {early}, at {exit_share:.0%} of the positions. Learning rates {rate} (Muon) and
{outer_rate} (embeddings, head, norms). Made by selfdraft {version}, torch {torch}, transformers
{transformers}, commit {commit}. `training.json` holds all options and the log.
"""

SCRATCH = """It was trained
from random weights, with the widths and the tokenizer of {base}. Drafting does not change its text (grade:
lossless to the **base** weights)."""
TUNED = """It was trained
from the weights of {base}. Drafting does not change its text, but its text is not that of {base} (grade:
lossless to the **tuned** weights)."""
SPEED = " --method speed"
EARLY = {"last": "its distribution", "same": "the same"}


def write(folder: Path, kind: str, about: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
    """Write README.md from the figures of `looped.loop`. kind: the model type."""
    asked, exits, peak = about["run"], about["exits"], about["peak_bytes"]
    base, schedule, data = about["base"], asked["schedule"], asked["data"]
    shape = Shape(**{part.name: asked[part.name] for part in fields(Shape)})
    text = TEMPLATE.format(
        base=base,
        name=folder.name,
        kind=kind,
        depth=shape.depth,
        layers=shape.prelude + shape.unique + shape.coda,
        parts=_parts(shape),
        parameters=about["parameters"],
        origin=(SCRATCH if asked["scratch"] else TUNED).format(base=base),
        tokens=exits["tokens"],
        rows=_table(exits),
        decoded=_decoded(about["pipeline"]),
        compared=_compared(asked, about),
        seen=schedule["steps"] * schedule["batch"] * data["length"],
        minutes=about["seconds"] / 60,
        peak=f"{peak / 2**30:.2f} GiB" if peak else "unknown",
        command=f'selfdraft generate "def mean(" --model {folder.name}' + SPEED * (asked["loops"] > 1),
        aim=f"the distribution of {asked['teacher']}" if asked["teacher"] else "the reference tokens",
        early=EARLY[asked["early"]],
        version=machine["selfdraft"],
        **{key: asked[key] for key in ("unique", "loops", "exit_share")},
        **{key: schedule[key] for key in ("steps", "batch", "rate", "outer_rate")},
        **{key: data[key] for key in ("length", "windows")},
        **{
            key: machine[key] for key in ("processor", "threads", "device", "torch", "transformers", "commit")
        },
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _parts(shape: Shape) -> str:
    """What there is beside the layers that are shared whole."""
    said = ""
    if shape.prelude or shape.coda:
        layers = "layer" if shape.prelude == 1 else "layers"
        said += (
            f"There are {shape.prelude} {layers} before them and {shape.coda} after them that run once; "
            "every readout goes\nthrough the latter. "
        )
    if shape.lora_rank is not None:
        said += f"Each pass has a LoRA of rank {shape.lora_rank} on every matrix (arXiv 2410.20672).\n"
    return said


def _table(exits: Mapping[str, Any]) -> str:
    pairs = zip(exits["loss"], exits["agreement"], strict=True)
    return "\n".join(
        f"| {g} | {loss:.4f} | {same:.1%} | {1 - same:.1%} |" for g, (loss, same) in enumerate(pairs, start=1)
    )


def _decoded(found: Mapping[str, Any] | None) -> str:
    """What `speed` gained and revised while the model itself went on with held-out text."""
    if found is None:
        return ""
    picks = ", ".join(f"{same:.1%} after pass {g}" for g, same in enumerate(found["agreement"], start=1))
    return (
        f"\nWith `speed`, which lets each token start on the pick after the first pass, it continued "
        f"{found['prompts']} held-out\nbeginnings greedily by {found['tokens']:,} tokens: "
        f"{found['tokens_per_forward']:.2f} tokens per forward.\nPicks were the final ones in {picks}.\n"
        f"Of {found['started']:,} tokens that started early {found['flushed']:.1%} were flushed.\n"
    )


def _compared(asked: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """The losses of the model that the run started from and of its teacher, if that is another one."""
    lines = ""
    if about["base_loss"] is not None:
        start = Path(asked["model"]).name
        lines += f"\n{start}, from which this run started, has a loss of {about['base_loss']:.4f} there.\n"
    if about["teacher_loss"] is not None and asked["teacher"] != asked["model"]:
        teacher = Path(asked["teacher"]).name
        lines += f"\n{teacher}, from which it learns, has {about['teacher_loss']:.4f}.\n"
    return lines
