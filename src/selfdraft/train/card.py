"""The card of an adapter: what it is, how good its guesses are, how it was made; and the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SHOWN = 4  # masks whose acceptance is logged and drawn
TEMPLATE = """---
base_model: {base}
library_name: selfdraft
tags: [speculative-decoding, {method}]
---

# {name}: a {method} adapter of {base}

The model drafts for itself with {masks} mask tokens; its own text does not change, at any temperature
(grade: lossless to the **base** weights). Trained: {parts};
{trained:,} parameters, {share:.2%} of the model's.

```python
import selfdraft

model = selfdraft.load("{base}", method="{method}", adapter="{name}")
```

How often a mask's guess of a rank is the token that came, on held-out answers of the model:

{table}

![acceptance while training](acceptance.png)

Trained for {steps:,} steps of {batch} sequences with {anchors} groups of masks each, loss `{loss}`,
decay {decay}, in {minutes:.0f} minutes on {processor}, {threads} threads, {device}; peak memory {peak}.
Learning rates {rate} and {lora_rate} (LoRA, sampler head). Made by selfdraft {version}, torch {torch},
transformers {transformers}, commit {commit}. `adapter_config.json` has every option.{origin}
"""


TUNED_TEMPLATE = """---
base_model: {base}
library_name: selfdraft
tags: [speculative-decoding, {method}]
---

# {name}: {base}, tuned by {method}

Tuned weights: what is drafted is exactly what these weights say without drafting, at any temperature, but
not what {base} says (grade: lossless to the **tuned** weights). Trained: {trained:,} parameters,
{share:.2%} of the model's ({parts}).

```python
import selfdraft

model = {load}
```

## What it costs

On {tokens:,} tokens of held-out prompts, and on greedy answers to them:

| | {base} | tuned |
|---|---|---|
| loss on what people wrote, nats per token | {loss[0]:.4f} | {loss[1]:.4f} |
| likeliest token is that of {base} | 100 % | {agreement:.1%} |
| tokens behind an answer's first repetition | {repeated[0]:.1%} | {repeated[1]:.1%} |
{found}
Trained for {steps:,} steps of {batch} sequences in {minutes:.0f} minutes on {processor}, {threads} threads,
{device}; peak memory {peak}. Losses: draft `{draft}`, keep `{keep}` x {weight:g}. Made by selfdraft
{version}, torch {torch}, transformers {transformers}, commit {commit}. `{config}` has every option.{origin}
"""

CONVERGENCE = """
## How blocks converge

Greedy answers to held-out prompts by Jacobi decoding as published, in blocks of {block} tokens:

| per block | {base} | tuned |
|---|---|---|
{rows}

![share of a block that is right](convergence.png)
"""

GUESSES = """
## How good its guesses are

How often a mask's guess of a rank is the token that came, on held-out answers of {base}:

{table}

![acceptance while training](acceptance.png)
"""


def write_tuned(
    folder: Path,
    method: str,
    base: str,
    about: Mapping[str, Any],
    log: Sequence[Mapping[str, float]],
    machine: Mapping[str, Any],
) -> None:
    """Write README.md and the pictures of a tuned model."""
    asked, found = about["run"], ""
    config = asked["config"]
    if "convergence" in about:
        found += CONVERGENCE.format(
            base=base, block=asked["data"]["block"], rows=_convergence(about["convergence"])
        )
        converging(folder / "convergence.png", about["convergence"], base)
    if "accuracy" in about:
        found += GUESSES.format(base=base, table=_table(about["accuracy"]))
        picture(folder / "acceptance.png", log, config["masks"])
    parts = [
        "all weights"
        if asked["full"]
        else f"LoRA of rank {config['rank']} on {', '.join(config['targets']) or 'all layers'}",
        f"{config['masks'] if config['distinct'] else 1} mask embeddings" if config["masks"] else "",
        f"a sampler head of width {config['sampler']}" if config["sampler"] else "",
    ]
    drafts = f'method="{method}"' if config["masks"] else 'method="jacobi"'
    where = f"{folder.name}/model" if asked["full"] else base
    adapter = "" if asked["full"] and not config["masks"] else f', adapter="{folder.name}"'
    peak = about["peak_bytes"]
    text = TUNED_TEMPLATE.format(
        base=base,
        method=method,
        name=folder.name,
        parts=", ".join(part for part in parts if part),
        load=f'selfdraft.load("{where}", {drafts}{adapter})',
        found=found,
        trained=about["trained"],
        share=about["share"],
        minutes=about["seconds"] / 60,
        peak=f"{peak / 2**30:.2f} GiB" if peak else "unknown",
        version=machine["selfdraft"],
        config="tuning.json" if asked["full"] else "adapter_config.json",
        origin=origin(asked),
        **about["tuning_cost"],
        **{key: asked["loss"][key] for key in ("draft", "keep", "weight")},
        **{key: asked["schedule"][key] for key in ("steps", "batch")},
        **{
            key: machine[key] for key in ("processor", "threads", "device", "torch", "transformers", "commit")
        },
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def origin(asked: Mapping[str, Any]) -> str:
    """That the run went on from an adapter which had been trained before, if it did."""
    start = asked.get("start")
    return f"\nIt went on from an adapter of an earlier training (digest {start[:12]})." if start else ""


def _convergence(found: Mapping[str, Mapping[str, float]]) -> str:
    names = {
        "tokens": "tokens",
        "passes": "passes until it is the text",
        "fast_forwarded": "fast-forwarded tokens",
        "stationary": "stationary tokens",
    }
    before, after = found["base"], found["tuned"]
    return "\n".join(f"| {said} | {before[key]:.2f} | {after[key]:.2f} |" for key, said in names.items())


def converging(path: Path, found: Mapping[str, Mapping[str, Any]], base: str) -> None:
    """The share of a block that is right up to the first wrong token, by passes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, said in (("base", base), ("tuned", "tuned")):
        axes.plot(found[name]["progress"], label=said, marker="." if name == "tuned" else None)
    axes.set(xlabel="passes", ylabel="right up to the first wrong token", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def write(
    folder: Path,
    method: str,
    base: str,
    about: Mapping[str, Any],
    log: Sequence[Mapping[str, float]],
    machine: Mapping[str, Any],
) -> None:
    """Write README.md and acceptance.png."""
    asked, config = about["run"], about["run"]["config"]
    picture(folder / "acceptance.png", log, config["masks"])
    parts = [
        f"{config['masks'] if config['distinct'] else 1} mask embeddings",
        f"a prefix of {config['prefix']} slots in every layer" if config["prefix"] else "",
        f"LoRA of rank {config['rank']}, gated to mask rows" if config["rank"] else "",
        f"a sampler head of width {config['sampler']}" if config["sampler"] else "",
    ]
    peak = about["peak_bytes"]
    text = TEMPLATE.format(
        base=base,
        method=method,
        name=folder.name,
        masks=config["masks"],
        parts=", ".join(part for part in parts if part),
        trained=about["trained"],
        share=about["share"],
        table=_table(about["accuracy"]),
        minutes=about["seconds"] / 60,
        peak=f"{peak / 2**30:.2f} GiB" if peak else "unknown",
        loss=asked["loss"]["kind"],
        decay=asked["loss"]["decay"],
        version=machine["selfdraft"],
        origin=origin(asked),
        **{key: asked["schedule"][key] for key in ("steps", "batch", "anchors", "rate", "lora_rate")},
        **{
            key: machine[key] for key in ("processor", "threads", "device", "torch", "transformers", "commit")
        },
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def picture(path: Path, log: Sequence[Mapping[str, float]], masks: int) -> None:
    """Acceptance by offset, on held-out answers, while training."""
    from matplotlib.figure import Figure

    points = [entry for entry in log if "eval_right_1" in entry]
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for i in range(min(masks, SHOWN)):
        shares = [entry[f"eval_right_{i + 1}"] for entry in points]
        axes.plot([entry["step"] for entry in points], shares, label=f"mask {i + 1}")
    axes.set(xlabel="step", ylabel="first guess is the model's pick", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _table(accuracy: Sequence[Sequence[float]]) -> str:
    ranks = range(1, len(accuracy[0]) + 1)
    lines = [
        "| mask | " + " | ".join(f"rank {rank}" for rank in ranks) + " |",
        "|---" * (len(ranks) + 1) + "|",
    ]
    for i, row in enumerate(accuracy, start=1):
        lines.append(f"| {i} | " + " | ".join(f"{share:.3f}" for share in row) + " |")
    return "\n".join(lines)
