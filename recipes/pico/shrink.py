"""Cut an adapter's LoRA to a lower rank: `shrink.py DIR --out DIR --rank N`.

Each layer keeps the product of that rank nearest to its own, by singular values (Eckart and Young
1936). What it loses is to be learned again: the folder is meant as a `--start` of a training.
Weights keep their dtype; the scale, alpha over rank, stays. Prints the share of the energy kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfdraft.models.adapters.folder import CONFIG, WEIGHTS

console = Console()
# What the training of the uncut one found, and the cut one is not.
MEASURED = ("odds", "accuracy", "price", "convergence", "run", "seconds", "peak_bytes")
A, B = "lora_A.weight", "lora_B.weight"


class ShrinkError(Exception):
    """The folder is no adapter with LoRA, or its rank is not above the one that is asked for."""


def nearest(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Factors (rank, in) and (out, rank) nearest to B A, and the share of its squares they keep."""
    left, values, right = torch.linalg.svd(b.float() @ a.float(), full_matrices=False)
    squares = values.square()
    share = squares[:rank].sum() / squares.sum() if squares.any() else torch.ones(())
    root = values[:rank].sqrt()  # half of each value to each side
    return (
        (root[:, None] * right[:rank]).to(a.dtype).contiguous(),
        (left[:, :rank] * root).to(b.dtype).contiguous(),
        float(share),
    )


def shrink(folder: Path, out: Path, rank: int) -> float:
    """Write the adapter at a lower rank; the mean share its layers keep. Raises ShrinkError."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise ShrinkError(
            f"{folder} is no adapter: {Path(error.filename).name} is missing"
        ) from error
    if rank >= config.get("r", 0):
        raise ShrinkError(
            f"{folder} has rank {config.get('r', 0)}; --rank has to be below, got {rank}"
        )
    shares = []
    for key in [key for key in weights if key.endswith(A)]:
        other = key.removesuffix(A) + B
        weights[key], weights[other], share = nearest(weights[key], weights[other], rank)
        shares.append(share)
    config |= {"lora_alpha": config["lora_alpha"] / config["r"] * rank, "r": rank}
    for name in MEASURED:
        config["selfdraft"].pop(name, None)
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    (out / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return sum(shares) / len(shares)


def main(
    folder: Annotated[Path, typer.Argument(help="An adapter with LoRA.")],
    out: Annotated[Path, typer.Option(help="Folder for the smaller one.")],
    rank: Annotated[int, typer.Option(help="Its rank.", min=1)],
) -> None:
    """Cut an adapter's LoRA to a lower rank."""
    try:
        share = shrink(folder, out, rank)
    except ShrinkError as error:
        console.print(f"shrink: {error}")
        raise typer.Exit(2) from None
    print(f"{out}: rank {rank}, {share:.1%} of the energy kept")


if __name__ == "__main__":
    typer.run(main)
