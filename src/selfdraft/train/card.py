"""The card of an adapter: what it is, how good its guesses are, how it was made; and the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
transformers {transformers}, commit {commit}. `adapter_config.json` has every option.
"""


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
    for i in range(masks):
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
