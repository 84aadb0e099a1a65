"""Model cards of adapters and tuned models, with pictures: what they are, how accurate, how trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .published import sentence

SHOWN = 4  # masks whose accuracy is logged and drawn
TEMPLATE = """---
base_model: {base}
library_name: selfdraft
tags: [speculative-decoding, {method}]
---

# {name}: a {method} adapter of {base}

The model drafts for itself with {masks} mask tokens. Its text does not change, at any temperature
(grade: lossless to the **base** weights). Trained parts: {parts};
{trained:,} parameters, {share:.2%} of the model's.

```python
from selfdraft import LLM

llm = LLM("{base}", "{method}", adapter="{name}")
```

How often the candidate of a mask and rank is the next token, on held-out answers of the model:

{table}

![accuracy during training](acceptance.png)

Training: {steps:,} steps of {batch} sequences with {anchors} groups of masks each, loss `{loss}`,
decay {decay}, in {minutes:.0f} minutes on {processor}, {threads} threads, {device}; peak memory {peak}.
Learning rates {rate} and {lora_rate} (LoRA, sampler head). Made by selfdraft {version}, torch {torch},
transformers {transformers}, commit {commit}. `adapter_config.json` holds all options.{origin}
"""


TUNED_TEMPLATE = """---
base_model: {base}
library_name: selfdraft
tags: [speculative-decoding, {method}]
---

# {name}: {base}, tuned by {method}

The weights are tuned. Drafting does not change the text of these weights, at any temperature, but their text
is not that of {base} (grade: lossless to the **tuned** weights). Trained: {trained:,} parameters,
{share:.2%} of the model's ({parts}).

```python
from selfdraft import LLM

llm = {load}
```

## Tuning cost

On {tokens:,} tokens of held-out prompts, and on greedy answers to them:

| | {base} | tuned |
|---|---|---|
| loss on the prompts, nats per token | {loss[0]:.4f} | {loss[1]:.4f} |
| most likely token is that of {base} | 100 % | {agreement:.1%} |
| tokens after an answer's first repetition | {repeated[0]:.1%} | {repeated[1]:.1%} |
{found}
Training: {steps:,} steps of {batch} sequences in {minutes:.0f} minutes on {processor}, {threads} threads,
{device}; peak memory {peak}. Losses: draft `{draft}`, keep `{keep}` x {weight:g}. Made by selfdraft
{version}, torch {torch}, transformers {transformers}, commit {commit}. `{config}` holds all options.{origin}
"""

CONVERGENCE = """
## Convergence of blocks

Greedy answers to held-out prompts by Jacobi decoding as published, in blocks of {block} tokens:

| per block | {base} | tuned |
|---|---|---|
{rows}

![share of a block that is correct](convergence.png)
"""

GUESSES = """
## Accuracy of the masks

How often the candidate of a mask and rank is the next token, on held-out answers of {base}:

{table}

![accuracy during training](acceptance.png)
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
        f"for the {asked['vocabulary']:,} most frequent ids"
        if config["masks"] and asked["vocabulary"]
        else "",
    ]
    drafts = f'"{method}"' if config["masks"] else '"jacobi"'
    where = f"{folder.name}/model" if asked["full"] else base
    adapter = "" if asked["full"] and not config["masks"] else f', adapter="{folder.name}"'
    peak = about["peak_bytes"]
    text = TUNED_TEMPLATE.format(
        base=base,
        method=method,
        name=folder.name,
        parts=", ".join(part for part in parts if part),
        load=f'LLM("{where}", {drafts}{adapter})',
        found=found,
        trained=about["trained"],
        share=about["share"],
        minutes=about["seconds"] / 60,
        peak=f"{peak / 2**30:.2f} GiB" if peak else "unknown",
        version=machine["selfdraft"],
        config="tuning.json" if asked["full"] else "adapter_config.json",
        origin=sentence(asked) + origin(asked),
        **about["tuning_cost"],
        **{key: asked["loss"][key] for key in ("draft", "keep", "weight")},
        **{key: asked["schedule"][key] for key in ("steps", "batch")},
        **{
            key: machine[key] for key in ("processor", "threads", "device", "torch", "transformers", "commit")
        },
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def origin(asked: Mapping[str, Any]) -> str:
    """A sentence that names the adapter that the run started from, if there was one."""
    start = asked.get("start")
    return f"\nIt was trained further from an earlier adapter (digest {start[:12]})." if start else ""


def _convergence(found: Mapping[str, Mapping[str, float]]) -> str:
    names = {
        "tokens": "tokens",
        "passes": "forward passes until it is the text",
        "fast_forwarded": "fast-forwarded tokens",
        "stationary": "stationary tokens",
    }
    before, after = found["base"], found["tuned"]
    return "\n".join(f"| {said} | {before[key]:.2f} | {after[key]:.2f} |" for key, said in names.items())


def converging(path: Path, found: Mapping[str, Mapping[str, Any]], base: str) -> None:
    """Draw the share of a block that is correct up to the first wrong token, by passes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, said in (("base", base), ("tuned", "tuned")):
        axes.plot(found[name]["progress"], label=said, marker="." if name == "tuned" else None)
    axes.set(xlabel="passes", ylabel="correct up to the first wrong token", ylim=(0, 1.02))
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
        f"for the {asked['vocabulary']:,} most frequent ids" if asked["vocabulary"] else "",
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
        origin=sentence(asked) + origin(asked),
        **{key: asked["schedule"][key] for key in ("steps", "batch", "anchors", "rate", "lora_rate")},
        **{
            key: machine[key] for key in ("processor", "threads", "device", "torch", "transformers", "commit")
        },
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def picture(path: Path, log: Sequence[Mapping[str, float]], masks: int) -> None:
    """Draw accuracy by offset on held-out answers during training."""
    from matplotlib.figure import Figure

    points = [entry for entry in log if "eval_right_1" in entry]
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for i in range(min(masks, SHOWN)):
        shares = [entry[f"eval_right_{i + 1}"] for entry in points]
        axes.plot([entry["step"] for entry in points], shares, label=f"mask {i + 1}")
    axes.set(xlabel="step", ylabel="first candidate is the model's pick", ylim=(0, 1))
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
