"""`selfdraft info`: what a model is, and what it allows."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from . import flags


def info(
    model: Annotated[str, typer.Argument(help="pico (embedded), a model folder, or a hub id.")] = "pico",
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    as_json: flags.Json = False,
) -> None:
    """Load a model, probe it, and say what it allows.

    The probe compares trees of tokens with the model's own forward, and looks for the row counts at
    which every row keeps its bits: the condition of exact numerics.
    """
    from rich.console import Console
    from rich.table import Table

    from .. import drafting
    from ..models.loading import drive, load_pretrained

    pretrained, tokenizer = load_pretrained(model, dtype, device)
    loaded = drive(pretrained)
    facts = {
        "model": model,
        "type": loaded.name,
        "parameters": pretrained.num_parameters(),
        "vocabulary": loaded.vocab_size,
        "tokenizer": len(tokenizer),
        "context": loaded.context,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "verifies trees": True,
        "grade": loaded.grade,
        "passes through its layers": loaded.loops.count if loaded.loops is not None else 1,
        "numerics": loaded.numerics,
        "rows per call": [loaded.rows.least, loaded.rows.most],
        "methods": [
            name
            for name in drafting.available()
            if loaded.loops is not None or not drafting.drafts_early(name)
        ],
    }
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    Console().print(table)
