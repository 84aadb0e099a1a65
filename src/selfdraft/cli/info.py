"""`selfdraft info`: what a model is, and what it allows."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from . import flags


def info(
    model: Annotated[
        str, typer.Argument(help="smollm2, looped-tiny, a model folder, a GGUF file, or a Hugging Face id.")
    ] = flags.DEFAULT_MODEL,
    adapter: flags.Adapter = None,
    weights: flags.Weights = None,
    activations: flags.Activations = None,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    as_json: flags.Json = False,
) -> None:
    """Load a model, check it, and say what it allows.

    The check compares trees of tokens with the model's own forward pass, and looks for the numbers of rows
    at which a token's result does not depend on the rows beside it: exact numerics need that.
    """
    from rich.table import Table

    from .paint import console

    with console(stderr=True).status(f"loading and checking {model}"):
        facts = _facts(model, adapter, weights, activations, dtype, device)
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, _words(value))
    console().print(table, markup=False)


def _facts(
    model: str,
    adapter: str | None,
    weights: str | None,
    activations: int | None,
    dtype: str | None,
    device: str | None,
) -> dict[str, Any]:
    from .. import drafting
    from ..models.adapters import folder

    llm = flags.load(model, "plain", None, None, weights, activations, dtype, device, None)
    own = llm.model
    facts = {
        "model": model,
        "runs on": llm.route,
        "type": own.name,
        "parameters": own.parameters,
        "weights": own.weights_label,
        "vocabulary": own.vocab_size,
        "tokenizer": len(llm.tokenizer),
        "chat template": bool(llm.tokenizer.chat_template),
        "end-of-text ids": sorted(llm.eos_ids),
        "context": own.context,
        "dtype": str(own.dtype).removeprefix("torch."),
        "device": str(own.device),
        "numerics": own.numerics,
        "rows per call": [own.rows.least, own.rows.most],
        "text of": f"{own.grade} weights",
        "methods": [
            name for name in drafting.available() if own.loops is not None or not drafting.drafts_early(name)
        ],
        "shipped adapters": list(folder.shipped(own)),
    }
    if own.loops is not None:
        facts["passes through its layers"] = own.loops.count
    if adapter is not None:
        adapted = own.adapted(folder.load(adapter, own))
        facts |= {
            "adapter": adapter,
            "text with the adapter of": f"{adapted.grade} weights",
            "weights with the adapter": adapted.weights_label,
        }
    return facts


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
